"""Finds copies: a signature per document, then a fold over landings that keeps the first of each kind.

Both steps are parts of the store. A landing's part depends on the landings before it and on nothing
later, so appended data never changes what was decided, and costs only itself.

Source: Broder 1997 (resemblance, min-wise signatures); Leskovec, Rajaraman and Ullman, Mining of
Massive Datasets, section 3.4 (banding).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from conf.dedup import DedupConfig
from storage.corpus import Shard

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import polars as pl

    Rows = npt.NDArray[np.int64]

SIGNATURES = "signatures.npy"
"""(rows, permutations) uint32, datasketch's hash values."""
BANDS = "bands.npy"
"""(bands, rows) uint64."""
SHINGLES = "shingles.npy"
"""(rows,) uint32, how many shingles a document has, repeats included."""
TEXT_HASHES = "text_hashes.npy"
"""(rows,) uint64, xxh3 of the UTF-8 text."""
DUPLICATES = "duplicates.parquet"
"""What a landing dropped: shard, row, kind (exact, near), of_shard, of_row, jaccard."""
NEAR_MISSES = "near_misses.parquet"
"""Some kept documents that are nearest to being dropped; the same columns."""

SIGN_ROWS = 16_384
NEAR_MISSES_KEPT = 100
ESTIMATE_SIGMAS = 6.0
"""Signatures that agree less than this far below the threshold are not compared exactly: about one
pair in a billion at the threshold is missed by it."""


@dataclass(frozen=True)
class SignedShard:
    """A shard and the part with its signatures."""

    shard: Shard
    signed: Path


@dataclass(frozen=True)
class _Documents:
    """The documents that a landing's decision is about, in order: all kept before, and the new ones."""

    shards: Sequence[SignedShard]
    starts: "Rows"
    """Position of each shard's first row in the list of all rows, and the end of the list."""
    positions: "Rows"
    is_new: "npt.NDArray[np.bool_]"

    def select(self, mask: "npt.NDArray[np.bool_]") -> "_Documents":
        return _Documents(self.shards, self.starts, self.positions[mask], self.is_new[mask])

    def by_shard(self) -> "list[tuple[SignedShard, Rows]]":
        """Every shard with the rows of it that are meant, empty ones too."""
        import numpy as np

        cuts = np.searchsorted(self.positions, self.starts)
        return [
            (shard, self.positions[cuts[i] : cuts[i + 1]] - self.starts[i])
            for i, shard in enumerate(self.shards)
        ]

    def gather(self, name: str, *, band: int | None = None) -> "npt.NDArray[Any]":
        """One value (or row of values) per document from the shards' sidecar `name`."""
        import numpy as np

        values = [
            (_load(shard.signed / name) if band is None else _load(shard.signed / name)[band])[rows]
            for shard, rows in self.by_shard()
        ]
        return np.concatenate(values)


def build_signatures(files: Path, shard: Shard, settings: DedupConfig) -> dict[str, Any]:
    """Write the sidecars of a shard, for every row: a row dropped today may be kept tomorrow.

    Without `near`, only the text hashes. Cost: about 100 MB of text a second.
    """
    import numpy as np
    import xxhash

    has_cuts = "cuts" in shard.decisions().columns
    frame = shard.read(["text", "text_hash"], kept_only=False)
    hashes = frame["text_hash"].to_numpy()
    if has_cuts:
        hashes = np.array(
            [xxhash.xxh3_64_intdigest(t.encode("utf-8")) for t in frame["text"]], np.uint64
        )
    np.save(files / TEXT_HASHES, hashes)
    if settings.mode == "near":
        signatures, shingles = sign_texts(frame["text"], settings)
        np.save(files / SIGNATURES, signatures)
        np.save(files / BANDS, keys_of(signatures, settings))
        np.save(files / SHINGLES, shingles)
    return {"documents": frame.height}


def sign_texts(
    texts: "pl.Series", settings: DedupConfig
) -> "tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint32]]":
    """(documents, bands * band_rows) MinHash signatures, and (documents,) numbers of shingles."""
    import numpy as np
    from datasketch import MinHash

    from tasks.kernels import minhash

    count = settings.bands * settings.band_rows
    oracle = MinHash(num_perm=count, seed=settings.permutation_seed, scheme="affine32")
    multiply, add = cast("tuple[Any, Any]", oracle.permutations)
    a, b = np.asarray(multiply).astype(np.uint32), np.asarray(add).astype(np.uint32)
    signatures = np.empty((len(texts), count), np.uint32)
    shingles = np.empty(len(texts), np.uint32)
    for start in range(0, len(texts), SIGN_ROWS):
        end = min(start + SIGN_ROWS, len(texts))
        text, offsets = text_buffers(texts[start:end])
        minhash.sign(
            text,
            offsets,
            settings.shingle_tokens,
            a,
            b,
            signatures[start:end],
            shingles[start:end],
        )
    return signatures, shingles


