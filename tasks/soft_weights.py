"""Weighs documents down, instead of dropping them, by how much they resemble an earlier one.

Source of the idea: He et al. 2024, SoftDedup (lower sampling weight for common data); here by the largest
TF-IDF cosine similarity to an earlier document.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.dedup import DedupConfig
from tasks.near_duplicates import SignedShard
from tasks.signatures import pieces_of, rarities

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

WEIGHTS = "weights.parquet"
"""Documents with a weight below 1: shard, row, of_shard, of_row, similarity, weight, is_kept."""
LOOKUP_SLOTS = 1 << 24


def build_weights(
    files: Path,
    shards: Sequence[SignedShard],
    first_new: int,
    earlier: Sequence[Path],
    settings: DedupConfig,
    frequencies: Path,
) -> dict[str, Any]:
    """Write the weights of the documents from `first_new` on, and whether each one stays.

    Compared with all documents before, kept or not, so `earlier` decisions change nothing here. The
    weight is 1 up to the similarity `soft_floor`, then falls in a line to `least_weight` at 1.
    """
    import numpy as np
    import polars as pl

    from tasks.kernels import similarity as kernel

    del earlier
    known = rarities(frequencies)
    vectors = _Vectors.of(shards, known, settings)
    count = len(vectors.ends)
    nearest, similarity = np.full(count, -1, np.int64), np.zeros(count)
    chains, chain_count = _chains(vectors)
    begins = np.concatenate([np.zeros(1, np.int64), vectors.ends])[:count]
    new_from = int(np.searchsorted(vectors.shards, first_new))
    compared = kernel.nearest_earlier(
        vectors.values, vectors.weights, chains, chain_count, begins, vectors.ends, new_from,
        nearest, similarity,
    )  # fmt: skip
    similarity = np.minimum(similarity, 1.0)
    slope = (1 - settings.least_weight) / (1 - settings.soft_floor)
    weight = np.where(
        similarity >= settings.soft_floor, 1 - slope * (similarity - settings.soft_floor), 1.0
    )
    lighter = np.flatnonzero(weight < 1)
    of = nearest[lighter]
    table = pl.DataFrame(
        {
            "shard": vectors.shards[lighter].astype(np.uint32),
            "row": vectors.rows[lighter].astype(np.uint32),
            "of_shard": vectors.shards[of].astype(np.uint32),
            "of_row": vectors.rows[of].astype(np.uint32),
            "similarity": similarity[lighter],
            "weight": weight[lighter],
            "is_kept": _draws(vectors.ids[lighter]) < weight[lighter],
        }
    )
    table.write_parquet(files / WEIGHTS, compression="zstd")
    return {
        "units": count - new_from,
        "candidates": int((nearest >= 0).sum()),
        "pairs_checked": int(compared),
        "lighter": table.height,
        "weight": float(weight[new_from:].sum()),
    }


class _Vectors:
    """The TF-IDF vectors of all kept documents, in order."""

    def __init__(self, arrays: "Sequence[npt.NDArray[Any]]") -> None:
        self.values, self.weights, self.is_looked_up, self.ends = arrays[:4]
        self.shards, self.rows, self.ids = arrays[4:]

    @classmethod
    def of(
        cls,
        shards: Sequence[SignedShard],
        known: "tuple[npt.NDArray[np.uint64], npt.NDArray[np.float64], float]",
        settings: DedupConfig,
    ) -> "_Vectors":
        """Reads every shard once."""
        import numpy as np

        from tasks.kernels import similarity as kernel

        types = (np.uint64, np.float64, np.bool_, np.int64, np.int64, np.int64, np.uint64)
        found: list[list[npt.NDArray[Any]]] = [[np.zeros(0, kind)] for kind in types]
        total = 0
        for number, signed in enumerate(shards):
            frame = signed.shard.read(["text", "doc_id"])
            for _, _, piece in pieces_of(frame["text"], settings):
                *columns, ends = kernel.vectors(*piece, *known, settings.soft_floor)
                for column, values in zip(found, [*columns, ends + total], strict=False):
                    column.append(values)
                total += len(columns[0])
            found[4].append(np.full(frame.height, number, np.int64))
            found[5].append(frame["row"].to_numpy().astype(np.int64))
            found[6].append(frame["doc_id"].to_numpy())
        return cls([np.concatenate(column) for column in found])


def _chains(vectors: _Vectors) -> "tuple[npt.NDArray[np.int64], int]":
    """Look-up lists by number: for shingles that are looked up and that a second document may have."""
    import numpy as np

    slots = (vectors.values & np.uint64(LOOKUP_SLOTS - 1)).astype(np.int64)
    counts = np.bincount(slots[vectors.is_looked_up], minlength=LOOKUP_SLOTS)
    is_used = vectors.is_looked_up & (counts[slots] > 1)
    chains = np.full(len(slots), -1, np.int64)
    _, numbers = np.unique(vectors.values[is_used], return_inverse=True)
    chains[is_used] = numbers
    return chains, int(numbers.max()) + 1 if len(numbers) else 0


def _draws(ids: "npt.NDArray[np.uint64]") -> "npt.NDArray[np.float64]":
    """A number in [0, 1) per document, a function of its id alone."""
    import numpy as np
    import xxhash

    draws = [xxhash.xxh3_64_intdigest(int(i).to_bytes(8, "little"), seed=2) / 2**64 for i in ids]
    return np.array(draws, np.float64)
