"""Draw a part of a corpus that keeps the shares of its languages, sources and topics."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from conf.sample import SampleConfig
from storage.corpus import Corpus, Shard
from storage.topics import Topics
from tasks.stage import Job, stage

if TYPE_CHECKING:
    import polars as pl

REASON = "not_sampled"


@stage(version=1)
def sample(
    job: Job, corpus: Corpus, settings: SampleConfig, topics: Topics | None = None
) -> Corpus:
    """Keep a share of every group of documents, drawn by a hash of their ids.

    reads Corpus   writes Corpus   cost one look at ids and lengths, no text is read

    Documents of a group come in the order of their hashes until its share of characters is reached, so
    a larger share holds the smaller one. Raises ValueError for a share of a group that is not there.
    """
    if "topic" in settings.strata and topics is None:
        raise ValueError(
            "sample: strata name `topic`, but no topics are read; add `topics: NODE` to `from`, a node "
            "of the stage topics over the same corpus"
        )
    frames = [_frame(shard, settings, topics) for shard in corpus.shards]
    chosen = _chosen(frames, settings)
    _check_names(frames, settings)

    def keeps() -> "Iterator[pl.DataFrame]":
        import polars as pl

        for frame, wanted in zip(frames, chosen, strict=True):
            yield frame.select(
                keep=pl.col("before") & wanted,
                reason=pl.when(pl.col("before") & ~wanted).then(pl.lit(REASON)),
            )

    Corpus.write(job.files, corpus, keeps(), "sample")
    job.parts += [s.entry.part for s in corpus.shards if s.entry.part not in job.parts]
    _report(job, frames, chosen)
    return Corpus(job.path)


def _frame(shard: Shard, settings: SampleConfig, topics: Topics | None) -> "pl.DataFrame":
    """Per row: `group`, `split`, `n_chars`, `order` (a hash of the id) and `before` (came in)."""
    import numpy as np
    import polars as pl

    columns = ["doc_id", "language", "source", "domain", "split", "n_chars"]
    frame = shard.read(columns, kept_only=False)
    # SplitMix64 of id and seed: splits and samples of other seeds must not follow the same order.
    with np.errstate(over="ignore"):
        x = frame["doc_id"].to_numpy() + np.uint64(settings.seed + 1) * np.uint64(
            0x9E3779B97F4A7C15
        )
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    if topics is not None:
        frame = frame.with_columns(
            topic=topics.of_shard(shard.index).cast(pl.String).fill_null("none")
        )
    group = pl.concat_str([pl.col(name) for name in settings.strata], separator="/")
    return frame.select(
        (group if settings.strata else pl.lit("all")).alias("group"),
        "split",
        pl.col("n_chars").cast(pl.Int64),
        order=pl.Series(x ^ (x >> np.uint64(31))),
        before=shard.decisions()["keep"],
    )


def _chosen(frames: "list[pl.DataFrame]", settings: SampleConfig) -> "list[pl.Series]":
    """Per shard and row: whether it is drawn."""
    import polars as pl

    if not frames:
        return []
    place = pl.concat(
        [
            f.with_columns(shard=pl.lit(i, pl.UInt32)).with_row_index("row")
            for i, f in enumerate(frames)
        ]
    ).filter("before")
    by_group = pl.col("group").replace_strict(settings.shares, default=settings.share) if (
        settings.shares
    ) else pl.lit(settings.share)  # fmt: skip
    share = pl.when(pl.col("split") == "held").then(settings.held_share).otherwise(by_group)
    total = pl.col("n_chars").sum().over("group", "split")
    # A document is drawn while less than the share has been: what came before it decides.
    drawn_before = (pl.col("n_chars").cum_sum() - pl.col("n_chars")).over("group", "split")
    drawn = place.sort("order", "shard", "row").filter(drawn_before < share * total)
    return [
        pl.Series(range(f.height), dtype=pl.UInt32).is_in(
            drawn.filter(pl.col("shard") == i)["row"].implode()
        )
        for i, f in enumerate(frames)
    ]


def _check_names(frames: "list[pl.DataFrame]", settings: SampleConfig) -> None:
    known = {str(group) for frame in frames for group in frame["group"].unique()}
    if unknown := settings.shares.keys() - known:
        raise ValueError(
            f"sample: no documents of {', '.join(sorted(unknown))}; the groups are "
            f"{', '.join(sorted(known)) or 'none'}: name them by their {'/'.join(settings.strata)}"
        )


def _report(job: Job, frames: "list[pl.DataFrame]", chosen: "list[pl.Series]") -> None:
    import polars as pl

    rows = [
        f.with_columns(kept=wanted & f["before"]).filter("before")
        for f, wanted in zip(frames, chosen, strict=True)
    ]
    if not rows:
        job.metrics |= {"documents": 0, "kept": 0}
        return
    table = (
        pl.concat(rows)
        .group_by("group", "split")
        .agg(
            documents=pl.len(),
            kept=pl.col("kept").sum(),
            chars=pl.col("n_chars").sum(),
            chars_kept=pl.col("n_chars").filter("kept").sum(),
        )
        .sort("group", "split")
    )
    job.metrics |= {"documents": int(table["documents"].sum()), "kept": int(table["kept"].sum())}
    job.tables["groups"] = table.to_dicts()
