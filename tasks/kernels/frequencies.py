"""Compiled loops that find which shingles several documents have."""

# numba's decorators and arrays carry no types that pyright could follow
# pyright: basic

import numba as nb
import numpy as np
import numpy.typing as npt

from tasks.kernels.minhash import shingle_hashes

U64 = np.uint64


@nb.njit(nogil=True, cache=True)
def mark(
    text: npt.NDArray[np.uint8],
    offsets: npt.NDArray[np.int64],
    shingle_tokens: int,
    how: int,
    sketch: npt.NDArray[np.uint8],
) -> None:
    """Count in `sketch` (a power of two of slots), up to 2, the rows that have a shingle of a slot."""
    mask = U64(sketch.shape[0] - 1)
    for row in range(offsets.shape[0] - 1):
        tokens = np.empty(offsets[row + 1] - offsets[row] + 1, np.uint64)
        found = shingle_hashes(text, offsets[row], offsets[row + 1], shingle_tokens, how, tokens)
        ordered = np.sort(tokens[:found])
        for i in range(found):
            slot = ordered[i] & mask
            if (i == 0 or ordered[i] != ordered[i - 1]) and sketch[slot] < 2:
                sketch[slot] += 1


@nb.njit(nogil=True, cache=True)
def marked(
    text: npt.NDArray[np.uint8],
    offsets: npt.NDArray[np.int64],
    shingle_tokens: int,
    how: int,
    sketch: npt.NDArray[np.uint8],
) -> npt.NDArray[np.uint64]:
    """The distinct shingles of every row, one row after another, whose slot of `sketch` is 2."""
    mask = U64(sketch.shape[0] - 1)
    out = np.empty(1024, np.uint64)
    total = 0
    for row in range(offsets.shape[0] - 1):
        tokens = np.empty(offsets[row + 1] - offsets[row] + 1, np.uint64)
        found = shingle_hashes(text, offsets[row], offsets[row + 1], shingle_tokens, how, tokens)
        if total + found > out.shape[0]:
            larger = np.empty(2 * (total + found), np.uint64)
            larger[:total] = out[:total]
            out = larger
        ordered = np.sort(tokens[:found])
        for i in range(found):
            if (i == 0 or ordered[i] != ordered[i - 1]) and sketch[ordered[i] & mask] == 2:
                out[total] = ordered[i]
                total += 1
    return out[:total].copy()
