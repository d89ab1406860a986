"""How difficult every training document is, in numbers that curricula sort by.

A column is made shard by shard. The counts behind probabilities are those of the first landing, as the
tokenizer's are: data that come later are measured by them and change no value of what was there.
"""

import logging
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.tokenize import Difficulty, TokenizeConfig
from storage.corpus import Shard
from storage.tokens import END, TOKEN, TokensMeta, difficulty_path, end_path, token_path
from tasks.fanout import Part, PartItem, fan_out
from tasks.shard_batches import kept_batches
from tasks.stage import Job

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Tokens = tuple[NDArray[np.unsignedinteger[Any]], NDArray[np.uint64]]

VERSION = 1
MODEL = "counts.npz"
TABLES = ("singles", "contexts", "pairs", "pair_contexts", "triples")
BY_COUNTS: tuple[Difficulty, ...] = ("unigram", "bigram", "trigram", "rarity")
"""In the order in which the kernel writes them."""
TAGGED_CHARS = 2_000


def write_difficulty(
    job: Job,
    shards: Sequence[Shard],
    tokens: Sequence[Part],
    meta: TokensMeta,
    settings: TokenizeConfig,
) -> None:
    """Write the columns that the settings name; `tokens` are the shards' token files.

    Cost: 14 M tokens/s to count and 9 M to measure, a worker; `tag_diversity` 60 KB of Chinese text/s.
    """
    import numpy as np

    if not settings.difficulty:
        return
    of_tokens = job.metrics["shards"]
    model = _counted(job, shards, tokens, meta) if {*BY_COUNTS} & {*settings.difficulty} else None
    items = [
        PartItem(
            identity={
                "tokens": part.digest,
                "shard": shard.entry.digest,
                "model": model and model.digest,
                "columns": list(settings.difficulty),
            },
            arguments=(shard, part, model and model.files, meta, settings.difficulty),
            label=f"difficulty of {shard.entry.name}",
        )
        for shard, part in zip(shards, tokens, strict=True)
    ]
    parts = fan_out(job, build_columns, items, version=VERSION)
    job.metrics["shards"] = of_tokens
    for domain in meta.domains:
        for column in settings.difficulty:
            paths = [difficulty_path(part.files, domain, column) for part in parts]
            values = [np.load(path) for path in paths if path.exists()]
            whole = np.concatenate([np.zeros(0, np.float32), *values])
            if column == "source_order":
                whole = np.arange(len(whole), dtype=np.float32) / np.float32(max(1, len(whole)))
            np.save(difficulty_path(job.files, domain, column), whole)


def _counted(job: Job, shards: Sequence[Shard], tokens: Sequence[Part], meta: TokensMeta) -> Part:
    first = min((shard.landing for shard in shards), default=0)
    chosen = [p for shard, p in zip(shards, tokens, strict=True) if shard.landing == first]
    item = PartItem(
        identity={"tokens": [part.digest for part in chosen]},
        arguments=(chosen, meta),
        label="counts of tokens",
    )
    return fan_out(job, build_counts, [item], version=VERSION)[0]


def build_counts(files: Path, tokens: Sequence[Part], meta: TokensMeta) -> dict[str, Any]:
    """Write the counts of the training tokens of some shards; 210 MB of memory, however many there are."""
    import numpy as np

    from tasks.kernels import token_models as kernel

    sizes = [meta.vocabulary] * 2 + [1 << kernel.PLACE_BITS] * 3
    tables = [np.zeros(size, np.uint32) for size in sizes]
    for part in tokens:
        for domain in _domains(part):
            kernel.count(*_read(part, domain, meta), meta.eos, *tables)
    with (files / MODEL).open("wb") as stream:
        np.savez_compressed(stream, **dict(zip(TABLES, tables, strict=True)))
    return {"tokens": int(tables[0].sum())}


def build_columns(
    files: Path,
    shard: Shard,
    tokens: Part,
    model: Path | None,
    meta: TokensMeta,
    columns: Sequence[Difficulty],
) -> dict[str, Any]:
    """Write `<domain>.train.<column>.npy` of one shard, for every column."""
    import numpy as np

    diversity = _tag_diversity(shard) if "tag_diversity" in columns else {}
    tables = _tables(model) if model else []
    for domain in _domains(tokens):
        ids, ends = _read(tokens, domain, meta)
        lengths = np.diff(ends, prepend=np.uint64(0)).astype(np.float32) - 1
        values = {
            "length": lengths,
            "source_order": lengths,
        }  # the order is known when all are joined
        if tables:
            values |= _surprise(ids, ends, meta, tables)
        if diversity:
            values["tag_diversity"] = np.array(diversity[domain], np.float32)
        for column in columns:
            np.save(difficulty_path(files, domain, column), values[column])
    return {"rows": shard.rows}


def _domains(part: Part) -> list[str]:
    return [name for name, splits in part.metrics["domains"].items() if "train" in splits]


def _read(part: Part, domain: str, meta: TokensMeta) -> "Tokens":
    """(tokens,) ids and (documents,) ends of a shard's training documents, mapped where there are any."""
    import numpy as np

    path = token_path(part.files, domain, "train")
    return (
        np.memmap(path, TOKEN[meta.dtype], "r"),
        np.fromfile(end_path(part.files, domain, "train"), END),
    )


def _tables(model: Path) -> "list[NDArray[np.uint32]]":
    import numpy as np

    with np.load(model / MODEL, allow_pickle=False) as arrays:
        return [arrays[name] for name in TABLES]


def _surprise(
    ids: "NDArray[Any]", ends: "NDArray[Any]", meta: TokensMeta, tables: "list[NDArray[np.uint32]]"
) -> "dict[str, NDArray[np.float32]]":
    import numpy as np

    from tasks.kernels import token_models as kernel

    found = np.empty((len(ends), len(BY_COUNTS)))
    kernel.surprise(ids, ends, meta.eos, found, *tables)
    return {name: found[:, k].astype(np.float32) for k, name in enumerate(BY_COUNTS)}


def _tag_diversity(shard: Shard) -> dict[str, list[float]]:
    """Per domain, for every training document in order: entropy of jieba's part-of-speech tags in nats."""
    import polars as pl

    found: dict[str, list[float]] = {}
    for frame in kept_batches(shard, ["domain", "split", "language", "text"]):
        rows = frame.filter(pl.col("split") == "train").select("domain", "language", "text")
        for domain, language, text in rows.iter_rows():
            value = tag_entropy(text[:TAGGED_CHARS]) if language == "zh" else 0.0
            found.setdefault(domain, []).append(value)
    return found


def tag_entropy(text: str) -> float:
    """Entropy in nats of the part-of-speech tags of a Chinese text's words; 0 for fewer than two kinds."""
    import jieba
    import jieba.posseg

    jieba.setLogLevel(logging.WARNING)
    tags = Counter(str(word.flag) for word in jieba.posseg.cut(text))
    shares = [count / tags.total() for count in tags.values()]
    return max(0.0, -sum(share * math.log(share) for share in shares))
