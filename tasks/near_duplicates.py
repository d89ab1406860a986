"""Finds copies: a fold over landings that keeps one of each kind.

A landing's decision is a part of the store. It depends on the landings before it and on nothing later,
so appended data never changes what was decided, and costs only itself. What is compared is a unit: a
document, or a paragraph; tables here name a unit by its shard's place in the order of landings and its own
place in that shard's signatures (for documents: the row).

Source: Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, section 3.4 (banding).
"""

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.dedup import DedupConfig
from storage.corpus import Shard
from tasks.copy_table import DUPLICATES, NEAR_MISSES, empty_table, schema, with_kept_partners
from tasks.memory import Scratch
from tasks.signatures import (
    BANDS,
    SCORES,
    SHINGLES,
    SIGNATURES,
    TEXT_HASHES,
    UNITS,
    fill_shingle_sets,
    keys_of,
    shingle_sets,
    sign_texts,
    texts_of,
)
from tasks.text_statistics import batches

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import polars as pl

    from tasks.signatures import Texts

    Rows = npt.NDArray[np.int64]

NEAR_MISSES_KEPT = 100
ROWS_AT_ONCE = 1 << 16
UNITS_AT_ONCE = 1 << 20
ESTIMATE_SIGMAS = 6.0
"""Signatures that agree less than this far below the threshold are not compared exactly: about one
pair in a billion at the threshold is missed by it."""


@dataclass(frozen=True)
class SignedShard:
    """A shard and the part with its signatures."""

    shard: Shard
    signed: Path

    def rows(self) -> "Rows":
        """The row that every unit belongs to."""
        import numpy as np
        import polars as pl

        if not (self.signed / UNITS).exists():
            return np.arange(self.shard.rows, dtype=np.int64)
        return pl.read_parquet(self.signed / UNITS, columns=["row"])["row"].to_numpy().astype("i8")

    def texts(self, units: "Rows") -> "Iterator[Texts]":
        """The texts of some units, in order, some MB at a time (of paragraphs, all of them at once)."""
        import numpy as np
        import polars as pl

        if not (self.signed / UNITS).exists():
            start = 0
            for texts, _ in batches(self.shard):
                first, last = np.searchsorted(units, (start, start + len(texts)))
                yield texts.take(units[first:last] - start)
                start += len(texts)
            return
        spans = pl.read_parquet(self.signed / UNITS)[units]
        pieces = spans.with_columns(text=pl.Series(texts_of(self.shard)).gather(spans["row"]))
        piece = pl.col("text").str.slice("start", pl.col("end") - pl.col("start"))
        yield pieces.select(piece.str.strip_chars())["text"]


@dataclass(frozen=True)
class _Documents:
    """The units that a landing's decision is about, in order: all kept before, and the new ones."""

    shards: Sequence[SignedShard]
    starts: "Rows"
    """Position of each shard's first unit in the list of all units, and the end of the list."""
    positions: "Rows"
    owners: "Rows"
    """A number for the document that each belongs to."""
    is_new: "npt.NDArray[np.bool_]"

    def select(self, mask: "npt.NDArray[np.bool_]") -> "_Documents":
        return _Documents(
            self.shards, self.starts, self.positions[mask], self.owners[mask], self.is_new[mask]
        )

    def by_shard(self) -> "list[tuple[SignedShard, Rows]]":
        """Every shard with the units of it that are meant, empty ones too."""
        import numpy as np

        cuts = np.searchsorted(self.positions, self.starts)
        return [
            (shard, self.positions[cuts[i] : cuts[i + 1]] - self.starts[i])
            for i, shard in enumerate(self.shards)
        ]

    def gather(self, name: str, scratch: Scratch) -> "npt.NDArray[Any]":
        """One value (or row of values) per unit from the shards' sidecar `name`."""
        import numpy as np

        by_shard = [(_load(item.signed / name), rows) for item, rows in self.by_shard()]
        first = by_shard[0][0]
        values = scratch.empty((len(self.positions), *first.shape[1:]), first.dtype)
        ends = np.cumsum([len(rows) for _, rows in by_shard])
        for (of_shard, rows), end in zip(by_shard, ends, strict=True):
            for start in range(0, len(rows), ROWS_AT_ONCE):
                piece = rows[start : start + ROWS_AT_ONCE]
                at = int(end) - len(rows) + start
                values[at : at + len(piece)] = of_shard[piece]
        return values

    def bands(self) -> "Iterator[npt.NDArray[np.uint64]]":
        """The keys of one band after another: all at once would be most of what is in memory."""
        import numpy as np

        by_shard = [(_load(shard.signed / BANDS), rows) for shard, rows in self.by_shard()]
        for band in range(len(by_shard[0][0])):
            yield np.concatenate([keys[band][rows] for keys, rows in by_shard])

    def order(self, settings: DedupConfig, scratch: Scratch) -> "Rows":
        """Places in the order of choice: what was kept before, then the new ones, best first."""
        import numpy as np

        match settings.keep:
            case "first":
                return np.arange(len(self.positions))
            case "source":
                worse = np.concatenate([_source_ranks(*item, settings) for item in self.by_shard()])
            case _:
                worse = -self.gather(SCORES, scratch)
        return np.lexsort((self.positions, np.where(self.is_new, worse, 0), self.is_new))


