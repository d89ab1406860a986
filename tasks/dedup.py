"""dedup: keep one document of every kind."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from conf.dedup import DedupConfig
from storage.corpus import Corpus, Shard, joined_spans, without_spans
from storage.identity import fingerprint
from tasks.copy_report import write_report
from tasks.copy_table import DUPLICATES, NEAR_MISSES, empty_table
from tasks.fanout import Part, PartItem, fan_out
from tasks.kept_rows import kept_digest, text_digest
from tasks.near_duplicates import SignedShard, build_landing
from tasks.passages import PASSAGES, build_anchors, build_passages
from tasks.signatures import (
    FREQUENCIES,
    UNITS,
    build_frequencies,
    build_signatures,
    permutations_of,
)
from tasks.soft_weights import WEIGHTS, build_weights
from tasks.stage import Job, stage

if TYPE_CHECKING:
    import polars as pl

LEAST_RECALL = 0.95
PARTS_VERSION = 3
CLUSTERS = "clusters.parquet"
SIGNED_FIELDS = {
    "near": ("unit", "keep", "shingles", "shingle_tokens", "bands", "band_rows", "least_recall",
             "permutation_seed"),
    "simhash": ("unit", "keep", "shingles", "shingle_tokens", "weights", "distance_bits"),
    "exact": ("unit", "keep"),
    "substring": ("passage_tokens",),
    "soft": (),
}  # fmt: skip
"""Of the settings those that a shard's part depends on: another threshold signs nothing anew."""


@stage(version=3)
def dedup(job: Job, corpus: Corpus, settings: DedupConfig) -> Corpus:
    """Keep one document of every group of copies; which one is `keep`'s choice.

    reads Corpus   writes Corpus and, by mode, `duplicates.parquet` (shard, row, kind, of_shard, of_row,
    jaccard), `clusters.parquet`, `passages.parquet` or `weights.parquet`
    cost  signatures of new shards (100 MB/s a worker), then the text of possible copies

    A fold over the landings in order of arrival: what an earlier landing decided never changes.
    """
    shards = sorted(corpus.shards, key=lambda shard: shard.landing)
    folded = _folded(job, shards, settings)
    Corpus.write(job.files, corpus, _decisions(corpus, folded, settings), "dedup")
    _write(job, corpus, folded, settings)
    write_report(job, corpus, folded.table, folded.misses, settings)
    job.parts += [part for shard in shards if (part := shard.entry.part) not in job.parts]
    return Corpus(job.path)


@dataclass(frozen=True)
class Folded:
    """What the landings decided together; shards by their index in the corpus."""

    table: "pl.DataFrame"
    """What is dropped, or (paragraphs, passages) cut, or made lighter."""
    misses: "pl.DataFrame"
    """What was nearly dropped."""


def _folded(job: Job, shards: Sequence[Shard], settings: DedupConfig) -> Folded:
    import polars as pl

    if settings.mode == "off" or not shards:
        job.metrics |= {"shards": {"built": 0, "reused": 0}, "landings": {"built": 0, "reused": 0}}
        return Folded(empty_table(), empty_table())
    _warn_of_recall(job, settings)
    signed = _sign(job, shards, settings)
    of_shards = job.metrics["shards"]
    landings = _decide(job, signed, settings)
    reused = sum(part.is_reused for part in landings)
    job.metrics["shards"] = of_shards
    job.metrics["landings"] = {"built": len(landings) - reused, "reused": reused}
    for name in ("candidates", "pairs_checked"):
        job.metrics[name] = sum(part.metrics[name] for part in landings)
    match settings.mode:
        case "substring":
            names = (PASSAGES, None)
        case "soft":
            names = (WEIGHTS, None)
        case _:
            names = (DUPLICATES, NEAR_MISSES)
    found = [
        pl.concat([pl.read_parquet(p.files / name) for p in landings]) for name in names if name
    ]
    table, misses = found[0], found[1] if len(found) > 1 else empty_table()
    if settings.unit == "paragraph":
        table, misses = _by_row(table, signed), _by_row(misses, signed)
    return Folded(_by_index(table, shards), _by_index(misses, shards))


def _warn_of_recall(job: Job, settings: DedupConfig) -> None:
    recall = settings.recall(settings.threshold)
    if settings.mode == "near" and recall < LEAST_RECALL and settings.least_recall is None:
        bands, rows = settings.banding()
        job.log.warning(
            "%d bands of %d rows find only %.3f of the pairs at the threshold %s; "
            "use more bands or fewer band_rows, or set least_recall",
            bands,
            rows,
            recall,
            settings.threshold,
        )


