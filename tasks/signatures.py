"""What dedup knows of every document (or paragraph) of a shard, computed once: hashes and signatures.

Source: Broder 1997 (resemblance, min-wise signatures); Charikar 2002 (SimHash).
"""

import contextlib
import importlib.metadata
import itertools
import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import xxhash

from conf.dedup import DedupConfig
from storage.corpus import Shard
from tasks.text_statistics import batches

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import polars as pl

    # Any: an Arrow array, which has no types of its own.
    Texts = pl.Series | Any
    Permutations = tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint32]]

TEXT_HASHES = "text_hashes.npy"
"""(units, 2) uint64, the 128 bits of xxh3 of the UTF-8 text."""
SIGNATURES = "signatures.npy"
"""(units, permutations) uint32, datasketch's hash values; or (units,) uint64 SimHashes."""
BANDS = "bands.npy"
"""(bands, units) uint64."""
SHINGLES = "shingles.npy"
"""(units,) uint32, how many shingles a unit has, repeats included."""
UNITS = "units.parquet"
"""Paragraphs only: row, and start and end in characters of the row's text, of every unit."""
SCORES = "scores.npy"
"""(units,) float32, larger for those to keep; only where length or quality decide."""
FREQUENCIES = "frequencies.npz"
"""Sorted `shingles` that more than one document has, their `counts`, and the number of `documents`."""

SIGN_ROWS = 16_384
SKETCH_SLOTS = 1 << 24
SENTENCE_END = r"[.!?。！？…][\"'”’」』）)]*$"


def build_signatures(
    files: Path,
    shard: Shard,
    settings: DedupConfig,
    frequencies: Path | None,
    permutations: "Permutations | None" = None,
) -> dict[str, Any]:
    """Write the sidecars of a shard, for every row: a row dropped today may be kept tomorrow.

    In the mode `exact` only the text hashes. `frequencies` is for TF-IDF weights. Cost: about 100 MB of
    text a second.
    """
    import numpy as np
    import polars as pl

    from tasks.kernels.compiling import alone

    columns: dict[str, list[npt.NDArray[Any]]] = {}
    units: list[pl.DataFrame] = []
    rows = 0
    for every, _ in batches(shard):
        texts: Texts = every
        if settings.unit == "paragraph":
            found = paragraphs_of(_series(texts), settings.min_paragraph_tokens)
            texts = found["text"]
            units.append(found.drop("text").with_columns(pl.col("row") + rows))
        rows += len(every)
        columns.setdefault(TEXT_HASHES, []).append(_text_hashes(texts))
        if settings.keep in ("longest", "quality"):
            columns.setdefault(SCORES, []).append(_scores(_series(texts), settings))
        if settings.mode in ("near", "simhash"):
            with alone():
                _sign(texts[:1], settings, frequencies, permutations)
            signatures, shingles = _sign(texts, settings, frequencies, permutations)
            columns.setdefault(SIGNATURES, []).append(signatures)
            columns.setdefault(SHINGLES, []).append(shingles)
    arrays = {name: np.concatenate(pieces) for name, pieces in columns.items()}
    if units:
        pl.concat(units).write_parquet(files / UNITS, compression="zstd")
    if SIGNATURES in arrays:
        arrays[BANDS] = keys_of(arrays[SIGNATURES], settings)
    for name, values in arrays.items():
        np.save(files / name, values)
    return {"units": len(arrays[TEXT_HASHES])}


def _text_hashes(texts: "Texts") -> "npt.NDArray[np.uint64]":
    import numpy as np

    content, offsets = text_buffers(texts)
    view, limits = content.data, itertools.pairwise(offsets.tolist())
    digests = b"".join(xxhash.xxh3_128_digest(view[start:end]) for start, end in limits)
    return np.frombuffer(digests, np.uint64).reshape(-1, 2)


def texts_of(shard: Shard) -> Any:
    """Every text of a shard, dropped rows too, without what was cut, as the kernels read it."""
    import polars as pl
    import pyarrow as pa
    import pyarrow.parquet as pq

    if shard.has_cuts:
        texts = shard.read(["text"], kept_only=False)["text"].rechunk()
        array: Any = texts.to_arrow(compat_level=pl.CompatLevel.oldest())
        return array.cast(pa.large_string())
    # pq.read_table would import pandas.
    with pq.ParquetFile(shard.text_path, memory_map=True) as file:
        column: Any = file.read(columns=["text"], use_threads=False)["text"]
    if len(column) != shard.rows:
        shard.read(["text"])  # raises, and says why
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], pa.large_string())


def _series(texts: "Texts") -> "pl.Series":
    import polars as pl

    return texts if isinstance(texts, pl.Series) else pl.Series(texts)


def paragraphs_of(texts: "pl.Series", min_tokens: int) -> "pl.DataFrame":
    """Every line with so many tokens: row, start, end (characters, its line break included) and text."""
    import polars as pl

    from tasks.kernels import minhash

    lines = (
        pl.DataFrame({"line": texts.fill_null("").str.split("\n")})
        .with_row_index("row")
        .explode("line")
        .with_columns(size=pl.col("line").str.len_chars() + 1)
        .with_columns(end=pl.col("size").cum_sum().over("row"))
    )
    units = lines.select(
        "row",
        start=pl.col("end") - pl.col("size"),
        end="end",
        text=pl.col("line").str.strip_chars(),
    )
    counts = minhash.token_counts(*text_buffers(units["text"]))
    return units.filter(pl.Series(counts >= min_tokens))


