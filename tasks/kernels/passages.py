"""Compiled search for long runs of tokens that several documents have.

Every run of `width` tokens has an anchor: the least hash of the shorter runs inside it, chosen by their
content alone, so equal runs have equal anchors wherever they stand. Only runs whose anchor several
documents have are looked at one by one. Source: Schleimer, Wilkerson and Aiken 2003 (winnowing).
"""

# numba's decorators and arrays carry no types that pyright could follow
# pyright: basic

import numba as nb
import numpy as np
import numpy.typing as npt

from tasks.kernels.minhash import RUN, SINGLE, TOKENS, _kind_for, shingle_hashes
from tasks.kernels.words import code_point

U64 = np.uint64


@nb.njit(nogil=True, cache=True)
def _least_places(grams, count, window, places):
    """Write, for every `window` grams in a row, the place of the last least one; how many windows."""
    windows = count - window + 1
    queue = np.empty(max(count, 1), np.int64)
    head, tail = 0, 0
    for i in range(count):
        while tail > head and grams[queue[tail - 1]] >= grams[i]:
            tail -= 1
        queue[tail] = i
        tail += 1
        if queue[head] <= i - window:
            head += 1
        if i >= window - 1:
            places[i - window + 1] = queue[head]
    return max(0, windows)


@nb.njit(nogil=True, cache=True)
def anchors(
    text: npt.NDArray[np.uint8], offsets: npt.NDArray[np.int64], width: int
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]]:
    """The anchors of every row, neighbours alike left out, and where each row's end."""
    inner = width // 2
    out, total = np.empty(1024, np.uint64), 0
    ends = np.empty(offsets.shape[0] - 1, np.int64)
    for row in range(ends.shape[0]):
        start, end = offsets[row], offsets[row + 1]
        grams = np.empty(end - start + 1, np.uint64)
        count = shingle_hashes(text, start, end, inner, TOKENS, grams)
        places = np.empty(max(count, 1), np.int64)
        windows = _least_places(grams, count, width - inner + 1, places)
        if total + windows > out.shape[0]:
            larger = np.empty(2 * (total + windows), np.uint64)
            larger[:total] = out[:total]
            out = larger
        for i in range(windows):
            if i == 0 or places[i] != places[i - 1]:
                out[total] = grams[places[i]]
                total += 1
        ends[row] = total
    return out[:total].copy(), ends


@nb.njit(nogil=True, cache=True)
def _spans(text, start, end, begins, ends):
    """Write first character and the one after the last, from the row's start, of every token."""
    found, position, i = 0, 0, start
    is_in_run = False
    while i < end:
        cp, bytes_ = code_point(text, i)
        kind = _kind_for(cp, TOKENS)
        if kind == SINGLE or (kind == RUN and not is_in_run):
            begins[found] = position
            found += 1
        is_in_run = kind == RUN
        position += 1
        if kind in (RUN, SINGLE):
            ends[found - 1] = position
        i += bytes_
    return found


@nb.njit(nogil=True, cache=True)
def runs(
    text: npt.NDArray[np.uint8],
    offsets: npt.NDArray[np.int64],
    width: int,
    shared: npt.NDArray[np.uint64],
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]]:
    """Every run of `width` tokens whose anchor is among `shared` (sorted): its hash; row, start, end.

    Start and end are in characters of the row's text.
    """
    inner = width // 2
    hashes, where, total = np.empty(1024, np.uint64), np.empty((1024, 3), np.int64), 0
    for row in range(offsets.shape[0] - 1):
        start, end = offsets[row], offsets[row + 1]
        size = end - start + 1
        grams, wide = np.empty(size, np.uint64), np.empty(size, np.uint64)
        count = shingle_hashes(text, start, end, inner, TOKENS, grams)
        places = np.empty(max(count, 1), np.int64)
        windows = _least_places(grams, count, width - inner + 1, places)
        if windows == 0:
            continue
        shingle_hashes(text, start, end, width, TOKENS, wide)
        begins, ends = np.empty(size, np.int64), np.empty(size, np.int64)
        _spans(text, start, end, begins, ends)
        if total + windows > hashes.shape[0]:
            room = 2 * (total + windows)
            larger, wider = np.empty(room, np.uint64), np.empty((room, 3), np.int64)
            larger[:total], wider[:total] = hashes[:total], where[:total]
            hashes, where = larger, wider
        is_shared = False
        for i in range(windows):
            if i == 0 or places[i] != places[i - 1]:
                anchor = grams[places[i]]
                found = np.searchsorted(shared, anchor)
                is_shared = found < shared.shape[0] and shared[found] == anchor
            if is_shared:
                hashes[total] = wide[i]
                where[total, 0], where[total, 1] = row, begins[i]
                where[total, 2] = ends[i + width - 1]
                total += 1
    return hashes[:total].copy(), where[:total].copy()