def _sign(job: Job, shards: Sequence[Shard], settings: DedupConfig) -> list[SignedShard]:
    if settings.mode == "soft":  # reads the texts themselves
        job.metrics["shards"] = {"built": 0, "reused": 0}
        return [SignedShard(shard, shard.part_path) for shard in shards]
    fields = SIGNED_FIELDS[settings.mode]
    identity = settings.identity()
    of_settings = {"mode": settings.mode, **{name: identity[name] for name in fields}}
    if settings.unit == "paragraph":
        of_settings["min_paragraph_tokens"] = settings.min_paragraph_tokens
    frequencies = _frequencies(job, shards, settings) if settings.mode == "simhash" else None
    build = build_anchors if settings.mode == "substring" else build_signatures
    table = frequencies.files / FREQUENCIES if frequencies else None
    permutations = permutations_of(settings) if settings.mode == "near" else None
    more = () if settings.mode == "substring" else (table, permutations)
    items = [
        PartItem(
            identity={
                "shard": shard.entry.digest,
                "text": text_digest(shard),
                "settings": of_settings,
                "frequencies": frequencies.digest if frequencies else None,
            },
            arguments=(shard, settings, *more),
            label=shard.entry.name,
        )
        for shard in shards
    ]
    parts = fan_out(job, build, items, version=PARTS_VERSION)
    return [SignedShard(shard, part.files) for shard, part in zip(shards, parts, strict=True)]


def _frequencies(job: Job, shards: Sequence[Shard], settings: DedupConfig) -> Part | None:
    """In how many documents of the first landing a shingle is; later landings do not change it."""
    if settings.mode == "simhash" and settings.weights == "unit":
        return None
    first = [shard for shard in shards if shard.landing == shards[0].landing]
    item = PartItem(
        identity={
            "shards": [[shard.entry.digest, kept_digest(shard)] for shard in first],
            "shingles": [settings.shingles, settings.shingle_tokens],
        },
        arguments=(first, settings),
        label="frequencies of shingles",
    )
    return fan_out(job, build_frequencies, [item], version=PARTS_VERSION)[0]


def _decide(job: Job, signed: Sequence[SignedShard], settings: DedupConfig) -> list[Part]:
    """One part per landing, each addressed by everything up to it."""
    builds = {"substring": build_passages, "soft": build_weights}
    build = builds.get(settings.mode, build_landing)
    more: tuple[Path, ...] = ()
    if settings.mode == "soft":
        frequencies = _frequencies(job, [item.shard for item in signed], settings)
        assert frequencies is not None
        more = (frequencies.files / FREQUENCIES,)
    history = ""
    parts: list[Part] = []
    for landing in sorted({item.shard.landing for item in signed}):
        known = [item for item in signed if item.shard.landing <= landing]
        first_new = sum(item.shard.landing < landing for item in known)
        new = [[item.shard.entry.digest, kept_digest(item.shard)] for item in known[first_new:]]
        identity = {"after": history, "shards": new, "settings": settings.identity()}
        earlier = [part.files for part in parts]
        item = PartItem(
            identity=identity,
            arguments=(known, first_new, earlier, settings, *more),
            label=f"landing {landing}",
        )
        parts += fan_out(job, build, [item], version=PARTS_VERSION)
        history = fingerprint(identity)
    return parts


def _by_row(table: "pl.DataFrame", signed: Sequence[SignedShard]) -> "pl.DataFrame":
    """A table of paragraphs with their rows in place of their numbers, and what to cut."""
    import polars as pl

    units = pl.concat(
        [
            pl.read_parquet(item.signed / UNITS)
            .with_row_index("unit")
            .with_columns(pl.lit(place, pl.UInt32).alias("shard"))
            for place, item in enumerate(signed)
        ]
    )
    own = units.rename({"row": "own_row"})
    of = units.select(of_shard="shard", of_row="unit", of_own_row="row")
    return (
        table.join(own, left_on=["shard", "row"], right_on=["shard", "unit"], maintain_order="left")
        .join(of, on=["of_shard", "of_row"], maintain_order="left")
        .drop("row", "of_row")
        .rename({"own_row": "row", "of_own_row": "of_row"})
        .with_columns(pl.col("start", "end").cast(pl.UInt32))
    )


def _by_index(table: "pl.DataFrame", shards: Sequence[Shard]) -> "pl.DataFrame":
    """The table with shards named as the corpus names them, in that order."""
    import polars as pl

    index_of = pl.Series([shard.index for shard in shards], dtype=pl.UInt32)
    return table.with_columns(
        index_of.gather(table["shard"]).alias("shard"),
        index_of.gather(table["of_shard"]).alias("of_shard"),
    ).sort("shard", "row", maintain_order=True)


