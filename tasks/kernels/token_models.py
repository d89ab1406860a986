"""Compiled counts of one, two and three token ids in a row, and how surprising a document is by them.

Pairs and triples are addressed by hash; those that share a place share its count.
"""

# numba's decorators and arrays carry no types that pyright could follow
# pyright: basic

import numba as nb
import numpy as np

from tasks.kernels.words import GRAM_FACTOR, U64, mix64

PLACE_BITS = 24
WEIGHTS = (0.1, 0.4, 0.5)
"""Of one, two and three tokens in the interpolated probability (Jelinek and Mercer 1980)."""


@nb.njit(inline="always")
def _place(first, second, third, places):
    x = (U64(first + 1) * GRAM_FACTOR + U64(second + 1)) * GRAM_FACTOR + U64(third)
    return np.int64(mix64(x) & U64(places - 1))


@nb.njit(nogil=True, cache=True)
def count(ids, ends, eos, singles, contexts, pairs, pair_contexts, triples):
    """Add the tokens of documents to the counts; each begins after two `eos` and its own is not counted.

    `singles` and `contexts` are (vocabulary,): how often a token occurs, and how often one follows it;
    the others have a power of two of places.
    """
    start = 0
    for end in ends:
        before, last = eos, eos
        for i in range(start, np.int64(end) - 1):
            token = np.int64(ids[i])
            singles[token] += 1
            contexts[last] += 1
            pairs[_place(0, last, token, pairs.shape[0])] += 1
            pair_contexts[_place(0, before, last, pairs.shape[0])] += 1
            triples[_place(before + 1, last, token, pairs.shape[0])] += 1
            before, last = last, token
        start = np.int64(end)


@nb.njit(nogil=True, cache=True)
def surprise(ids, ends, eos, out, singles, contexts, pairs, pair_contexts, triples):
    """Write per document the mean -ln P of its tokens by one, two and three tokens, and the sum by one.

    P of one token is (count + 1) / (all + vocabulary); more tokens are interpolated, and what never was a
    context leaves the weight to fewer. 0 for a document without a token.
    """
    total = singles.sum() + singles.shape[0]
    start = 0
    for row in range(ends.shape[0]):
        before, last = eos, eos
        nats = np.zeros(3)
        end = np.int64(ends[row]) - 1
        for i in range(start, end):
            token = np.int64(ids[i])
            p_1 = (singles[token] + 1) / total
            p_2, p_3 = p_1, 0.0
            if contexts[last]:
                p_2 = min(1.0, pairs[_place(0, last, token, pairs.shape[0])] / contexts[last])
            p_3 = p_2
            context = pair_contexts[_place(0, before, last, pairs.shape[0])]
            if context:
                p_3 = min(1.0, triples[_place(before + 1, last, token, pairs.shape[0])] / context)
            nats[0] -= np.log(p_1)
            low = WEIGHTS[0] * p_1 + WEIGHTS[1] * p_2
            nats[1] -= np.log(low / (WEIGHTS[0] + WEIGHTS[1]))
            nats[2] -= np.log(low + WEIGHTS[2] * p_3)
            before, last = last, token
        tokens = max(1, end - start)
        out[row, 0], out[row, 1], out[row, 2] = nats[0] / tokens, nats[1] / tokens, nats[2] / tokens
        out[row, 3] = nats[0]
        start = end + 1
