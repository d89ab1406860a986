"""Compiled walk of a language model's automaton over the bytes of a text."""

# numba's decorators and arrays carry no types that pyright could follow
# pyright: basic

import numba as nb
import numpy as np
import numpy.typing as npt


@nb.njit(nogil=True, cache=True)
def visit(
    text: npt.NDArray[np.uint8],
    moves: npt.NDArray[np.uint32],
    rows: npt.NDArray[np.int64],
    features: npt.NDArray[np.int32],
    visited: npt.NDArray[np.int32],
    counts: npt.NDArray[np.float32],
) -> int:
    """Write the features met on the way, each once in order of the first meeting, and how often each was.

    From a state, byte b leads to `moves[rows[state] + b]`; `features` has what a state stands for, -1 for
    nothing. Both results have room for one feature a byte; returns how many were met.
    """
    slots = 16
    while slots < 2 * text.shape[0]:
        slots *= 2
    place_of = np.full(slots, -1, np.int32)
    state, found = np.int64(0), 0
    for i in range(text.shape[0]):
        state = np.int64(moves[rows[state] + text[i]])
        feature = features[state]
        if feature < 0:
            continue
        slot = (np.int64(feature) * 40503) & (slots - 1)
        while place_of[slot] >= 0 and visited[place_of[slot]] != feature:
            slot = (slot + 1) & (slots - 1)
        if place_of[slot] < 0:
            place_of[slot], visited[found], counts[found] = found, feature, 0
            found += 1
        counts[place_of[slot]] += 1
    return found
