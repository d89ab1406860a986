"""What counting alone achieves: n-gram models and xz on the held-out documents, to measure a model against."""

import lzma
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.checkpoint import ReadWindows
from storage.tokens import TokenFiles

TokenArray = NDArray[np.integer[Any]]

HASH_MULTIPLIER = 0x9E3779B97F4A7C15


class KneserNey:
    """Interpolated Kneser-Ney over tokens, one discount an order (Chen and Goodman 1999, section 4.1.6).

    The highest order uses counts, the lower ones the number of distinct tokens before; the discount of
    an order is n1 / (n1 + 2 n2) of its own counts, and the recursion ends in the uniform distribution.
    """

    def __init__(self, tokens: TokenArray, *, order: int, vocabulary: int) -> None:
        """`tokens` is one array with the separator after every document."""
        self.order, self.vocabulary = order, vocabulary
        self._levels = [
            _Level(tokens, size, is_highest=size == order) for size in range(1, order + 1)
        ]

    def nats(self, tokens: TokenArray) -> NDArray[np.float64]:
        """-log P of every token but the first, each given up to order - 1 tokens before it."""
        probability = np.full(len(tokens) - 1, 1.0 / self.vocabulary)
        for level in self._levels:
            probability = level.interpolate(tokens, probability)
        return -np.log(probability)


class _Level:
    """Counts of all n-grams of one size, as sorted hashes."""

    def __init__(self, tokens: TokenArray, size: int, *, is_highest: bool) -> None:
        self.size = size
        if is_highest:
            grams = _hashes(tokens, size)
            self.grams, first, counts = np.unique(grams, return_index=True, return_counts=True)
            contexts = _hashes(tokens, size - 1)[: len(grams)][first]
        else:
            _, longer = np.unique(_hashes(tokens, size + 1), return_index=True)
            grams = _hashes(tokens, size)[1:][longer]
            self.grams, first, counts = np.unique(grams, return_index=True, return_counts=True)
            contexts = _hashes(tokens, size - 1)[1 : len(tokens)][longer][first]
        self.counts = counts.astype(np.float64)
        ones, twos = (counts == 1).sum(), (counts == 2).sum()
        self.discount = float(ones / (ones + 2 * twos)) if ones and twos else 0.5
        self.contexts, inverse = np.unique(contexts, return_inverse=True)
        self.totals = np.bincount(inverse, self.counts).astype(np.float64)
        self.kinds = np.bincount(inverse).astype(np.float64)

    def interpolate(self, tokens: TokenArray, lower: NDArray[np.float64]) -> NDArray[np.float64]:
        probability = lower.copy()
        grams = _hashes(tokens, self.size)
        reach = len(tokens) - max(self.size, 2) + 1
        if reach <= 0:
            return probability
        grams = grams[len(grams) - reach :]
        before = _hashes(tokens, self.size - 1)
        before = before[len(before) - reach - 1 : len(before) - 1]
        count = _look_up(self.grams, self.counts, grams)
        total = _look_up(self.contexts, self.totals, before)
        kinds = _look_up(self.contexts, self.kinds, before)
        tail = slice(len(lower) - reach, None)
        with np.errstate(divide="ignore", invalid="ignore"):
            mixed = (
                np.maximum(count - self.discount, 0) + self.discount * kinds * lower[tail]
            ) / total
        probability[tail] = np.where(total > 0, mixed, lower[tail])
        return probability


def tokens_read(files: TokenFiles, read: ReadWindows | None) -> TokenArray:
    """The training tokens that a checkpoint has read, each once; all of them where it keeps no list."""
    parts: list[TokenArray] = []
    for domain in files.domains:
        tokens: TokenArray = files.tokens(domain, "train")
        if read is not None:
            packed = np.frombuffer(read.bits(domain), np.uint8)
            windows = np.unpackbits(packed, bitorder="little").astype(np.bool_)
            is_read = np.repeat(windows, read.row_tokens)
            tokens = tokens[: len(is_read)][is_read[: len(tokens)]]
        parts.append(tokens)
    return np.concatenate(parts)


def _hashes(tokens: TokenArray, size: int) -> NDArray[np.uint64]:
    """64-bit hash of every window of `size` tokens; windows of size 0 are all one (len + 1 of them)."""
    count = len(tokens) - size + 1
    out = np.zeros(max(count, 0), np.uint64)
    for offset in range(size):
        out = (out + tokens[offset : offset + count].astype(np.uint64) + np.uint64(1)) * np.uint64(
            HASH_MULTIPLIER
        )
        out ^= out >> np.uint64(31)
    return out


def _look_up(
    keys: NDArray[np.uint64], values: NDArray[np.float64], wanted: NDArray[np.uint64]
) -> NDArray[np.float64]:
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0.0)


def xz_bits_per_byte(documents: Iterable[bytes]) -> float:
    """8 x compressed / raw size of all documents together under `xz -9`."""
    raw = b"\n".join(documents)
    return 8 * len(lzma.compress(raw, preset=9)) / len(raw)
