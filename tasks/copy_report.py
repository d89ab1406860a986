"""Figures and examples of what dedup found."""

import json
from typing import TYPE_CHECKING, Any

from conf.dedup import DedupConfig
from storage.corpus import Corpus
from tasks.shard_batches import texts_at
from tasks.stage import Job

if TYPE_CHECKING:
    import polars as pl

EXAMPLES = 10
EXAMPLE_CHARS = 400


def write_report(
    job: Job, corpus: Corpus, table: "pl.DataFrame", misses: "pl.DataFrame", settings: DedupConfig
) -> None:
    """Put figures, the table by domain and `logs/examples.json` on the job; its files are written."""
    rows = _by_domain(corpus, Corpus(job.path))

    def total(name: str) -> int:
        return sum(row[name] for row in rows)

    job.metrics |= {
        "documents": {"in": total("documents"), "kept": total("kept")},
        "groups": table.select("of_shard", "of_row").n_unique(),
        "chars": {"in": total("chars_in"), "kept": total("chars_kept")},
    }
    if "start" in table.columns:
        shown = ("cut", "dropped")
        job.metrics["cut"] = {"documents": total("cut"), "passages": table.height}
    elif settings.mode == "soft":
        shown = ("dropped",)
        job.metrics["lighter"] = table.height
    else:
        shown = ("exact", "near")
        job.metrics["duplicates"] = {kind: total(kind) for kind in shown}
    if settings.mode == "near":
        job.metrics["recall_at_threshold"] = round(settings.recall(settings.threshold), 5)
    columns = ("domain", "documents", *shown, "kept", "chars_in", "chars_kept")
    job.tables["duplicates"] = [{name: row[name] for name in columns} for row in rows]
    _write_examples(job, corpus, table, misses)


def _by_domain(corpus: Corpus, result: Corpus) -> list[dict[str, Any]]:
    """Figures of every domain, added up shard by shard."""
    import polars as pl

    frames: list[pl.DataFrame] = []
    for before, after in zip(corpus.shards, result.shards, strict=True):
        frame = before.read(["domain", "n_chars"])
        decisions = after.decisions()[frame["row"]]
        cut = pl.lit(0, pl.Int64)
        if "cuts" in decisions.columns:
            span = pl.element().struct.field("end") - pl.element().struct.field("start")
            cut = decisions.select(pl.col("cuts").list.eval(span).list.sum())["cuts"].cast(pl.Int64)
        frames.append(_counted(frame.with_columns(decisions["reason"], cut=cut)))
    if not frames:
        return []
    return pl.concat(frames).group_by("domain").sum().sort("domain").to_dicts()


def _counted(documents: "pl.DataFrame") -> "pl.DataFrame":
    import polars as pl

    reason, chars, cut = pl.col("reason"), pl.col("n_chars").cast(pl.Int64), pl.col("cut")
    is_kept = reason.is_null()
    return documents.group_by("domain").agg(
        documents=pl.len().cast(pl.Int64),
        exact=(reason == "exact_duplicate").sum().cast(pl.Int64),
        near=(reason == "near_duplicate").sum().cast(pl.Int64),
        cut=(is_kept & (cut > 0)).sum().cast(pl.Int64),
        dropped=reason.is_not_null().sum().cast(pl.Int64),
        kept=is_kept.sum().cast(pl.Int64),
        chars_in=chars.sum(),
        chars_kept=(chars - cut).filter(is_kept).sum(),
    )


def _write_examples(
    job: Job, corpus: Corpus, table: "pl.DataFrame", misses: "pl.DataFrame"
) -> None:
    examples = {
        "duplicates": _examples(corpus, table),
        "near_misses": _examples(corpus, misses.sort("jaccard", descending=True)),
    }
    job.logs.mkdir(parents=True, exist_ok=True)
    content = json.dumps(examples, ensure_ascii=False, indent=1)
    (job.logs / "examples.json").write_text(content + "\n", "utf-8")


def _examples(corpus: Corpus, pairs: "pl.DataFrame") -> list[dict[str, Any]]:
    """Both texts of some pairs: their beginnings, or the passage that they share."""
    shards = corpus.shards

    shown = pairs.head(EXAMPLES)
    # As good, from fewer shards to read.
    inside = pairs.filter(pairs["shard"] == pairs["of_shard"])
    if inside.height >= EXAMPLES:
        most = inside["shard"].value_counts(sort=True)["shard"].head(2).implode()
        shown = inside.filter(inside["shard"].is_in(most)).head(EXAMPLES)
    wanted: dict[int, set[int]] = {}
    for shard, row, of_shard, of_row in shown.select("shard", "row", "of_shard", "of_row").rows():
        wanted.setdefault(shard, set()).add(row)
        wanted.setdefault(of_shard, set()).add(of_row)
    beginnings = {
        (shard, row): text
        for shard, rows in wanted.items()
        for row, text in texts_at(shards[shard], [*rows]).items()
    }

    def text(shard: int, row: int, start: int = 0) -> str:
        return beginnings[shard, row][start : start + EXAMPLE_CHARS]

    return [
        {
            **pair,
            "text": text(pair["shard"], pair["row"], pair.get("start", 0)),
            "of_text": text(pair["of_shard"], pair["of_row"]),
        }
        for pair in shown.iter_rows(named=True)
    ]