def build_landing(
    files: Path,
    shards: Sequence[SignedShard],
    first_new: int,
    earlier: Sequence[Path],
    settings: DedupConfig,
) -> dict[str, Any]:
    """Decide on the shards from `first_new` on; `earlier` are the files of the landings before.

    Shards are in order of landing; a shard's place in that order names it in the tables. A unit is
    dropped if its text equals a kept one's, or if some kept one that comes before it is at least as similar
    as the threshold. There is no transitive closure: what is dropped always has a kept partner within the
    threshold, chains of small changes are not collapsed.
    """
    import polars as pl

    scratch = Scratch(files.parent, settings.memory_mb)
    documents = _documents_of(shards, first_new, earlier)
    exact, remaining = _exact_copies(documents, settings, scratch)
    near, misses, compared, candidates = empty_table(), empty_table(), 0, 0
    if settings.mode in ("near", "simhash"):
        near, misses, compared, candidates = _near_copies(remaining, settings, scratch)
        exact = with_kept_partners(exact, near)
    table = pl.concat([exact, near]).sort("shard", "row")
    table.write_parquet(files / DUPLICATES, compression="zstd")
    misses.write_parquet(files / NEAR_MISSES, compression="zstd")
    return {
        "units": int(documents.is_new.sum()),
        "exact": exact.height,
        "near": near.height,
        "candidates": candidates,
        "pairs_checked": compared,
    }


def copies_among(texts: "pl.Series", settings: DedupConfig) -> "list[int | None]":
    """For every text the place of the earlier kept one that it is a copy of, or None: it is kept.

    For texts that fit in memory, such as conversations, in the modes `near` and `exact`. Texts without a token
    are copies only of equal ones.
    """
    found: list[int | None] = [None] * len(texts)
    if settings.mode == "near" and len(texts):
        for place, of in _near_among(texts, settings):
            found[place] = of
    first: dict[str, int] = {}
    for place, text in enumerate(texts):
        original = first.setdefault(text, place)
        if original != place:
            kept = found[original]
            found[place] = original if kept is None else kept
    return found


def _near_among(texts: "pl.Series", settings: DedupConfig) -> "Iterator[tuple[int, int]]":
    import numpy as np

    signatures, shingles = sign_texts(texts, settings)
    places = np.flatnonzero(shingles >= settings.min_shingles)
    is_new = np.ones(len(places), np.bool_)
    buckets, bucket_count = _numbered(keys_of(signatures[places], settings), is_new)
    values, ends = shingle_sets(texts.gather(places), settings)
    sets = (values, np.concatenate([np.zeros(1, np.int64), ends])[: len(ends)], ends)
    is_dropped, nearest, _, _ = _choose(
        np.stack(buckets), bucket_count, ~is_new, places, signatures[places], sets, settings
    )
    for place in np.flatnonzero(is_dropped):
        yield int(places[place]), int(places[nearest[place]])


def _documents_of(
    shards: Sequence[SignedShard], first_new: int, earlier: Sequence[Path]
) -> _Documents:
    import numpy as np
    import polars as pl

    rows = [signed.rows() for signed in shards]
    starts = np.cumsum([0, *(len(of_shard) for of_shard in rows)])
    first_rows = np.cumsum([0, *(signed.shard.rows for signed in shards)])
    owners = np.concatenate([r + first for r, first in zip(rows, first_rows, strict=False)])
    is_kept = np.ones(starts[-1], np.bool_)
    for start, end, of_shard, signed in zip(starts, starts[1:], rows, shards, strict=False):
        if (keep := signed.shard.keep) is not None:
            is_kept[start:end] = keep.to_numpy()[of_shard]
    for folder in earlier:
        dropped = pl.read_parquet(folder / DUPLICATES, columns=["shard", "row"])
        is_kept[starts[dropped["shard"].to_numpy()] + dropped["row"].to_numpy()] = False
    positions = np.flatnonzero(is_kept)
    return _Documents(shards, starts, positions, owners[positions], positions >= starts[first_new])


def _source_ranks(
    signed: SignedShard, units: "Rows", settings: DedupConfig
) -> "npt.NDArray[np.int64]":
    import polars as pl

    rank = {name: place for place, name in enumerate(settings.source_order)}
    last = len(rank)
    columns = signed.shard.read(["source", "domain"], kept_only=False)
    ranks = [columns[name].replace_strict(rank, default=last) for name in ("source", "domain")]
    best = pl.DataFrame({"x": ranks[0], "y": ranks[1]}).min_horizontal()
    return best.cast(pl.Int64).to_numpy()[signed.rows()[units]]


