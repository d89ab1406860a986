"""Compiled search for the most similar earlier document by TF-IDF.

Every document is a vector of its distinct shingles, weight count times rarity, of length 1. Two with a cosine of
at least t have a shingle in common among those left when the commonest ones, with a squared weight of
less than t^2 in all, are set aside: only these are looked up. Nothing above t is missed. Source:
Bayardo, Ma and Srikant 2007 (all-pairs similarity search), with both sides cut.
"""

# numba's decorators and arrays carry no types that pyright could follow
# pyright: basic

import numba as nb
import numpy as np
import numpy.typing as npt

from tasks.kernels.minhash import rarity_of, shingle_hashes

U64 = np.uint64


@nb.njit(nogil=True, cache=True)
def vectors(
    text: npt.NDArray[np.uint8],
    offsets: npt.NDArray[np.int64],
    shingle_tokens: int,
    how: int,
    known: npt.NDArray[np.uint64],
    rarity: npt.NDArray[np.float64],
    rarest: float,
    floor: float,
) -> tuple[
    npt.NDArray[np.uint64], npt.NDArray[np.float64], npt.NDArray[np.bool_], npt.NDArray[np.int64]
]:
    """Sorted distinct shingles of every row, their weights, whether each is looked up, and the rows' ends."""
    room = max(1024, offsets[-1] - offsets[0])
    values, weights = np.empty(room, np.uint64), np.empty(room, np.float64)
    is_looked_up = np.zeros(room, np.bool_)
    ends = np.empty(offsets.shape[0] - 1, np.int64)
    total = 0
    for row in range(ends.shape[0]):
        first = total
        tokens = np.empty(offsets[row + 1] - offsets[row], np.uint64)
        found = shingle_hashes(text, offsets[row], offsets[row + 1], shingle_tokens, how, tokens)
        ordered = np.sort(tokens[:found])
        commonness = np.empty(found, np.float64)
        i = 0
        squares = 0.0
        while i < found:
            value, begin = ordered[i], i
            while i < found and ordered[i] == value:
                i += 1
            rare = rarity_of(value, known, rarity, rarest)
            values[total], weights[total] = value, (i - begin) * rare
            commonness[total - first] = rare
            squares += weights[total] ** 2
            total += 1
        size = total - first
        # From common to rare; among equally rare ones by hash, which the sort keeps in order.
        order = np.argsort(commonness[:size], kind="mergesort")
        aside = 0.0
        for k in range(size):
            place = first + order[k]
            weights[place] /= np.sqrt(squares)
            aside += weights[place] ** 2
            # A little less than t^2: sums of rounded numbers must not set one too many aside.
            is_looked_up[place] = aside >= floor * floor * (1 - 1e-9)
        ends[row] = total
    return values[:total].copy(), weights[:total].copy(), is_looked_up[:total].copy(), ends


@nb.njit(nogil=True, cache=True)
def _cosine(values, weights, i, i_end, j, j_end):
    """Sum of the products of the weights of common shingles."""
    total = 0.0
    while i < i_end and j < j_end:
        if values[i] == values[j]:
            total += weights[i] * weights[j]
            i += 1
            j += 1
        elif values[i] < values[j]:
            i += 1
        else:
            j += 1
    return total


@nb.njit(nogil=True, cache=True)
def nearest_earlier(
    values: npt.NDArray[np.uint64],
    weights: npt.NDArray[np.float64],
    chains: npt.NDArray[np.int64],
    chain_count: int,
    begins: npt.NDArray[np.int64],
    ends: npt.NDArray[np.int64],
    first_new: int,
    nearest: npt.NDArray[np.int64],
    similarity: npt.NDArray[np.float64],
) -> int:
    """Write, for every document from `first_new` on, the earlier one with the largest cosine, and it.

    `chains`: for every shingle the number of its look-up list, or -1. -1 and 0 where nothing is shared; the
    earliest of equals. Returns how many pairs were compared.
    """
    head = np.full(chain_count, -1, np.int64)
    following = np.full(values.shape[0], -1, np.int64)
    owner = np.empty(values.shape[0], np.int64)
    seen_by = np.full(begins.shape[0], -1, np.int64)
    compared = 0
    for p in range(begins.shape[0]):
        nearest[p], similarity[p] = -1, 0.0
        for place in range(begins[p], ends[p]):
            chain = chains[place]
            if chain < 0:
                continue
            entry = head[chain] if p >= first_new else -1
            while entry >= 0:
                other = owner[entry]
                if seen_by[other] != p:
                    seen_by[other] = p
                    compared += 1
                    cosine = _cosine(
                        values, weights, begins[p], ends[p], begins[other], ends[other]
                    )
                    is_nearer = cosine > similarity[p]
                    if is_nearer or (cosine == similarity[p] and other < nearest[p]):
                        nearest[p], similarity[p] = other, cosine
                entry = following[entry]
            owner[place] = p
            following[place] = head[chain]
            head[chain] = place
    return compared
