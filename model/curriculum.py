"""What of the data a step of pretraining meets: how difficult, how long, with which labels.

Everything is a function of the step, so that a run goes on where it was broken. An order by the model's
own loss, which is none, is written to a file before the first step that uses it.
"""

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from conf.curriculum import CurriculumConfig
from model.batches import Ints, Windows, uniform_draws
from model.ranks import Ranks
from storage.tokens import TokenFiles

Floats = npt.NDArray[np.float64]
WindowLosses = Callable[[Windows], Floats]
"""Mean nats per label of every window, (windows,), by the model as it is; all ranks call it."""

COUNTED_TOKENS = 1 << 26
"""At most so many tokens of a domain, spread evenly over it, tell how frequent each id is."""
COUNTED_AT_ONCE = 1 << 16


class Curriculum:
    """The settings' curriculum over a training of `steps` steps of `rows` rows each."""

    def __init__(
        self,
        settings: CurriculumConfig,
        files: TokenFiles,
        windows: Mapping[str, Windows],
        *,
        steps: int,
        rows: int,
        seed: int,
    ) -> None:
        """`windows` are those of each domain, in the order in which samples number their domains.

        Raises ValueError for a difficulty column that is not there or holds what is no number.
        """
        self._settings, self._rows, self._seed = settings, rows, seed
        self._steps, self._windows = steps, windows
        self._by_loss: list[Ints] = []
        self._by_column: list[Ints] = []
        if settings.difficulty:
            self._by_column = [
                easiest_first(window_difficulties(files, name, settings.difficulty, own))
                for name, own in windows.items()
            ]
        self._frequency = frequency_ranks(files, windows) if settings.first_vocabulary < 1 else None

    def prepare(self, step: int, folder: Path, losses: WindowLosses, ranks: Ranks) -> None:
        """Order the windows by the model's loss, if this is the step for it or it was before.

        Called before the rows of a step are taken; `folder` keeps the losses for a resumed job.
        """
        switch = self._switch
        if switch is None or step < switch or (self._by_loss and step > switch):
            return
        path = folder / "window_losses.npz"
        if step == switch:
            found = {str(i): losses(own) for i, own in enumerate(self._windows.values())}
            if ranks.is_first:
                _write(path, found)
        else:
            with np.load(path, allow_pickle=False) as kept:
                found = {name: kept[name] for name in kept.files}
        self._by_loss = [easiest_first(found[str(i)]) for i in range(len(self._windows))]

    def choose(self, numbers: Ints, sources: Ints, windows: Ints) -> Ints:
        """The windows of samples, (n,): `windows`, which are the usual ones, once competence is 1.

        `numbers` are those of the samples in the whole training, `sources` those of their domains.
        """
        kind = self._settings.competence
        if kind == "off":
            return windows
        steps, until = numbers // self._rows, self._step(self._settings.until)
        if steps[0] >= until:
            return windows
        shares = competence(steps / until, kind, self._settings.first_share)
        uniform = uniform_draws(self._seed, numbers)
        is_switched = steps >= (self._steps if self._switch is None else self._switch)
        chosen = windows.copy()
        for orders, is_ordered in ((self._by_column, ~is_switched), (self._by_loss, is_switched)):
            for source, order in enumerate(orders):
                here = is_ordered & (shares < 1) & (sources == source)
                easiest = np.ceil(shares[here] * len(order) - 1e-9)
                chosen[here] = order[(uniform[here] * easiest).astype(np.int64)]
        return chosen

    def row_tokens(self, step: int, context: int) -> int:
        """Length of the rows of a step."""
        first = self._settings.first_row_tokens
        if not first:
            return context
        doublings = (context // first).bit_length() - 1
        return first << min(doublings, doublings * step // self._step(self._settings.length_until))

    def without_rare(self, step: int, labels: Ints) -> Ints:
        """Labels, with -1 where the token is still too rare."""
        if self._frequency is None:
            return labels
        until = self._step(self._settings.vocabulary_until)
        if step >= until:
            return labels
        first = self._settings.first_vocabulary
        share = first + (1 - first) * step / until
        known = math.ceil(share * len(self._frequency) - 1e-9)
        return np.where((labels >= 0) & (self._frequency[labels] < known), labels, -1)

    def breaks(self, context: int) -> frozenset[int]:
        """Steps whose data differ in kind from those of the step before."""
        lengths = [self.row_tokens(step, context) for step in range(self._steps)]
        changes = {step for step in range(1, self._steps) if lengths[step] != lengths[step - 1]}
        return frozenset(changes if self._switch is None else changes | {self._switch})

    @property
    def _switch(self) -> int | None:
        share = self._settings.perplexity_at
        return None if share is None else round(share * self._steps)

    def _step(self, share: float) -> int:
        return max(1, round(share * self._steps))


def competence(progress: Floats, kind: Literal["linear", "sqrt"], first: float) -> Floats:
    """Share of the data that takes part, (n,), when so much of the way to all of it is behind.

    Source: Platanios et al. 2019, section 3.2: c(t) = (t (1 - c0^p) / T + c0^p)^(1/p), at most 1, with
    p = 1 (linear) and p = 2 (square root).
    """
    power = {"linear": 1, "sqrt": 2}[kind]
    least = first**power
    return np.minimum(1.0, (progress * (1 - least) + least) ** (1 / power))


def easiest_first(difficulties: Floats) -> Ints:
    """Numbers of the windows, the easiest first; of equals the earlier first."""
    return np.argsort(difficulties, kind="stable")


def window_difficulties(files: TokenFiles, domain: str, column: str, windows: Windows) -> Floats:
    """Mean difficulty of the tokens of each window, (windows,): a token's is that of its document.

    Raises ValueError for a column that is not there, or holds what is no finite number.
    """
    if not len(windows):
        return np.empty(0)
    values = files.difficulty(domain, column).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError(
            f"difficulty column {column!r} of domain {domain!r} is no finite number for document "
            f"{int(np.flatnonzero(~np.isfinite(values))[0])}; make the tokens anew, or take another column"
        )
    ends = np.concatenate([[0.0], files.ends(domain, "train").astype(np.float64)])
    totals = np.concatenate([[0.0], np.cumsum(values * np.diff(ends))])
    # Between two document ends the sum over the tokens so far is a straight line.
    borders = np.minimum(np.arange(len(windows) + 1) * windows.context, len(windows.tokens))
    return np.diff(np.interp(borders, ends, totals)) / np.diff(borders)


def frequency_ranks(files: TokenFiles, windows: Mapping[str, Windows]) -> Ints:
    """Place of every token id, (vocabulary,), in the order of how often it occurs in the domains,
    0 for the most frequent; of equals the smaller id first."""
    vocabulary = files.meta.vocabulary
    counts = np.zeros(vocabulary, np.int64)
    for own in windows.values():
        pieces = -(-len(own.tokens) // COUNTED_AT_ONCE)
        every = max(1, -(-pieces * COUNTED_AT_ONCE // COUNTED_TOKENS))
        for start in range(0, len(own.tokens), every * COUNTED_AT_ONCE):
            part = own.tokens[start : start + COUNTED_AT_ONCE]
            counts += np.bincount(part, minlength=vocabulary)
    ranks = np.empty(vocabulary, np.int64)
    ranks[np.argsort(-counts, kind="stable")] = np.arange(vocabulary)
    return ranks


def _write(path: Path, losses: Mapping[str, Floats]) -> None:
    draft = path.with_suffix(".draft")
    with draft.open("wb") as stream:
        np.savez(stream, **losses)  # type: ignore[arg-type]
        stream.flush()
        os.fsync(stream.fileno())
    draft.replace(path)