def _exact_copies(
    documents: _Documents, settings: DedupConfig, scratch: Scratch
) -> "tuple[pl.DataFrame, _Documents]":
    """What equals another text of 128-bit hash; and the documents without it."""
    import numpy as np
    import polars as pl

    order = documents.order(settings, scratch)
    hashes = documents.gather(TEXT_HASHES, scratch)
    firsts = np.empty(len(order), np.int64)
    groups = hashes[:, 0] % np.uint64(1 + len(order) // UNITS_AT_ONCE)
    for group in range(1 + len(order) // UNITS_AT_ONCE):
        places = np.flatnonzero(groups[order] == group)
        of_group = hashes[order[places]]
        firsts[places] = (
            pl.DataFrame({"low": of_group[:, 0], "high": of_group[:, 1], "place": places})
            .select(pl.col("place").min().over("low", "high"))["place"]
            .to_numpy()
        )
    original = np.empty(len(order), np.int64)
    original[order] = order[firsts]
    # A paragraph that its own document repeats is not a copy across documents.
    is_copy = documents.owners[original] != documents.owners
    copies = np.flatnonzero(is_copy)
    table = _table(documents, copies, original[is_copy], np.ones(len(copies)), "exact")
    return table, documents.select(~is_copy)


def _near_copies(
    documents: _Documents, settings: DedupConfig, scratch: Scratch
) -> "tuple[pl.DataFrame, pl.DataFrame, int, int]":
    """What is dropped, what was nearly dropped, pairs compared, documents with a possible partner."""
    import numpy as np

    documents = documents.select(documents.gather(SHINGLES, scratch) >= settings.min_shingles)
    every, bucket_count = _numbered(documents.bands(), documents.is_new, scratch)
    is_possible = np.zeros(len(documents.positions), np.bool_)
    for of_band in every:
        is_possible |= of_band >= 0
    documents = documents.select(is_possible)
    count = len(documents.positions)
    buckets = scratch.empty((len(every), count), np.int64)
    for band, of_band in enumerate(every):
        buckets[band] = of_band[is_possible]
    if not count:
        return empty_table(), empty_table(), 0, 0
    is_dropped, nearest, similarity, compared = _choose(
        buckets,
        bucket_count,
        ~documents.is_new,
        documents.owners,
        documents.gather(SIGNATURES, scratch),
        None if settings.mode == "simhash" else _shingle_sets(documents, settings, scratch),
        settings,
        documents.order(settings, scratch),
    )
    if settings.mode == "simhash":
        similarity = _similarities(documents, is_dropped, nearest, settings, scratch)
    dropped = np.flatnonzero(is_dropped)
    table = _table(documents, dropped, nearest[dropped], similarity[dropped], "near")
    missed = np.flatnonzero(~is_dropped & (nearest >= 0))
    missed = missed[np.argsort(-similarity[missed], kind="stable")][:NEAR_MISSES_KEPT]
    misses = _table(documents, missed, nearest[missed], similarity[missed], "near")
    return table, misses, compared, count


def _choose(
    buckets: "npt.NDArray[np.int64]",
    bucket_count: int,
    is_old: "npt.NDArray[np.bool_]",
    owners: "Rows",
    signatures: "npt.NDArray[Any]",
    sets: "tuple[npt.NDArray[np.uint64], Rows, Rows] | None",
    settings: DedupConfig,
    order: "Rows | None" = None,
) -> "tuple[npt.NDArray[np.bool_], Rows, npt.NDArray[np.float64], int]":
    """Per unit: whether it is dropped, its partner (-1: none) and their similarity; and pairs compared.

    `buckets` are used up. By SimHash where there are no shingle sets; the similarity is then 0.
    """
    import numpy as np

    from tasks.kernels import minhash

    count = len(is_old)
    is_dropped, nearest = np.zeros(count, np.bool_), np.full(count, -1, np.int64)
    similarity = np.zeros(count)
    order = np.arange(count) if order is None else order
    if not (is_in_order := np.array_equal(order, np.arange(count))):
        buckets, signatures = np.ascontiguousarray(buckets[:, order]), signatures[order]
        is_old, owners = is_old[order], owners[order]
    if sets is None:
        compared = minhash.choose_by_bits(
            buckets, bucket_count, is_old, owners, signatures, settings.distance_bits,
            is_dropped, nearest,
        )  # fmt: skip
    else:
        values, begins, ends = sets
        compared = minhash.choose(
            buckets, bucket_count, is_old, owners, signatures, values, begins[order], ends[order],
            settings.threshold, _least_agreeing(settings), is_dropped, nearest, similarity,
        )  # fmt: skip
    if is_in_order:
        return is_dropped, nearest, similarity, int(compared)
    back = np.empty(count, np.int64)
    back[order] = np.arange(count)
    nearest = np.where(nearest >= 0, order[nearest], -1)
    return is_dropped[back], nearest[back], similarity[back], int(compared)


def _similarities(
    documents: _Documents,
    is_dropped: "npt.NDArray[np.bool_]",
    nearest: "Rows",
    settings: DedupConfig,
    scratch: Scratch,
) -> "npt.NDArray[np.float64]":
    """Exact Jaccard similarity of everything dropped to its partner; 0 for the others."""
    import numpy as np

    from tasks.kernels import minhash

    similarity = np.zeros(len(is_dropped))
    is_meant = is_dropped.copy()
    is_meant[nearest[is_dropped]] = True
    if not is_meant.any():
        return similarity
    values, begins, ends = _shingle_sets(documents.select(is_meant), settings, scratch)
    place_of = np.cumsum(is_meant) - 1
    for place in np.flatnonzero(is_dropped):
        similarity[place] = minhash.jaccard(
            values, begins, ends, int(place_of[place]), int(place_of[nearest[place]])
        )
    return similarity


def _least_agreeing(settings: DedupConfig) -> float:
    """Signature places that a pair must agree in to be compared: far below the expected number."""
    bands, rows = settings.banding()
    spread = math.sqrt(settings.threshold * (1 - settings.threshold) / (bands * rows))
    return bands * rows * (settings.threshold - ESTIMATE_SIGMAS * spread)


def _numbered(
    bands: "Iterable[npt.NDArray[np.uint64]]",
    is_new: "npt.NDArray[np.bool_]",
    scratch: Scratch | None = None,
) -> "tuple[Sequence[npt.NDArray[np.int64]], int]":
    """Per band (documents,) number of the bucket, -1 where it holds no other or no new document; and how many."""
    import numpy as np

    buckets: list[npt.NDArray[np.int64]] = []
    found = 0
    for keys in bands if len(is_new) else ():
        order = np.argsort(keys)
        ordered = keys[order]
        starts = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1])))
        sizes = np.diff(np.append(starts, len(ordered)))
        is_used = (sizes > 1) & np.logical_or.reduceat(is_new[order], starts)
        numbers = np.where(is_used, found + np.cumsum(is_used) - 1, -1)
        of_band = (scratch.empty if scratch else np.empty)((len(keys),), np.int64)
        of_band[order] = np.repeat(numbers, sizes)
        buckets.append(of_band)
        found += int(is_used.sum())
    return buckets, found


