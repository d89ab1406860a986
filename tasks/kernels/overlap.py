"""Compiled search for runs of words that a table of hashes knows."""

# numba's decorators and arrays carry no types that pyright could follow
# pyright: basic

import numba as nb
import numpy as np
import numpy.typing as npt

from tasks.kernels.characters import words_of
from tasks.kernels.minhash import TOKENS, shingle_hashes
from tasks.kernels.words import GRAM_FACTOR, U64, mix64

EMPTY = U64(0)


@nb.njit(inline="always")
def _key(rolled, width):
    key = mix64(rolled + U64(width))
    # 0 marks an empty slot.
    return key if key != EMPTY else U64(1)


@nb.njit(nogil=True, cache=True)
def gram_keys(hashes: npt.NDArray[np.uint64], width: int) -> npt.NDArray[np.uint64]:
    """Key of every run of `width` word hashes."""
    keys = np.empty(max(0, hashes.shape[0] - width + 1), np.uint64)
    for i in range(keys.shape[0]):
        rolled = U64(0)
        for j in range(width):
            rolled = rolled * GRAM_FACTOR + hashes[i + j]
        keys[i] = _key(rolled, width)
    return keys


@nb.njit(nogil=True, cache=True)
def fill(
    table: npt.NDArray[np.uint64],
    values: npt.NDArray[np.int32],
    keys: npt.NDArray[np.uint64],
    owners: npt.NDArray[np.int32],
) -> None:
    """Enter keys with their owners into an empty open-addressing table; the first owner stays."""
    mask = table.shape[0] - 1
    for i in range(keys.shape[0]):
        slot = np.int64(keys[i] & U64(mask))
        while table[slot] != EMPTY and table[slot] != keys[i]:
            slot = (slot + 1) & mask
        if table[slot] == EMPTY:
            table[slot], values[slot] = keys[i], owners[i]


@nb.njit(inline="always")
def _find(table, values, key):
    mask = table.shape[0] - 1
    slot = np.int64(key & U64(mask))
    while table[slot] != EMPTY:
        if table[slot] == key:
            return values[slot]
        slot = (slot + 1) & mask
    return np.int32(-1)


@nb.njit(nogil=True, cache=True)
def hits(
    text: npt.NDArray[np.uint8],
    offsets: npt.NDArray[np.int64],
    widths: npt.NDArray[np.int64],
    table: npt.NDArray[np.uint64],
    values: npt.NDArray[np.int32],
) -> npt.NDArray[np.int64]:
    """(hits, 4): row, first word's end byte less its bytes, last word's end byte, owner.

    Bytes are counted from the start of the row. Rows in order; within a row by width, then place.
    """
    room = 1024
    hashes, lengths = np.empty(room, np.uint64), np.empty(room, np.int64)
    ends = np.empty(room, np.int64)
    found = np.empty((64, 4), np.int64)
    n = 0
    for row in range(offsets.shape[0] - 1):
        start, end = offsets[row], offsets[row + 1]
        if end - start + 1 > room:
            room = 2 * (end - start + 1)
            hashes, lengths = np.empty(room, np.uint64), np.empty(room, np.int64)
            ends = np.empty(room, np.int64)
        words, _ = words_of(text, start, end, hashes, lengths, ends)
        for k in range(widths.shape[0]):
            width = widths[k]
            top = U64(1)
            for _i in range(width - 1):
                top = top * GRAM_FACTOR
            rolled = U64(0)
            for i in range(words):
                if i >= width:
                    rolled -= hashes[i - width] * top
                rolled = rolled * GRAM_FACTOR + hashes[i]
                if i < width - 1:
                    continue
                owner = _find(table, values, _key(rolled, width))
                if owner < 0:
                    continue
                if n == found.shape[0]:
                    larger = np.empty((2 * n, 4), np.int64)
                    larger[:n] = found
                    found = larger
                first = i - width + 1
                # The word before ends where the gap before the first word begins.
                begin = ends[first - 1] if first else start
                found[n, 0], found[n, 1] = row, begin - start
                found[n, 2], found[n, 3] = ends[i] - start, owner
                n += 1
    return found[:n].copy()


@nb.njit(nogil=True, cache=True)
def first_rows(
    text: npt.NDArray[np.uint8],
    offsets: npt.NDArray[np.int64],
    width: int,
    table: npt.NDArray[np.uint64],
    values: npt.NDArray[np.int32],
    first: npt.NDArray[np.int64],
) -> None:
    """Write, for every shingle of `width` tokens that the table knows, the first row that has it.

    `first` begins with -1 everywhere and is indexed by the table's values.
    """
    tokens = np.empty(1024, np.uint64)
    for row in range(offsets.shape[0] - 1):
        start, end = offsets[row], offsets[row + 1]
        if end - start > tokens.shape[0]:
            tokens = np.empty(2 * (end - start), np.uint64)
        found = shingle_hashes(text, start, end, width, TOKENS, tokens)
        for i in range(found):
            number = _find(table, values, tokens[i])
            if number >= 0 and first[number] < 0:
                first[number] = row