def _scores(texts: "pl.Series", settings: DedupConfig) -> "npt.NDArray[np.float32]":
    import polars as pl

    if settings.keep == "longest":
        return texts.str.len_chars().cast(pl.Float32).to_numpy()
    lines = (
        pl.DataFrame({"line": texts.fill_null("").str.split("\n")})
        .with_row_index("row")
        .explode("line")
    )
    size, line = pl.col("line").str.len_chars(), pl.col("line").str.strip_chars()
    ended = size.filter(line.str.contains(SENTENCE_END)).sum()
    shares = lines.group_by("row", maintain_order=True).agg(share=ended / size.sum())
    return shares["share"].fill_nan(0).fill_null(0).cast(pl.Float32).to_numpy()


def _sign(
    texts: "Texts",
    settings: DedupConfig,
    frequencies: Path | None,
    permutations: "Permutations | None",
) -> "tuple[npt.NDArray[Any], npt.NDArray[np.uint32]]":
    if settings.mode == "near":
        return sign_texts(texts, settings, permutations)
    return simhash_texts(texts, settings, frequencies)


def permutations_of(settings: DedupConfig) -> "Permutations":
    """Factors (odd) and summands of datasketch's scheme "affine32", (bands * rows,) each.

    The library takes half a second to import, as long as some ten MB take to sign: its numbers are asked for
    once, and kept in the user's cache with a checksum.
    """
    bands, rows = settings.banding()
    version = importlib.metadata.version("datasketch")
    name = f"permutations-{version}-{bands * rows}-{settings.permutation_seed}"
    path = Path.home() / ".cache" / "bessemer" / name
    both = _kept(path, bands * rows)
    if both is None:
        both = _asked_permutations(bands * rows, settings.permutation_seed)
        with contextlib.suppress(
            OSError
        ):  # a home that is not to be written: asked again next time
            _keep(both, path)
    return both[0], both[1]


def _asked_permutations(count: int, seed: int) -> "npt.NDArray[np.uint32]":
    import numpy as np
    from datasketch import MinHash

    truth = MinHash(num_perm=count, seed=seed, scheme="affine32")
    return np.stack(cast("tuple[Any, Any]", truth.permutations)).astype(np.uint32)


def _kept(path: Path, count: int) -> "npt.NDArray[np.uint32] | None":
    """What `_keep` wrote, (2, count); None where it is missing or damaged."""
    import numpy as np

    content = path.read_bytes() if path.exists() else b""
    body, digest = content[: 8 * count], content[8 * count :]
    if len(body) < 8 * count or xxhash.xxh3_128_digest(body) != digest:
        return None
    return np.frombuffer(body, np.uint32).reshape(2, count)


