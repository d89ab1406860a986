"""Figures and examples of what dedup found."""

import functools
import json
from typing import TYPE_CHECKING, Any

from conf.dedup import DedupConfig
from storage.corpus import Corpus
from tasks.stage import Job

if TYPE_CHECKING:
    import polars as pl

EXAMPLES = 10
EXAMPLE_CHARS = 400


def write_report(
    job: Job, corpus: Corpus, table: "pl.DataFrame", misses: "pl.DataFrame", settings: DedupConfig
) -> None:
    """Put figures, the table by domain and `logs/examples.json` on the job; its files are written."""
    rows = [_domain_row(*item) for item in _by_domain(corpus, Corpus(job.path))]

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


def _by_domain(corpus: Corpus, result: Corpus) -> "list[tuple[str, pl.DataFrame]]":
    """Per domain what came in, one row a document, with the `reason` it was dropped for (or null)."""
    import polars as pl

    frames: list[pl.DataFrame] = []
    for before, after in zip(corpus.shards, result.shards, strict=True):
        frame = before.read(["domain", "n_chars"])
        decisions = after.decisions()[frame["row"]]
        cut = pl.lit(0, pl.Int64)
        if "cuts" in decisions.columns:
            span = pl.element().struct.field("end") - pl.element().struct.field("start")
            cut = decisions.select(pl.col("cuts").list.eval(span).list.sum())["cuts"].cast(pl.Int64)
        frames.append(frame.with_columns(decisions["reason"], cut=cut))
    if not frames:
        return []
    groups = pl.concat(frames).group_by("domain")
    return sorted((str(name), frame) for (name,), frame in groups)


def _domain_row(domain: str, documents: "pl.DataFrame") -> dict[str, Any]:
    kept = documents.filter(documents["reason"].is_null())
    reasons = documents["reason"]
    return {
        "domain": domain,
        "documents": documents.height,
        "exact": int((reasons == "exact_duplicate").sum()),
        "near": int((reasons == "near_duplicate").sum()),
        "cut": int((kept["cut"] > 0).sum()),
        "dropped": documents.height - kept.height,
        "kept": kept.height,
        "chars_in": int(documents["n_chars"].sum()),
        "chars_kept": int(kept["n_chars"].sum()) - int(kept["cut"].sum()),
    }


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

    @functools.lru_cache(maxsize=1)
    def texts(shard: int) -> "pl.Series":
        return shards[shard].read(["text"], kept_only=False)["text"]

    shown = pairs.head(EXAMPLES)
    # As good, from fewer shards to read.
    inside = pairs.filter(pairs["shard"] == pairs["of_shard"])
    if inside.height >= EXAMPLES:
        most = inside["shard"].value_counts(sort=True)["shard"].head(2).implode()
        shown = inside.filter(inside["shard"].is_in(most)).head(EXAMPLES)
    beginnings = {
        (shard, row): str(texts(shard)[row])
        for shard, row in sorted(
            {*shown.select("shard", "row").rows(), *shown.select("of_shard", "of_row").rows()}
        )
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
