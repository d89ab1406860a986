"""Compiled walk of a language model's automaton over the bytes of a text."""

# numba's decorators and arrays carry no types that pyright could follow
# pyright: basic

import numba as nb
import numpy as np
import numpy.typing as npt

LANES = 8
"""Texts that are walked in turns: each waits for memory at every byte, together they wait once."""


@nb.njit(nogil=True, cache=True)
def visit(
    text: npt.NDArray[np.uint8],
    ends: npt.NDArray[np.int64],
    moves: npt.NDArray[np.uint32],
    rows: npt.NDArray[np.int64],
    features: npt.NDArray[np.int32],
    visited: npt.NDArray[np.int32],
    counts: npt.NDArray[np.float32],
) -> npt.NDArray[np.int64]:
    """Write the features met on the way through every text, each once in order of the first meeting, and how
    often each was; returns how many were met in each text.

    `text` is the texts one behind the other, `ends` where they end; both results have room for one feature a
    byte, a text's begin where its bytes begin. From a state, byte b leads to `moves[rows[state] + b]`;
    `features` has what a state stands for, -1 for nothing.
    """
    found = np.zeros(ends.shape[0], np.int64)
    for first in range(0, ends.shape[0], LANES):
        last = min(first + LANES, ends.shape[0])
        _walk(text, ends, first, last, moves, rows, features, visited, found)
    for i in range(ends.shape[0]):
        start = ends[i - 1] if i else 0
        found[i] = _tally(visited[start : start + found[i]], counts[start:])
    return found


@nb.njit(nogil=True, cache=True)
def _walk(
    text: npt.NDArray[np.uint8],
    ends: npt.NDArray[np.int64],
    first: int,
    last: int,
    moves: npt.NDArray[np.uint32],
    rows: npt.NDArray[np.int64],
    features: npt.NDArray[np.int32],
    visited: npt.NDArray[np.int32],
    found: npt.NDArray[np.int64],
) -> None:
    """Every feature met, in order, repeated ones too."""
    starts, states = np.zeros(last - first, np.int64), np.zeros(last - first, np.int64)
    longest = 0
    for lane in range(last - first):
        starts[lane] = ends[first + lane - 1] if first + lane else 0
        longest = max(longest, ends[first + lane] - starts[lane])
    for step in range(longest):
        for lane in range(last - first):
            place = starts[lane] + step
            if place < ends[first + lane]:
                state = np.int64(moves[rows[states[lane]] + text[place]])
                states[lane] = state
                if features[state] >= 0:
                    visited[starts[lane] + found[first + lane]] = features[state]
                    found[first + lane] += 1


@nb.njit(nogil=True, cache=True)
def _tally(visited: npt.NDArray[np.int32], counts: npt.NDArray[np.float32]) -> int:
    """Leave each feature once, in order, with its count; returns how many are left."""
    slots = 16
    while slots < 2 * visited.shape[0]:
        slots *= 2
    place_of = np.full(slots, -1, np.int32)
    found = 0
    for i in range(visited.shape[0]):
        feature = visited[i]
        slot = (np.int64(feature) * 40503) & (slots - 1)
        while place_of[slot] >= 0 and visited[place_of[slot]] != feature:
            slot = (slot + 1) & (slots - 1)
        if place_of[slot] < 0:
            place_of[slot], visited[found], counts[found] = found, feature, 0
            found += 1
        counts[place_of[slot]] += 1
    return found