def _keep(values: "npt.NDArray[np.uint32]", path: Path) -> None:
    """Write a file that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    body = values.tobytes()
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as stream:
        stream.write(body + xxhash.xxh3_128_digest(body))
    Path(stream.name).replace(path)


def sign_texts(
    texts: "Texts", settings: DedupConfig, permutations: "Permutations | None" = None
) -> "tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint32]]":
    """(documents, bands * band_rows) MinHash signatures, and (documents,) numbers of shingles."""
    import numpy as np

    from tasks.kernels import minhash

    bands, rows = settings.banding()
    a, b = permutations_of(settings) if permutations is None else permutations
    signatures = np.empty((len(texts), bands * rows), np.uint32)
    shingles = np.empty(len(texts), np.uint32)
    for start, end, (text, offsets, width, how) in pieces_of(texts, settings):
        minhash.sign(text, offsets, width, how, a, b, signatures[start:end], shingles[start:end])
    return signatures, shingles


def simhash_texts(
    texts: "Texts", settings: DedupConfig, frequencies: Path | None = None
) -> "tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint32]]":
    """(documents,) SimHashes, and (documents,) numbers of shingles."""
    import numpy as np

    from tasks.kernels import minhash

    known, rarity, rarest = rarities(frequencies)
    hashes = np.empty(len(texts), np.uint64)
    shingles = np.empty(len(texts), np.uint32)
    for start, end, piece in pieces_of(texts, settings):
        minhash.simhash(*piece, known, rarity, rarest, hashes[start:end], shingles[start:end])
    return hashes, shingles


def rarities(
    frequencies: Path | None,
) -> "tuple[npt.NDArray[np.uint64], npt.NDArray[np.float64], float]":
    """Known shingles with their inverse document frequency ln((1 + n) / (1 + count)) + 1, and that of a
    shingle that one document has; nothing and 0 without frequencies."""
    import numpy as np

    if frequencies is None:
        return np.zeros(0, np.uint64), np.zeros(0), 0.0
    with np.load(frequencies, allow_pickle=False) as arrays:
        known, counts, documents = arrays["shingles"], arrays["counts"], int(arrays["documents"])
    rarity = np.log((1 + documents) / (1 + counts.astype(np.float64))) + 1
    return known, rarity, math.log((1 + documents) / 2) + 1 if documents else 1.0


def build_frequencies(
    files: Path, shards: Sequence[Shard], settings: DedupConfig
) -> dict[str, Any]:
    """Write `frequencies.npz`: in how many kept documents of these shards a shingle is.

    Two passes: the first marks in a table of 16 MB what may occur twice, the second counts that exactly.
    """
    import numpy as np

    from tasks.kernels import frequencies as kernel

    sketch = np.zeros(SKETCH_SLOTS, np.uint8)
    documents = 0
    for shard in shards:
        texts = shard.read(["text"])["text"]
        documents += len(texts)
        for _, _, piece in pieces_of(texts, settings):
            kernel.mark(*piece, sketch)
    known, counts = np.zeros(0, np.uint64), np.zeros(0, np.int64)
    for shard in shards:
        for _, _, piece in pieces_of(shard.read(["text"])["text"], settings):
            found, times = np.unique(kernel.marked(*piece, sketch), return_counts=True)
            known, place = np.unique(np.concatenate([known, found]), return_inverse=True)
            counts = np.bincount(place, np.concatenate([counts, times])).astype(np.int64)
    is_common = counts > 1
    with (files / FREQUENCIES).open("wb") as stream:
        np.savez(
            stream,
            shingles=known[is_common],
            counts=counts[is_common],
            documents=np.int64(documents),
        )
    return {"documents": documents, "shingles": int(is_common.sum())}


def keys_of(signatures: "npt.NDArray[Any]", settings: DedupConfig) -> "npt.NDArray[np.uint64]":
    """(bands, documents) keys; documents with an equal key of a band are compared.

    Of a SimHash the bands are `distance_bits + 1` blocks of bits: two that differ in no more bits have a
    block in common.
    """
    import numpy as np

    from tasks.kernels import minhash

    if settings.mode == "simhash":
        cuts = np.linspace(0, 64, settings.distance_bits + 2).astype(np.uint64)
        blocks = [
            (signatures >> low) & np.uint64((1 << int(high - low)) - 1)
            for low, high in itertools.pairwise(cuts)
        ]
        return np.stack(blocks)
    bands, rows = settings.banding()
    keys = np.empty((bands, len(signatures)), np.uint64)
    minhash.band_keys(signatures, bands, rows, keys)
    return keys


def shingle_sets(
    texts: "Texts", settings: DedupConfig
) -> "tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]]":
    """Sorted distinct shingles of every text, after one another, and where each one's end."""
    import numpy as np

    _, offsets = text_buffers(texts)
    values = np.empty(int(offsets[-1] - offsets[0]), np.uint64)
    ends = np.empty(len(texts), np.int64)
    total = fill_shingle_sets(texts, settings, values, ends)
    return values[:total].copy(), ends


def fill_shingle_sets(
    texts: "Texts",
    settings: DedupConfig,
    values: "npt.NDArray[np.uint64]",
    ends: "npt.NDArray[np.int64]",
) -> int:
    """`shingle_sets` into arrays with room for all shingles, repeats included; how many values."""
    from tasks.kernels import minhash

    total = 0
    for start, end, piece in pieces_of(texts, settings):
        total = minhash.shingle_sets(*piece, values, total, ends[start:end])
    return total


def pieces_of(
    texts: "Texts", settings: DedupConfig
) -> "Iterator[tuple[int, int, tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64], int, int]]]":
    """Some thousand texts at a time: first and last place, and what every kernel asks for."""
    from tasks.kernels.minhash import HOW

    how = HOW.index(settings.shingles)
    for start in range(0, len(texts), SIGN_ROWS):
        end = min(start + SIGN_ROWS, len(texts))
        piece = texts[start:end]
        if settings.shingles == "words":
            piece = _in_words(_series(piece))
        text, offsets = text_buffers(piece)
        yield start, end, (text, offsets, settings.shingle_tokens, how)


def _in_words(texts: "pl.Series") -> "pl.Series":
    """The texts with a space between jieba's words."""
    import logging

    import jieba
    import polars as pl

    jieba.setLogLevel(logging.WARNING)
    return pl.Series([" ".join(jieba.cut(text)) for text in texts], dtype=pl.String)


def text_buffers(
    texts: "Texts",
) -> "tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]":
    """The UTF-8 bytes of all texts, and where each begins (one more than texts)."""
    import numpy as np
    import polars as pl
    import pyarrow as pa

    array: Any = texts
    if isinstance(texts, pl.Series):
        array = texts.fill_null("").rechunk().to_arrow(compat_level=pl.CompatLevel.oldest())
    array = array.cast(pa.large_binary())
    offsets = np.frombuffer(array.buffers()[1] or bytes(8), np.int64)
    offsets = offsets[array.offset : array.offset + len(array) + 1]
    buffer = array.buffers()[2]
    return np.frombuffer(buffer if buffer is not None else b"", np.uint8), offsets