def keys_of(
    signatures: "npt.NDArray[np.uint32]", settings: DedupConfig
) -> "npt.NDArray[np.uint64]":
    """(bands, documents) keys; documents with an equal key of a band are compared."""
    import numpy as np

    from tasks.kernels import minhash

    keys = np.empty((settings.bands, len(signatures)), np.uint64)
    minhash.band_keys(signatures, settings.bands, settings.band_rows, keys)
    return keys


def text_buffers(
    texts: "pl.Series",
) -> "tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]":
    """The UTF-8 bytes of all texts, and where each begins (one more than texts)."""
    import numpy as np
    import polars as pl
    import pyarrow as pa

    found: Any = texts.fill_null("").rechunk().to_arrow(compat_level=pl.CompatLevel.oldest())
    array = found.cast(pa.large_binary())
    offsets = np.frombuffer(array.buffers()[1], np.int64)
    offsets = offsets[array.offset : array.offset + len(array) + 1]
    buffer = array.buffers()[2]
    return np.frombuffer(buffer if buffer is not None else b"", np.uint8), offsets


def build_landing(
    files: Path,
    shards: Sequence[SignedShard],
    first_new: int,
    earlier: Sequence[Path],
    settings: DedupConfig,
) -> dict[str, Any]:
    """Decide on the shards from `first_new` on; `earlier` are the files of the landings before.

    Shards are in order of landing; a shard's place in that order names it in the tables. A document is
    dropped if its text equals a kept one's, or if some earlier kept document is at least as similar as
    the threshold. There is no transitive closure: what is dropped always has a kept partner within the
    threshold, chains of small changes are not collapsed.
    """
    documents = _documents_of(shards, first_new, earlier)
    exact, remaining = _exact_copies(documents)
    near, misses, compared, candidates = empty_table(), empty_table(), 0, 0
    if settings.mode == "near":
        near, misses, compared, candidates = _near_copies(remaining, settings)
        exact = _with_kept_partners(exact, near)
    table = _sorted_table(exact, near)
    table.write_parquet(files / DUPLICATES, compression="zstd")
    misses.write_parquet(files / NEAR_MISSES, compression="zstd")
    return {
        "documents": int(documents.is_new.sum()),
        "exact": exact.height,
        "near": near.height,
        "candidates": candidates,
        "pairs_checked": compared,
    }


def _documents_of(
    shards: Sequence[SignedShard], first_new: int, earlier: Sequence[Path]
) -> _Documents:
    import numpy as np
    import polars as pl

    starts = np.cumsum([0, *(signed.shard.rows for signed in shards)])
    is_kept = np.ones(starts[-1], np.bool_)
    for start, end, signed in zip(starts, starts[1:], shards, strict=False):
        if (keep := signed.shard.keep) is not None:
            is_kept[start:end] = keep.to_numpy()
    for folder in earlier:
        dropped = pl.read_parquet(folder / DUPLICATES, columns=["shard", "row"])
        is_kept[starts[dropped["shard"].to_numpy()] + dropped["row"].to_numpy()] = False
    positions = np.flatnonzero(is_kept)
    return _Documents(shards, starts, positions, positions >= starts[first_new])


def _exact_copies(documents: _Documents) -> "tuple[pl.DataFrame, _Documents]":
    """What equals an earlier text, byte for byte; and the documents without it."""
    import numpy as np

    hashes = documents.gather(TEXT_HASHES)
    _, first, group = np.unique(hashes, return_index=True, return_inverse=True)
    original = first[group]
    is_copy = original != np.arange(len(original))
    table = _table(
        documents,
        np.flatnonzero(is_copy),
        original[is_copy],
        np.ones(is_copy.sum()),
        "exact",
    )
    return table, documents.select(~is_copy)


