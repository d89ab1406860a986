"""Compiled models of words: counts of one to three words, and a linear classifier over one and two.

Both live in arrays that are addressed by hash; words that share a place share its count.
"""

# numba's decorators and arrays carry no types that pyright could follow
# pyright: basic

import numba as nb
import numpy as np

from tasks.kernels.characters import words_of
from tasks.kernels.words import GRAM_FACTOR, U64, mix64

SINGLE_BITS, PAIR_BITS, TRIPLE_BITS, FEATURE_BITS = 20, 22, 22, 18
WEIGHTS = (0.1, 0.4, 0.5)
"""Of one, two and three words in the interpolated probability (Jelinek and Mercer 1980)."""
VOCABULARY = 1 << 20
EPOCHS = 5
RATE = 0.5


@nb.njit(inline="always")
def _place(x, bits):
    return np.int64(mix64(x) >> U64(64 - bits))


@nb.njit(inline="always")
def _pair(first, second):
    return first * GRAM_FACTOR + second


@nb.njit(nogil=True, cache=True)
def _words(text, start, end):
    room = end - start + 1
    hashes, lengths = np.empty(room, np.uint64), np.empty(room, np.int32)
    found, _ = words_of(text, start, end, hashes, lengths, np.empty(0, np.int64))
    return hashes[:found]


@nb.njit(nogil=True, cache=True)
def count_words(text, offsets, singles, pairs, triples):
    """Add the words of every row to the counts; a text begins with two empty words."""
    for row in range(offsets.shape[0] - 1):
        before, last = U64(0), U64(0)
        for word in _words(text, offsets[row], offsets[row + 1]):
            singles[_place(word, SINGLE_BITS)] += 1
            pairs[_place(_pair(last, word), PAIR_BITS)] += 1
            triples[_place(_pair(_pair(before, last), word), TRIPLE_BITS)] += 1
            before, last = last, word


@nb.njit(inline="always")
def _probability(single, pair, triple, last_single, last_pair, total):
    p = (single + 1.0) / (total + VOCABULARY)
    by_pair = pair / last_single if last_single else p
    by_triple = triple / last_pair if last_pair else by_pair
    return WEIGHTS[0] * p + WEIGHTS[1] * min(by_pair, 1.0) + WEIGHTS[2] * min(by_triple, 1.0)


@nb.njit(nogil=True, cache=True)
def bits_per_word(text, offsets, singles, pairs, triples, out):
    """Mean -log2 probability of the words of every row; NaN without a word."""
    total = singles.sum()
    for row in range(offsets.shape[0] - 1):
        before, last = U64(0), U64(0)
        bits = 0.0
        words = _words(text, offsets[row], offsets[row + 1])
        for word in words:
            bits -= np.log2(
                _probability(
                    singles[_place(word, SINGLE_BITS)],
                    pairs[_place(_pair(last, word), PAIR_BITS)],
                    triples[_place(_pair(_pair(before, last), word), TRIPLE_BITS)],
                    singles[_place(last, SINGLE_BITS)],
                    pairs[_place(_pair(before, last), PAIR_BITS)],
                    total,
                )
            )
            before, last = last, word
        out[row] = bits / words.shape[0] if words.shape[0] else np.nan


@nb.njit(nogil=True, cache=True)
def _features(text, start, end):
    """Places of the words and pairs of words, with repeats."""
    words = _words(text, start, end)
    places = np.empty(2 * words.shape[0], np.int32)
    last = U64(0)
    for i in range(words.shape[0]):
        places[2 * i] = _place(words[i], FEATURE_BITS)
        places[2 * i + 1] = _place(_pair(last, words[i]), FEATURE_BITS)
        last = words[i]
    return places


@nb.njit(inline="always")
def _margin(weights, places):
    """The mean weight of the features plus the bias, which is the last weight."""
    total = 0.0
    for place in places:
        total += weights[place]
    return total / np.sqrt(places.shape[0]) + weights[-1] if places.shape[0] else weights[-1]


@nb.njit(nogil=True, cache=True)
def train(text, offsets, labels, orders, weights):
    """Logistic regression by stochastic gradient descent, rows in the given orders (epochs, rows).

    `labels` are 1.0 and 0.0; the rate falls to 0 over all steps.
    """
    steps = orders.shape[0] * orders.shape[1]
    step = 0
    for epoch in range(orders.shape[0]):
        for row in orders[epoch]:
            places = _features(text, offsets[row], offsets[row + 1])
            error = labels[row] - 1.0 / (1.0 + np.exp(-_margin(weights, places)))
            rate = RATE * (1.0 - step / steps)
            step += 1
            weights[-1] += rate * error
            for place in places:
                weights[place] += rate * error / np.sqrt(places.shape[0])


@nb.njit(nogil=True, cache=True)
def margins(text, offsets, weights, out):
    """Log-odds of every row to be of label 1; NaN without a word."""
    for row in range(offsets.shape[0] - 1):
        places = _features(text, offsets[row], offsets[row + 1])
        out[row] = _margin(weights, places) if places.shape[0] else np.nan
