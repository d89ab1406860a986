"""Rows of unequal length in one row without padding, and what two of them share computed once.

A row is as long as what it holds: it is always full, where rows of 1,024 tokens filled best-fit are full
to 0.998 with short conversations and 0.82 with long ones. Batches are of like lengths
(`dialogues.BucketedOrder`), so that attention, which takes sequences side by side, wastes 1 to 9 %.

Letters of tensor shapes: T tokens in the row, R sequences, S tokens of the longest, W wanted places.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Sequences end to end in one row: no padding, and none sees another. Two may share the tokens at
    their beginning, as a prompt with two answers does.

    Nothing is computed for padding but attention itself, which takes the sequences side by side.
    """

    places: Tensor
    """(R, S) int64: where in the row each token of each sequence stands; filled up at the right with any
    place."""
    home: Tensor
    """(T,) int64: a place among the R x S at which each token of the row is read."""
    wanted: Tensor
    """(W,) int64: places of the row whose states are asked for; the last block leaves the others out."""

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "Packing":
        """The packing of a batch that `pack` made."""
        return cls(tensors["places"], tensors["home"], tensors["wanted"])

    def apart(self, x: Tensor) -> Tensor:
        """(R, S, D): the sequences side by side, of (1, T, D)."""
        # What `x[0][places]` says; gradients of an embedding are added up faster, and in a fixed order.
        return F.embedding(self.places, x[0])

    def together(self, x: Tensor) -> Tensor:
        """(1, T, D) of (R, S, D)."""
        return F.embedding(self.home, x.flatten(0, 1))[None]

    def asked(self, x: Tensor) -> Tensor:
        """(1, W, D): what is wanted of (1, T, D)."""
        return F.embedding(self.wanted, x[0])[None]


class Sequenced(NamedTuple):
    """The tokens of one sequence, and at which of them states are asked for."""

    ids: Sequence[int]
    wanted: Sequence[int]


def pack(rows: Sequence[Sequenced], *, is_paired: bool = False) -> dict[str, Tensor]:
    """`ids` (1, T) and the tensors of their Packing; wanted places row by row, in the order asked.

    With `is_paired` row i of the second half shares what row i of the first half begins with.
    """
    half = len(rows) // 2 if is_paired else len(rows)
    longest = max(len(row.ids) for row in rows)
    places = np.zeros((len(rows), longest), np.int64)
    ids: list[int] = []
    home: list[np.ndarray] = []
    for number, row in enumerate(rows):
        shared = 0 if number < half else common_length(rows[number - half].ids, row.ids)
        if shared:
            places[number, :shared] = places[number - half, :shared]
        own = slice(shared, len(row.ids))
        places[number, own] = np.arange(len(ids), len(ids) + len(row.ids) - shared)
        home.append(number * longest + np.arange(own.start, own.stop))
        ids += row.ids[shared:]
    wanted = [places[number, np.asarray(row.wanted, np.int64)] for number, row in enumerate(rows)]
    return {
        "ids": torch.tensor([ids]),
        "places": torch.from_numpy(places),
        "home": torch.from_numpy(np.concatenate(home)),
        "wanted": torch.from_numpy(np.concatenate(wanted)),
    }


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(one, other, strict=False)))