def _shingle_sets(
    documents: _Documents, settings: DedupConfig, scratch: Scratch
) -> "tuple[npt.NDArray[np.uint64], Rows, Rows]":
    """Sorted distinct shingles of every unit, and where each one's begin and end."""
    import numpy as np

    by_shard = documents.by_shard()
    counts = [int(_load(item.signed / SHINGLES)[rows].sum()) for item, rows in by_shard]
    room = np.cumsum([0, *counts])
    values = scratch.empty((int(room[-1]),), np.uint64)

    def of_shard(number: int) -> "tuple[Rows, Rows]":
        signed, units = by_shard[number]
        ends = np.empty(len(units), np.int64)
        at, done = int(room[number]), 0
        for texts in signed.texts(units) if len(units) else ():
            of_piece = ends[done : done + len(texts)]
            filled = fill_shingle_sets(texts, settings, values[at : room[number + 1]], of_piece)
            of_piece += at
            at, done = at + filled, done + len(texts)
        return np.concatenate([room[number : number + 1], ends])[: len(ends)], ends

    # Threads: reading and the kernel let go of the interpreter.
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        limits = list(threads.map(of_shard, range(len(by_shard))))
    begins, ends = (np.concatenate(column) for column in zip(*limits, strict=True))
    return values, begins, ends


def _table(
    documents: _Documents, copies: "Rows", originals: "Rows", jaccard: Any, kind: str
) -> "pl.DataFrame":
    """The rows of a table from places among the documents."""
    import numpy as np
    import polars as pl

    def split(places: "Rows") -> "tuple[Rows, Rows]":
        positions = documents.positions[places]
        shards = np.searchsorted(documents.starts, positions, side="right") - 1
        return shards, positions - documents.starts[shards]

    (shard, row), (of_shard, of_row) = split(copies), split(originals)
    columns = {"shard": shard, "row": row, "kind": [kind] * len(row)}
    columns |= {"of_shard": of_shard, "of_row": of_row, "jaccard": jaccard}
    return pl.DataFrame(columns, schema=schema())


def _load(path: Path) -> "npt.NDArray[Any]":
    """A sidecar, mapped."""
    import numpy as np

    found: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    return found
