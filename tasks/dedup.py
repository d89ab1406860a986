"""dedup: keep one document of every kind."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from conf.dedup import DedupConfig
from storage.corpus import Corpus, Shard
from storage.identity import fingerprint
from tasks.fanout import Part, PartItem, fan_out
from tasks.kept_rows import kept_digest, text_digest
from tasks.near_duplicates import (
    DUPLICATES,
    NEAR_MISSES,
    SignedShard,
    build_landing,
    build_signatures,
    empty_table,
)
from tasks.stage import Job, stage

if TYPE_CHECKING:
    import polars as pl

LEAST_RECALL = 0.95
EXAMPLES = 10
EXAMPLE_CHARS = 400


@stage(version=1)
def dedup(job: Job, corpus: Corpus, settings: DedupConfig) -> Corpus:
    """Keep one document of every group of copies: the earliest by landing, shard and row.

    reads Corpus   writes Corpus and `duplicates.parquet` (shard, row, kind, of_shard, of_row, jaccard)
    cost  signatures of new shards (100 MB/s a worker), then the text of possible copies

    A fold over the landings in order of arrival: what an earlier landing decided never changes.
    """
    shards = sorted(corpus.shards, key=lambda shard: shard.landing)
    table, misses = (_by_index(found, shards) for found in _folded(job, shards, settings))
    _write(job, corpus, table)
    _report(job, corpus, table, misses, settings)
    job.parts += [part for shard in shards if (part := shard.entry.part) not in job.parts]
    return Corpus(job.path)


def _folded(
    job: Job, shards: Sequence[Shard], settings: DedupConfig
) -> "tuple[pl.DataFrame, pl.DataFrame]":
    """What is dropped and what was nearly dropped, over all landings; shards by their place in order."""
    import polars as pl

    if settings.mode == "off" or not shards:
        job.metrics |= {"shards": {"built": 0, "reused": 0}, "landings": {"built": 0, "reused": 0}}
        return empty_table(), empty_table()
    if settings.mode == "near" and (recall := settings.recall(settings.threshold)) < LEAST_RECALL:
        job.log.warning(
            "%d bands of %d rows find only %.3f of the pairs at the threshold %s; "
            "use more bands or fewer band_rows",
            settings.bands,
            settings.band_rows,
            recall,
            settings.threshold,
        )
    signed = _sign(job, shards, settings)
    of_shards = job.metrics["shards"]
    landings = _decide(job, signed, settings)
    reused = sum(part.is_reused for part in landings)
    job.metrics["shards"] = of_shards
    job.metrics["landings"] = {"built": len(landings) - reused, "reused": reused}
    for name in ("candidates", "pairs_checked"):
        job.metrics[name] = sum(part.metrics[name] for part in landings)
    return (
        pl.concat([pl.read_parquet(part.files / DUPLICATES) for part in landings]),
        pl.concat([pl.read_parquet(part.files / NEAR_MISSES) for part in landings]),
    )


def _sign(job: Job, shards: Sequence[Shard], settings: DedupConfig) -> list[SignedShard]:
    # Of the settings only those that a signature depends on: another threshold signs nothing anew.
    fields = {"mode", "shingle_tokens", "bands", "band_rows", "permutation_seed"}
    of_settings = {name: value for name, value in settings.identity().items() if name in fields}
    items = [
        PartItem(
            identity={
                "shard": shard.entry.digest,
                "text": text_digest(shard),
                "settings": of_settings,
            },
            arguments=(shard, settings),
            label=shard.entry.name,
        )
        for shard in shards
    ]
    parts = fan_out(job, build_signatures, items)
    return [SignedShard(shard, part.files) for shard, part in zip(shards, parts, strict=True)]


def _decide(job: Job, signed: Sequence[SignedShard], settings: DedupConfig) -> list[Part]:
    """One part per landing, each addressed by everything up to it."""
    landings = sorted({item.shard.landing for item in signed})
    history = ""
    parts: list[Part] = []
    for landing in landings:
        known = [item for item in signed if item.shard.landing <= landing]
        first_new = sum(item.shard.landing < landing for item in known)
        new = [[item.shard.entry.digest, kept_digest(item.shard)] for item in known[first_new:]]
        identity = {"after": history, "shards": new, "settings": settings.identity()}
        earlier = [part.files for part in parts]
        parts += fan_out(
            job,
            build_landing,
            [
                PartItem(
                    identity=identity,
                    arguments=(known, first_new, earlier, settings),
                    label=f"landing {landing}",
                )
            ],
        )
        history = fingerprint(identity)
    return parts


def _by_index(table: "pl.DataFrame", shards: Sequence[Shard]) -> "pl.DataFrame":
    """The table with shards named as the corpus names them, in that order."""
    import polars as pl

    index_of = pl.Series([shard.index for shard in shards], dtype=pl.UInt32)
    return table.with_columns(
        index_of.gather(table["shard"]).alias("shard"),
        index_of.gather(table["of_shard"]).alias("of_shard"),
    )


def _write(job: Job, corpus: Corpus, table: "pl.DataFrame") -> None:
    import polars as pl

    decisions = [
        _decisions(shard, table.filter(pl.col("shard") == shard.index)) for shard in corpus.shards
    ]
    Corpus.write(job.files, corpus, decisions, "dedup")
    table.sort("shard", "row").write_parquet(job.files / DUPLICATES, compression="zstd")


def _decisions(shard: Shard, dropped: "pl.DataFrame") -> "pl.DataFrame":
    """Row by row: whether it stays, and why not."""
    import polars as pl

    rows = pl.DataFrame({"row": range(shard.rows)}, schema={"row": pl.UInt32})
    reasons = dropped.select("row", reason=pl.col("kind") + "_duplicate")
    return rows.join(reasons, on="row", how="left", maintain_order="left").select(
        pl.col("reason").is_null().alias("keep"), "reason"
    )


def _report(
    job: Job, corpus: Corpus, table: "pl.DataFrame", misses: "pl.DataFrame", settings: DedupConfig
) -> None:
    import polars as pl

    rows = [_domain_row(name, frame) for name, frame in _by_domain(corpus, table)]
    kinds = dict.fromkeys(("exact", "near"), 0) | dict(table["kind"].value_counts().iter_rows())
    documents = sum(row["documents"] for row in rows)
    job.metrics |= {
        "documents": {"in": documents, "kept": documents - table.height},
        "duplicates": kinds,
        "groups": table.select("of_shard", "of_row").n_unique(),
        "chars": {name: sum(row[f"chars_{name}"] for row in rows) for name in ("in", "kept")},
        "recall_at_threshold": round(settings.recall(settings.threshold), 5),
    }
    job.tables["duplicates"] = rows
    examples = {
        "duplicates": _examples(corpus, table.gather_every(max(1, table.height // EXAMPLES))),
        "near_misses": _examples(corpus, misses.sort(pl.col("jaccard"), descending=True)),
    }
    job.logs.mkdir(parents=True, exist_ok=True)
    content = json.dumps(examples, ensure_ascii=False, indent=1)
    (job.logs / "examples.json").write_text(content + "\n", "utf-8")


def _by_domain(corpus: Corpus, table: "pl.DataFrame") -> "list[tuple[str, pl.DataFrame]]":
    """Per domain what came in, one row a document, with the `kind` of copy it is (or null)."""
    import polars as pl

    kinds = table.select("shard", "row", "kind")
    frames = [
        frame.join(kinds, on=["shard", "row"], how="left")
        for frame in corpus.scan(["domain", "n_chars"])
    ]
    if not frames:
        return []
    groups = pl.concat(frames).group_by("domain")
    return sorted((str(name), frame) for (name,), frame in groups)


def _domain_row(domain: str, documents: "pl.DataFrame") -> dict[str, Any]:
    kept = documents.filter(documents["kind"].is_null())
    return {
        "domain": domain,
        "documents": documents.height,
        "exact": documents.filter(documents["kind"] == "exact").height,
        "near": documents.filter(documents["kind"] == "near").height,
        "kept": kept.height,
        "chars_in": int(documents["n_chars"].sum()),
        "chars_kept": int(kept["n_chars"].sum()),
    }


def _examples(corpus: Corpus, pairs: "pl.DataFrame") -> list[dict[str, Any]]:
    """Both texts of some pairs, their beginnings."""
    shards = corpus.shards

    def text(shard: int, row: int) -> str:
        texts = shards[shard].read(["text"], kept_only=False)["text"]
        return str(texts[row])[:EXAMPLE_CHARS]

    return [
        {
            **pair,
            "text": text(pair["shard"], pair["row"]),
            "of_text": text(pair["of_shard"], pair["of_row"]),
        }
        for pair in pairs.head(EXAMPLES).iter_rows(named=True)
    ]
