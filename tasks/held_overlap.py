"""Finds held-out documents that training documents give away, by their shared runs of words."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.dedup import DedupConfig
from storage.corpus import Corpus, Shard
from tasks.fanout import Part, PartItem, fan_out
from tasks.kept_rows import kept_digest
from tasks.signatures import shingle_sets, text_buffers
from tasks.stage import Job

if TYPE_CHECKING:
    import numpy as np
    import polars as pl
    from numpy.typing import NDArray

GRAMS = "held_grams.npz"
FOUND = "found.npz"
KNOWN = "held_grams.npy"
VERSION = 2


@dataclass(frozen=True)
class HeldGrams:
    """Distinct runs of words of all held-out documents."""

    values: "NDArray[Any]"
    ends: "NDArray[Any]"
    """Where each document's end among the values."""
    shards: "NDArray[Any]"
    rows: "NDArray[Any]"


def held_overlaps(job: Job, corpus: Corpus, *, words: int) -> "pl.DataFrame":
    """Every held-out document that shares a run of `words` words with training documents.

    shard, row, share (of its distinct runs), and of_shard, of_row: the training document that has the
    most of those found first. A shorter document counts as one run. Cost: one pass over the training text.
    """
    import numpy as np
    import polars as pl
    import xxhash

    shards = corpus.shards
    own = fan_out(
        job, build_held_grams, [_held_item(shard, words) for shard in shards], version=VERSION
    )
    held = _joined(own)
    known = np.unique(held.values)
    job.state.mkdir(parents=True, exist_ok=True)
    np.save(job.state / KNOWN, known)
    digest = xxhash.xxh3_128_hexdigest(known.tobytes())
    items = [
        PartItem(
            identity={**_identity(shard, words), "held": digest},
            arguments=(shard, words, job.state / KNOWN),
            label=f"held-out text in {shard.entry.name}",
        )
        for shard in shards
    ]
    found = fan_out(job, build_found, items, version=VERSION)
    where = _first_places(found, len(known))
    rows = [
        _overlap(held, number, where[np.searchsorted(known, held.values[begin:end])])
        for number, (begin, end) in enumerate(zip([0, *held.ends[:-1]], held.ends, strict=True))
    ]
    columns = ("shard", "row", "share", "of_shard", "of_row")
    schema = {name: pl.Float64 if name == "share" else pl.UInt32 for name in columns}
    return pl.DataFrame([row for row in rows if row], schema=schema, orient="row")


def _identity(shard: Shard, words: int) -> dict[str, Any]:
    return {"shard": shard.entry.digest, "kept": kept_digest(shard), "words": words}


def _held_item(shard: Shard, words: int) -> PartItem:
    label = f"held-out text of {shard.entry.name}"
    return PartItem(identity=_identity(shard, words), arguments=(shard, words), label=label)


def _side(shard: Shard, *, is_held: bool) -> "pl.DataFrame":
    import polars as pl

    return shard.read(["text", "split"]).filter((pl.col("split") == "held") == is_held)


def build_held_grams(files: Path, shard: Shard, words: int) -> dict[str, Any]:
    """Write the runs of the shard's held-out documents that have any."""
    import numpy as np

    frame = _side(shard, is_held=True)
    values, ends = shingle_sets(frame["text"], DedupConfig(shingle_tokens=words))
    with (files / GRAMS).open("wb") as stream:
        np.savez(stream, values=values, ends=ends, rows=frame["row"].to_numpy().astype(np.int64))
    return {"documents": frame.height, "runs": len(values)}


def build_found(files: Path, shard: Shard, words: int, known: Path) -> dict[str, Any]:
    """Write which of the known runs the shard's training documents have, and the first row with each."""
    import numpy as np

    from tasks.kernels import overlap

    keys = np.load(known)
    room = 1 << max(4, int(2 * len(keys)).bit_length())
    table, numbers = np.zeros(room, np.uint64), np.zeros(room, np.int32)
    overlap.fill(table, numbers, keys, np.arange(len(keys), dtype=np.int32))
    frame = _side(shard, is_held=False)
    first = np.full(len(keys), -1, np.int64)
    overlap.first_rows(*text_buffers(frame["text"]), words, table, numbers, first)
    found = np.flatnonzero(first >= 0)
    rows = frame["row"].to_numpy().astype(np.int64)[first[found]]
    with (files / FOUND).open("wb") as stream:
        np.savez(stream, found=found, rows=rows)
    return {"documents": frame.height, "found": len(found)}


def _joined(parts: Sequence[Part]) -> HeldGrams:
    import numpy as np

    values, ends, shards, rows = [np.zeros(0, np.uint64)], *([np.zeros(0, np.int64)] for _ in "123")
    total = 0
    for number, part in enumerate(parts):
        with np.load(part.files / GRAMS, allow_pickle=False) as arrays:
            values.append(arrays["values"])
            ends.append(arrays["ends"] + total)
            rows.append(arrays["rows"])
        shards.append(np.full(len(rows[-1]), number, np.int64))
        total += len(values[-1])
    return HeldGrams(*(np.concatenate(column) for column in (values, ends, shards, rows)))


def _first_places(parts: Sequence[Part], count: int) -> "NDArray[np.int64]":
    """(runs, 2) shard and row of the first training document with each run; -1 where there is none."""
    import numpy as np

    where = np.full((count, 2), -1, np.int64)
    for number, part in reversed(list(enumerate(parts))):
        with np.load(part.files / FOUND, allow_pickle=False) as arrays:
            where[arrays["found"], 0] = number
            where[arrays["found"], 1] = arrays["rows"]
    return where


def _overlap(held: HeldGrams, number: int, where: "NDArray[np.int64]") -> tuple[Any, ...] | None:
    import numpy as np

    found = where[where[:, 0] >= 0]
    if not len(found):
        return None
    places, counts = np.unique(found, axis=0, return_counts=True)
    of_shard, of_row = places[counts.argmax()].tolist()
    own = (int(held.shards[number]), int(held.rows[number]))
    return (*own, len(found) / len(where), of_shard, of_row)