def _near_copies(
    documents: _Documents, settings: DedupConfig
) -> "tuple[pl.DataFrame, pl.DataFrame, int, int]":
    """What is dropped, what was nearly dropped, pairs compared, documents with a possible partner."""
    import numpy as np

    from tasks.kernels import minhash

    documents = documents.select(documents.gather(SHINGLES) > 0)
    buckets, bucket_count = _buckets(documents, settings.bands)
    is_possible = np.logical_or.reduce(buckets >= 0, axis=0)
    documents, buckets = documents.select(is_possible), buckets[:, is_possible]
    count = len(documents.positions)
    if not count:
        return empty_table(), empty_table(), 0, 0
    values, ends = _shingle_sets(documents, settings.shingle_tokens)
    signatures = documents.gather(SIGNATURES)
    is_dropped, nearest = np.zeros(count, np.bool_), np.full(count, -1, np.int64)
    similarity = np.zeros(count)
    compared = minhash.choose(
        buckets,
        bucket_count,
        ~documents.is_new,
        signatures,
        values,
        ends,
        settings.threshold,
        _least_agreeing(settings),
        is_dropped,
        nearest,
        similarity,
    )
    dropped = np.flatnonzero(is_dropped)
    table = _table(documents, dropped, nearest[dropped], similarity[dropped], "near")
    missed = np.flatnonzero(~is_dropped & (nearest >= 0))
    missed = missed[np.argsort(-similarity[missed], kind="stable")][:NEAR_MISSES_KEPT]
    misses = _table(documents, missed, nearest[missed], similarity[missed], "near")
    return table, misses, int(compared), count


def _least_agreeing(settings: DedupConfig) -> float:
    """Signature places that a pair must agree in to be compared: far below the expected number."""
    places = settings.bands * settings.band_rows
    spread = math.sqrt(settings.threshold * (1 - settings.threshold) / places)
    return places * (settings.threshold - ESTIMATE_SIGMAS * spread)


def _buckets(documents: _Documents, bands: int) -> "tuple[npt.NDArray[np.int64], int]":
    """(bands, documents) number of the bucket, -1 where it holds no other or no new document."""
    import numpy as np

    buckets = np.full((bands, len(documents.positions)), -1, np.int64)
    found = 0
    for band in range(bands):
        keys = documents.gather(BANDS, band=band)
        if not len(keys):
            continue
        order = np.argsort(keys, kind="stable")
        ordered = keys[order]
        starts = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1])))
        sizes = np.diff(np.append(starts, len(ordered)))
        is_used = (sizes > 1) & np.logical_or.reduceat(documents.is_new[order], starts)
        numbers = np.where(is_used, found + np.cumsum(is_used) - 1, -1)
        buckets[band, order] = np.repeat(numbers, sizes)
        found += int(is_used.sum())
    return buckets, found


def _shingle_sets(
    documents: _Documents, shingle_tokens: int
) -> "tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]]":
    """Sorted distinct shingles of every document, after one another, and where each one's end."""
    import numpy as np

    from tasks.kernels import minhash

    values: list[npt.NDArray[np.uint64]] = []
    ends: list[npt.NDArray[np.int64]] = []
    total = 0
    for signed, rows in documents.by_shard():
        if not len(rows):
            continue
        texts = signed.shard.read(["text"], kept_only=False)["text"].gather(rows)
        of_shard, ends_of_shard = minhash.shingle_sets(*text_buffers(texts), shingle_tokens)
        values.append(of_shard)
        ends.append(ends_of_shard + total)
        total += len(of_shard)
    return np.concatenate(values), np.concatenate(ends)


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
    return pl.DataFrame(columns, schema=_schema())


def _schema() -> "dict[str, Any]":
    import polars as pl

    row = {"shard": pl.UInt32, "row": pl.UInt32, "kind": pl.String}
    return {**row, "of_shard": pl.UInt32, "of_row": pl.UInt32, "jaccard": pl.Float64}


def empty_table() -> "pl.DataFrame":
    """A table of copies without rows."""
    import polars as pl

    return pl.DataFrame(schema=_schema())


def _with_kept_partners(exact: "pl.DataFrame", near: "pl.DataFrame") -> "pl.DataFrame":
    """Copies of a text that is itself a near-copy point to what was kept for it."""
    import polars as pl

    moved = near.select(
        of_shard="shard", of_row="row", to_shard="of_shard", to_row="of_row", closeness="jaccard"
    )
    return exact.join(moved, on=["of_shard", "of_row"], how="left", maintain_order="left").select(
        "shard",
        "row",
        "kind",
        pl.coalesce("to_shard", "of_shard").alias("of_shard"),
        pl.coalesce("to_row", "of_row").alias("of_row"),
        pl.coalesce("closeness", "jaccard").alias("jaccard"),
    )


def _sorted_table(exact: "pl.DataFrame", near: "pl.DataFrame") -> "pl.DataFrame":
    import polars as pl

    return pl.concat([exact, near]).sort("shard", "row")


def _load(path: Path) -> "npt.NDArray[Any]":
    """A sidecar, mapped."""
    import numpy as np

    found: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    return found
