"""What a step trains on: micro-batches, and the stateless mixture of token files behind pretraining.

The position in the data is one integer, the number of the sample; every sample is found from it in
closed form, whatever the number of ranks and the size of micro-batches.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

BLOCK_SAMPLES = 4096
"""Samples within which a mixture holds its shares exactly."""
FEISTEL_ROUNDS = 4


@dataclass(frozen=True)
class Batch:
    """A micro-batch: tensors by name, and what it adds to the denominators of its step."""

    tensors: Mapping[str, Tensor]
    weights: Mapping[str, float]
    """Denominator -> share of this micro-batch, e.g. `{"tokens": 812}`. The loss gets the totals of
    the whole step over all ranks, and normalises by them."""
    tokens: int
    """Tokens that pass through the model, for the speed."""
    samples: Sequence[str] = ()
    """Names of the rows, for the message of a guard that stops the job."""

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def to(self, device: torch.device) -> "Batch":
        """The same on a device."""
        if device.type == "cpu":
            return self
        # From pinned memory the copy goes on while the next kernels are being launched.
        moved = {
            name: x.pin_memory().to(device, non_blocking=True) for name, x in self.tensors.items()
        }
        return Batch(moved, self.weights, self.tokens, self.samples)


@dataclass(frozen=True)
class MixPhase:
    """So many samples with one mixture."""

    samples: int
    shares: Sequence[float]
    """Share of each source; they need not add up to 1."""


class Mixture:
    """Sample number -> (source, window), in closed form.

    In every block of `BLOCK_SAMPLES` samples of a phase each source has its share, rounded to whole
    samples by largest remainder, in an order drawn for the block. A source gives its windows in an
    order drawn for each of its epochs, each window once per epoch, across phases.
    """

    def __init__(self, windows: Sequence[int], phases: Sequence[MixPhase], seed: int) -> None:
        """`windows` is the number of windows of each source.

        Raises ValueError for a share above 0 of a source without windows, or a phase without shares.
        """
        self.windows, self.seed = list(windows), seed
        self._phases: list[tuple[int, int, Ints, Ints]] = []
        self._permutations: dict[tuple[int, int], Permutation] = {}
        self._block: tuple[tuple[int, int], tuple[Ints, Ints]] | None = None
        start, used = 0, np.zeros(len(self.windows), np.int64)
        for number, phase in enumerate(phases):
            quotas = _quotas(phase.shares)
            if any(quota and not count for quota, count in zip(quotas, windows, strict=True)):
                raise ValueError(
                    f"phase {number} takes a share of a domain that has no tokens; leave it out of mix"
                )
            self._phases.append((start, phase.samples, quotas, used.copy()))
            blocks, rest = divmod(phase.samples, BLOCK_SAMPLES)
            used = used + blocks * quotas
            if rest:
                tail = self._sources(number, blocks, quotas)[:rest]
                used = used + np.bincount(tail, minlength=len(used))
            start += phase.samples
        self.samples = start
        self.used: Ints = used
        """Windows that the whole schedule takes of each source; over `windows`: its epochs."""

    def at(self, first: int, count: int) -> tuple[Ints, Ints]:
        """Source and window of the samples `first` to `first + count - 1`, (count,) each."""
        assert first + count <= self.samples, "sample behind the end of the schedule"
        sources: list[Ints] = []
        windows: list[Ints] = []
        while count:
            number = next(
                i for i, (start, size, _, _) in enumerate(self._phases) if first < start + size
            )
            start, size, _, _ = self._phases[number]
            block, offset = divmod(first - start, BLOCK_SAMPLES)
            taken = min(count, BLOCK_SAMPLES - offset, start + size - first)
            source, window = self._block_at(number, block)
            sources.append(source[offset : offset + taken])
            windows.append(window[offset : offset + taken])
            first, count = first + taken, count - taken
        return np.concatenate(sources), np.concatenate(windows)

    def _sources(self, phase: int, block: int, quotas: Ints) -> Ints:
        order = np.random.default_rng([self.seed, phase, block]).permutation(BLOCK_SAMPLES)
        return np.repeat(np.arange(len(quotas)), quotas)[order]

    def _block_at(self, phase: int, block: int) -> tuple[Ints, Ints]:
        if self._block is not None and self._block[0] == (phase, block):
            return self._block[1]
        _, _, quotas, used = self._phases[phase]
        sources = self._sources(phase, block, quotas)
        windows = np.empty(BLOCK_SAMPLES, np.int64)
        for source in np.flatnonzero(quotas):
            places = np.flatnonzero(sources == source)
            drawn = used[source] + block * quotas[source] + np.arange(len(places))
            epochs, ranks = np.divmod(drawn, self.windows[source])
            for epoch in np.unique(epochs):
                here = epochs == epoch
                windows[places[here]] = self._permutation(int(source), int(epoch))(ranks[here])
        self._block = ((phase, block), (sources, windows))
        return sources, windows

    def _permutation(self, source: int, epoch: int) -> "Permutation":
        if (source, epoch) not in self._permutations:
            entropy = [self.seed, source, epoch]
            self._permutations[source, epoch] = Permutation(self.windows[source], entropy)
        return self._permutations[source, epoch]


class Permutation:
    """A fixed order of 0..size-1 that is computed, not stored: a Feistel network with cycle walking.

    Source: Black and Rogaway 2002, section 3 (generalised Feistel cipher) and section 2 (walking).
    """

    def __init__(self, size: int, entropy: Sequence[int]) -> None:
        self.size = size
        self._half_bits = max(1, -(-max(size - 1, 1).bit_length() // 2))
        seeds = np.random.SeedSequence(list(entropy))
        self._keys = seeds.generate_state(FEISTEL_ROUNDS, np.uint64)

    def __call__(self, places: Ints) -> Ints:
        """Element at each place."""
        values = self._encrypt(places.astype(np.uint64))
        # The network permutes the next power of four; walk on until the value is below the size.
        outside = np.flatnonzero(values >= self.size)
        while len(outside):
            values[outside] = self._encrypt(values[outside])
            outside = outside[values[outside] >= self.size]
        return values.astype(np.int64)

    def _encrypt(self, values: Words) -> Words:
        bits, mask = np.uint64(self._half_bits), np.uint64((1 << self._half_bits) - 1)
        left, right = values >> bits, values & mask
        for key in self._keys:
            left, right = right, left ^ (_scramble(right ^ key) & mask)
        return (left << bits) | right


class Windows:
    """The windows of one stream of tokens: each token is a label in exactly one of them.

    Window w predicts tokens w x context to (w + 1) x context - 1, each from the ones before it in the
    window and the one before the window; before the first token of the stream stands an eos, since
    eos separates documents. The last window is filled up with the label -1.
    """

    def __init__(self, tokens: npt.NDArray[np.uint16 | np.uint32], context: int, eos: int) -> None:
        self.tokens, self.context, self.eos = np.asarray(tokens), context, eos
        # Window w > 0 is row w - 1 here, with the token before it; the last one may reach behind the end.
        behind = self.tokens[context - 1 :]
        whole = max(0, (len(behind) - 1) // context)
        self._whole = sliding_window_view(behind, context + 1)[::context] if whole else None
        self._end = whole + 1

    def __len__(self) -> int:
        return (len(self.tokens) + self.context - 1) // self.context

    def rows(self, windows: Ints) -> npt.NDArray[np.uint16 | np.uint32]:
        """The token before each window and its own, (len(windows), context + 1), as they are stored; what
        lies behind the end is any token."""
        if self._whole is not None and windows.min() > 0 and windows.max() < self._end:
            return self._whole[windows - 1]
        places = windows[:, None] * self.context + np.arange(-1, self.context)[None]
        row = self.tokens[places.clip(0, len(self.tokens) - 1)]
        row[places < 0] = self.eos
        return row

    def labels(self, windows: Ints) -> Ints:
        """Labels that each window has, (len(windows),): `context`, but for the last."""
        return np.minimum(self.context, len(self.tokens) - windows * self.context)

    def at(self, windows: Ints) -> tuple[Ints, Ints]:
        """Input ids and labels, (len(windows), context) each; the label is -1 behind the end."""
        row = self.rows(windows).astype(np.int64)
        return row[:, :-1], first_labels(row[:, 1:], self.labels(windows))


def first_labels(labels: Ints, counts: Ints) -> Ints:
    """Labels (B, T) of which only the first `counts` (B,) of each row count; the others are -1."""
    if not len(counts) or counts.min() == labels.shape[1]:
        return labels
    return np.where(np.arange(labels.shape[1]) < counts[:, None], labels, -1)


def uniform_draws(seed: int, numbers: Ints) -> npt.NDArray[np.float64]:
    """A number in [0, 1) for each of the numbers, as if drawn evenly; a pure function of seed and number."""
    key = np.random.SeedSequence([seed]).generate_state(1, np.uint64)
    bits = _scramble(_scramble(numbers.astype(np.uint64)) + key)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def micro_batch_rows(rows: Ints, rank: int, world: int, micro_batch: int) -> list[Ints]:
    """This rank's rows of a step, cut into micro-batches; 0 takes all at once.

    All ranks have as many: those that spread weights would wait for one another for ever. Raises
    ValueError when there is not a row for every rank and micro-batch.
    """
    own = rows[rank::world]
    fewest, most = len(rows) // world, -(-len(rows) // world)
    size = micro_batch or max(1, most)
    count = -(-most // size)
    if fewest < max(1, count):
        raise ValueError(
            f"a step of {len(rows)} sequences cannot be split over {world} processes in micro-batches of "
            f"{size}; use fewer processes, larger micro-batches or more tokens per step"
        )
    parts = [own[start : start + size] for start in range(0, len(own), size)]
    return parts if len(parts) == count else np.array_split(own, count)


def _quotas(shares: Sequence[float]) -> Ints:
    """Whole samples per block and source, by largest remainder; they add up to the block."""
    weights = np.asarray(shares, np.float64)
    if (weights < 0).any() or not weights.sum() > 0:
        raise ValueError(f"shares {list(shares)} of a mixture must be 0 or more, one above 0")
    exact = weights / weights.sum() * BLOCK_SAMPLES
    quotas = np.floor(exact).astype(np.int64)
    missing = BLOCK_SAMPLES - int(quotas.sum())
    order = np.argsort(-(exact - quotas), kind="stable")
    quotas[order[:missing]] += 1
    return quotas


def _scramble(values: Words) -> Words:
    """Source: Steele et al. 2014, the mixing function of SplitMix64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
