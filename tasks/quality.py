"""Scores of documents by models trained from samples: perplexity, a linear classifier, a user's rule.

Models are one part, scores one part per shard; both are addressed by what they were made from, so that
another quantile costs neither again.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.filter import FilterConfig
from storage.corpus import Corpus, Shard
from storage.own_code import own_function
from storage.source import Source, SourceFile
from tasks.fanout import Part, PartItem, fan_out
from tasks.kept_rows import text_digest
from tasks.raw_record import RawRecord
from tasks.records import read_records
from tasks.stage import Job
from tasks.text_statistics import batches, buffers

if TYPE_CHECKING:
    import numpy as np
    import polars as pl
    from numpy.typing import NDArray

SCORES = "scores.parquet"
COUNTS = ("singles", "pairs", "triples")
WEIGHTS = "weights"
BOUNDS = "quality_bounds.json"
"""In `files/`: per language the bounds in force, kept so that an extension reuses them."""
VERSION = 2
SAMPLE_CHARS = 20_000
"""So much of the beginning of a sample is learnt from."""
MAX_SAMPLE_PAGE_BYTES = 1 << 20
DIGITS = 6
PERPLEXITY, QUALITY, OWN = "perplexity_tail", "low_quality", "own_rule"
"""Names of the rules."""


def quality_parts(job: Job, shards: Sequence[Shard], settings: FilterConfig) -> list[Part]:
    """A part of scores per shard; none where no setting asks for scores."""
    good, bad, own = (
        job.sources.get(n, Source()) for n in ("good_texts", "bad_texts", "own_rules")
    )
    if not (settings.good_texts or settings.own_rules):
        return []
    trained = _trained(job, good, bad) if settings.good_texts else None
    return fan_out(
        job,
        build_scores,
        [
            PartItem(
                identity={
                    "text": shard.entry.digest,
                    "cuts": text_digest(shard),
                    "models": trained.digest if trained else None,
                    "own": own.identity(),
                },
                arguments=(shard, trained and trained.files, list(own.files)),
                label=f"scores of {shard.entry.name}",
            )
            for shard in shards
        ],
        version=VERSION,
    )


def _trained(job: Job, good: Source, bad: Source) -> Part:
    item = PartItem(
        identity={
            "good": good.identity(),
            "bad": bad.identity(),
            "fields": [[file.spec.text for file in source.files] for source in (good, bad)],
        },
        arguments=(list(good.files), list(bad.files)),
        label="models of good and bad texts",
    )
    return fan_out(job, build_models, [item], version=VERSION)[0]


def build_models(
    files: Path, good: Sequence[SourceFile], bad: Sequence[SourceFile]
) -> dict[str, Any]:
    """Count the words of good texts and, where there are bad ones, train a classifier; as `.npy` files.

    Raises ValueError for a sample without any text.
    """
    import numpy as np

    from tasks.kernels import word_models as kernel

    files.mkdir(parents=True, exist_ok=True)
    good_texts = _samples(good, "good_texts")
    bits = (kernel.SINGLE_BITS, kernel.PAIR_BITS, kernel.TRIPLE_BITS)
    counts = [np.zeros(1 << size, np.uint32) for size in bits]
    kernel.count_words(*_arrow(good_texts), *counts)
    for name, array in zip(COUNTS, counts, strict=True):
        np.save(files / f"{name}.npy", array, allow_pickle=False)
    figures: dict[str, Any] = {"good": len(good_texts), "bad": 0}
    if bad:
        bad_texts = _samples(bad, "bad_texts")
        np.save(files / f"{WEIGHTS}.npy", classifier(good_texts, bad_texts), allow_pickle=False)
        figures["bad"] = len(bad_texts)
    return figures


def classifier(good: Sequence[str], bad: Sequence[str]) -> "NDArray[np.float32]":
    """Weights of a classifier that tells good texts (log-odds above 0) from bad ones.

    The rarer kind is repeated until both are as many: the bias is that of equal odds.
    """
    import numpy as np

    from tasks.kernels import word_models as kernel

    labels = np.repeat(np.array([1.0, 0.0]), (len(good), len(bad)))
    most = max(len(good), len(bad))
    rows = np.concatenate(
        [np.resize(np.arange(len(good)), most), len(good) + np.resize(np.arange(len(bad)), most)]
    )
    rng = np.random.default_rng(0)
    orders = np.stack([rng.permutation(rows) for _ in range(kernel.EPOCHS)])
    weights = np.zeros((1 << kernel.FEATURE_BITS) + 1, np.float32)
    kernel.train(*_arrow([*good, *bad]), labels, orders, weights)
    return weights


def build_scores(
    files: Path, shard: Shard, models: Path | None, own: Sequence[SourceFile]
) -> dict[str, Any]:
    """Write `scores.parquet`, one row per document: `perplexity` (bits per word), `quality` (log-odds),
    `is_dropped_by_own`; null where there is no model, and for a text without words."""
    import polars as pl

    files.mkdir(parents=True, exist_ok=True)
    frames = [_scored(text, models) for text, _ in batches(shard)]
    frame = pl.concat(frames)
    judgements = _own_judgements(shard, own) if own else None
    frame = frame.with_columns(pl.Series("is_dropped_by_own", judgements, dtype=pl.Boolean)) if (
        judgements is not None
    ) else frame.with_columns(is_dropped_by_own=pl.lit(None, dtype=pl.Boolean))  # fmt: skip
    frame.write_parquet(files / SCORES, compression="zstd")
    return {"rows": frame.height}


def _scored(text: Any, models: Path | None) -> "pl.DataFrame":
    import numpy as np
    import polars as pl

    from tasks.kernels import word_models as kernel

    scores = {name: np.full(len(text), np.nan, np.float32) for name in ("perplexity", "quality")}
    if models is not None:
        content, offsets = buffers(text)
        singles, pairs, triples = (np.load(models / f"{name}.npy") for name in COUNTS)
        kernel.bits_per_word(content, offsets, singles, pairs, triples, scores["perplexity"])
        if (path := models / f"{WEIGHTS}.npy").exists():
            kernel.margins(content, offsets, np.load(path), scores["quality"])
    return pl.DataFrame(scores).fill_nan(None)


def _own_judgements(shard: Shard, own: Sequence[SourceFile]) -> list[bool]:
    rules: list[Callable[[dict[str, Any]], bool]] = []
    for file in own:
        with file.fetched() as path:
            rules.append(own_rule(path))
    columns = ["url", "source", "domain", "language", "n_chars", "text"]
    documents = shard.read(columns, kept_only=False).iter_rows(named=True)
    return [any(rule(document) for rule in rules) for document in documents]


def own_rule(path: Path) -> Callable[[dict[str, Any]], bool]:
    """The function `drops(document)` of a user's file.

    Raises ValueError where the file has none.
    """
    return own_function(path, "drops")


def _samples(files: Sequence[SourceFile], setting: str) -> list[str]:
    texts = [
        record.text[:SAMPLE_CHARS] for file in files for record in _records(file) if record.text
    ]
    if not texts:
        raise ValueError(
            f"filter: `{setting}` holds no text; name files of documents (text, or rows with the field "
            "that `text` names)"
        )
    return texts


def _records(file: SourceFile) -> Iterator[RawRecord]:
    records = read_records(
        file,
        text_documents="blank_line",
        url_reason=lambda url: None,
        max_page_bytes=MAX_SAMPLE_PAGE_BYTES,
    )
    return (record for record in records if isinstance(record, RawRecord))


def _arrow(texts: Sequence[str]) -> "tuple[NDArray[np.uint8], NDArray[np.int64]]":
    import pyarrow as pa

    clean = [text.encode("utf-8", "replace").decode("utf-8") for text in texts]
    return buffers(pa.array(clean, pa.large_string()))


# Bounds


def read_scores(part: Part) -> "pl.DataFrame":
    """The scores of a shard, row by row."""
    import polars as pl

    return pl.read_parquet(part.files / SCORES)


def bounds_of(
    scores: "Sequence[pl.DataFrame]", settings: FilterConfig, pinned: Corpus | None
) -> "pl.DataFrame":
    """Per language the greatest `perplexity` and the least `quality` that are kept; null: no bound.

    The frames hold `language`, `perplexity` and `quality` of every document that came in. Bounds of an
    earlier result stay; its unknown languages get their own.
    """
    import polars as pl

    schema = {"language": pl.String, "perplexity": pl.Float32, "quality": pl.Float32}
    drop_tail, drop_low = settings.drop_perplexity, settings.drop_quality
    fresh = (
        pl.concat([pl.DataFrame(schema=schema), *scores])
        .group_by("language")
        .agg(
            max_perplexity=pl.col("perplexity")
            .quantile(1 - drop_tail)
            .cast(pl.Float64)
            .round(DIGITS)
            if drop_tail
            else pl.lit(None, dtype=pl.Float64),
            min_quality=pl.col("quality").quantile(drop_low).cast(pl.Float64).round(DIGITS)
            if drop_low
            else pl.lit(None, dtype=pl.Float64),
        )
        .sort("language")
    )
    if pinned is None or not (path := pinned.files / BOUNDS).is_file():
        return fresh
    known = pl.DataFrame(json.loads(path.read_text("utf-8")), schema=fresh.schema)
    return pl.concat([known, fresh.join(known, on="language", how="anti")]).sort("language")


def write_bounds(files: Path, bounds: "pl.DataFrame") -> None:
    """Write the bounds beside the corpus."""
    (files / BOUNDS).write_text(
        json.dumps(bounds.to_dicts(), ensure_ascii=False, indent=1) + "\n", "utf-8"
    )


def by_source(frames: "Sequence[pl.DataFrame]") -> list[dict[str, Any]]:
    """Figures of every language and source: documents, median scores, and the share of each third of
    its language's perplexity (head, middle, tail)."""
    import polars as pl

    frame = pl.concat(frames)
    value = pl.col("perplexity")
    thirds = frame.with_columns(
        third=pl.when(value <= value.quantile(1 / 3).over("language"))
        .then(pl.lit("head"))
        .when(value <= value.quantile(2 / 3).over("language"))
        .then(pl.lit("middle"))
        .when(value.is_not_null())
        .then(pl.lit("tail"))
    )
    return (
        thirds.group_by("language", "source")
        .agg(
            documents=pl.len(),
            perplexity=value.median(),
            quality=pl.col("quality").median(),
            **{name: (pl.col("third") == name).mean() for name in ("head", "middle", "tail")},
        )
        .sort("language", "source")
        .with_columns(pl.selectors.float().round(4))
        .to_dicts()
    )