def _decisions(corpus: Corpus, folded: Folded, settings: DedupConfig) -> "list[pl.DataFrame]":
    import polars as pl

    decide = _cut if "start" in folded.table.columns else _dropped
    of_shard = [folded.table.filter(pl.col("shard") == shard.index) for shard in corpus.shards]
    return [decide(*item, settings) for item in zip(corpus.shards, of_shard, strict=True)]


def _dropped(shard: Shard, table: "pl.DataFrame", settings: DedupConfig) -> "pl.DataFrame":
    """Row by row: whether it stays, and why not."""
    import polars as pl

    rows = pl.DataFrame({"row": range(shard.rows)}, schema={"row": pl.UInt32})
    if settings.mode == "soft" and "is_kept" in table.columns:
        reasons = table.filter(~pl.col("is_kept")).select("row", reason=pl.lit("soft_duplicate"))
    else:
        reasons = table.select("row", reason=pl.col("kind") + "_duplicate")
    return rows.join(reasons, on="row", how="left", maintain_order="left").select(
        pl.col("reason").is_null().alias("keep"), "reason"
    )


def _cut(shard: Shard, table: "pl.DataFrame", settings: DedupConfig) -> "pl.DataFrame":
    """Row by row: what is cut, in characters of the shard's text; dropped where too little is left."""
    import polars as pl

    reason = "repeated_passages" if settings.mode == "substring" else "repeated_paragraphs"
    texts = shard.read(["text"], kept_only=False)["text"] if table.height else pl.Series([""])
    keep = [True] * shard.rows
    reasons: list[str | None] = [None] * shard.rows
    cuts: list[list[dict[str, int]]] = [[] for _ in range(shard.rows)]
    for (row,), spans in table.group_by("row", maintain_order=True):
        place = int(str(row))
        of_row = joined_spans(spans.select("start", "end").sort("start").to_dicts())
        left = without_spans(str(texts[place]), of_row).strip()
        if len(left) < max(1, settings.min_left_chars):
            keep[place], reasons[place] = False, reason
        else:
            cuts[place] = of_row
    if shard.has_cuts:
        cuts = list(shard.uncut_spans(dict(enumerate(cuts))).values())
    frame = pl.DataFrame(
        {"keep": keep, "reason": reasons}, schema={"keep": pl.Boolean, "reason": pl.String}
    )
    spans = pl.List(pl.Struct({"start": pl.UInt32, "end": pl.UInt32}))
    return frame.with_columns(pl.Series("cuts", cuts, dtype=spans))


def _write(job: Job, corpus: Corpus, folded: Folded, settings: DedupConfig) -> None:
    """The tables for people and for later work."""
    match settings.mode:
        case "substring":
            name = PASSAGES
        case "soft":
            name = WEIGHTS
        case _:
            name = DUPLICATES
    folded.table.write_parquet(job.files / name, compression="zstd")
    if settings.unit == "document" and "jaccard" in folded.table.columns:
        clusters = _clusters(corpus, folded.table)
        clusters.write_parquet(job.files / CLUSTERS, compression="zstd")


def _clusters(corpus: Corpus, table: "pl.DataFrame") -> "pl.DataFrame":
    """Every document that has a copy or is one: where and which (doc_id), its cluster, whether it is kept, and
    what it was matched with, how closely. A cluster is one kept document and what was dropped for it."""
    import polars as pl

    ids = pl.concat(
        [
            pl.DataFrame(schema={"shard": pl.UInt32, "row": pl.UInt32, "doc_id": pl.UInt64}),
            *(f.select("shard", "row", "doc_id") for f in corpus.scan(["doc_id"], kept_only=False)),
        ]
    )
    kept = table.select(shard="of_shard", row="of_row").unique().sort("shard", "row")
    kept = kept.with_row_index("cluster").with_columns(is_kept=True)
    numbers = kept.select("cluster", of_shard="shard", of_row="row")
    of_ids = ids.rename({"shard": "of_shard", "row": "of_row", "doc_id": "matched_doc_id"})
    dropped = table.join(numbers, on=["of_shard", "of_row"]).join(of_ids, on=["of_shard", "of_row"])
    rows = pl.concat([kept, dropped.with_columns(is_kept=False)], how="diagonal_relaxed")
    columns = ("cluster", "shard", "row", "doc_id", "is_kept", "kind", "matched_doc_id", "jaccard")
    return (
        rows.join(ids, on=["shard", "row"], how="left")
        .sort("cluster", "is_kept", "shard", "row", descending=[False, True, False, False])
        .select(column for column in columns if column in (*rows.columns, "doc_id"))
    )
