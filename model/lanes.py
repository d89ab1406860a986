"""Keys and values of rows that are answered side by side, and that come and go one by one.

Letters of tensor shapes: B live rows, D width.
"""

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

from model.transformer import Cache, Transformer

COLUMNS = 64
"""The cache grows by multiples of so many tokens."""

Row = TypeVar("Row")


class Lanes(Generic[Row]):
    """A cache whose first rows are the live ones, without a gap, each filled to a length of its own."""

    def __init__(self, model: Transformer, most: int) -> None:
        """Of at most so many rows."""
        self._most, self._shape = most, model.shape
        self._like = model.embedding.weight
        self._cache = self.new_cache(0, 0)
        self.rows: list[Row] = []
        """What the owner calls each live row."""
        self.lengths: list[int] = []
        """Tokens that each of them holds."""

    @property
    def room(self) -> tuple[int, int]:
        """Rows and tokens of each for which there is memory."""
        rows, _, columns, _ = self._cache.layers[0][0].shape
        return rows, columns

    def new_cache(self, rows: int, columns: int) -> Cache:
        """An empty one of the same kind."""
        device, dtype = self._like.device, self._like.dtype
        return Cache(self._shape, rows, columns, device=device, dtype=dtype)

    def read(self, model: Transformer, tokens: Sequence[int]) -> Tensor:
        """(B, D): the states of the live rows behind one more token each."""
        device, longest = self._like.device, max(self.lengths)
        # Rows of one length need neither a mask nor places of their own.
        is_even = min(self.lengths) == longest
        self._cache.length = longest
        self._cache.lengths = None if is_even else torch.tensor(self.lengths, device=device)
        ids = torch.tensor(tokens, device=device)[:, None]
        states = model.hidden(ids, cache=self._cache)[:, -1]
        self.lengths = [length + 1 for length in self.lengths]
        return states

    def join(
        self,
        rows: Sequence[Row],
        cache: Cache,
        places: Sequence[int],
        lengths: Sequence[int],
        columns: int,
    ) -> None:
        """Add rows which stand at these places of another cache, that many tokens from the left of it, and
        which will not grow beyond so many columns."""
        first = len(self.rows)
        self.rows += rows
        self.lengths += lengths
        self._make_room(columns)
        for theirs, ours in zip(cache.layers, self._cache.layers, strict=True):
            for source, target in zip(theirs, ours, strict=True):
                for lane, (place, length) in enumerate(zip(places, lengths, strict=True), first):
                    target[lane, :, :length] = source[place, :, :length]

    def leave(self, is_done: Callable[[Row], bool]) -> None:
        """Take rows out; the last row moves to where one was."""
        for lane in reversed(range(len(self.rows))):
            if not is_done(self.rows[lane]):
                continue
            row, length = self.rows.pop(), self.lengths.pop()
            last = len(self.rows)
            if lane < last:
                self.rows[lane], self.lengths[lane] = row, length
                for pair in self._cache.layers:
                    for held in pair:
                        held[lane, :, :length] = held[last, :, :length]

    def _make_room(self, wanted: int) -> None:
        """Memory for the live rows, each of so many tokens; it never shrinks."""
        rows, columns = self.room
        if len(self.rows) <= rows and wanted <= columns:
            return
        rows = min(self._most, max(rows, 2 * len(self.rows)))
        columns = max(columns, -(-wanted // COLUMNS) * COLUMNS)
        larger = self.new_cache(rows, columns)
        for old, new in zip(self._cache.layers, larger.layers, strict=True):
            for source, target in zip(old, new, strict=True):
                target[: source.shape[0], :, : source.shape[2]] = source
        self._cache = larger
