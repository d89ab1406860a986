"""Conversations and pairs as token rows of one length limit, and which of them each step sees.

A prompt is shortened from the left, whole exchanges first, its headers kept; an answer never: what
does not fit is left out and counted.
"""

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from storage.conversations import Conversation, Message
from storage.preferences import Preference
from storage.tokenizer import ChatTokenizer, Rendered

POOL_BATCHES = 64
"""Rows of so many batches are sorted by length together: little padding, still well mixed."""

NO_LABEL = -1


class Dialogue(NamedTuple):
    """One conversation to learn from."""

    ids: list[int]
    is_answer: list[bool]
    name: str
    """Id of the conversation."""
    domain: str


class Pair(NamedTuple):
    """One prompt with two answers; both answers end with `<|im_end|>`."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    margin: float
    name: str
    """Id of the pair."""

    @property
    def length(self) -> int:
        """Tokens of prompt and longer answer."""
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


@dataclass
class Fitting:
    """How many rows were taken as they are, shortened, or left out."""

    rows: int = 0
    shortened: int = 0
    left_out: int = 0

    def take(self) -> dict[str, int]:
        """The counts so far, for the record; counting starts anew."""
        counts = {"rows": self.rows, "shortened": self.shortened, "left_out": self.left_out}
        self.rows = self.shortened = self.left_out = 0
        return counts


@dataclass
class Renderer:
    """Renders messages into at most `limit` tokens."""

    tokenizer: ChatTokenizer
    limit: int
    counts: Fitting = field(default_factory=Fitting)

    @classmethod
    def within(cls, tokenizer: ChatTokenizer, wanted: int, context: int) -> "Renderer":
        """A renderer into `wanted` tokens, or a model's whole context for 0 or more than it has."""
        return cls(tokenizer, min(wanted or context, context))

    def dialogues(self, rows: Iterable[Conversation]) -> list[Dialogue]:
        """Conversations that fit, without the line break behind the last answer."""
        return [found for row in rows if (found := self._dialogue(row)) is not None]

    def pairs(self, rows: Iterable[Preference]) -> list[Pair]:
        """Pairs that fit; both answers of a pair follow the same tokens."""
        return [found for row in rows if (found := self._pair(row)) is not None]

    def prompt(self, messages: Sequence[Message], room: int) -> list[int] | None:
        """The prompt up to the header of the answer in at most `room` tokens; none if it cannot."""
        fitted = self._fit(messages, room, for_generation=True)
        return None if fitted is None else fitted.ids

    def answer(self, text: str) -> list[int]:
        """An answer with its end."""
        return [*self.tokenizer.encode_content(text), self.tokenizer.im_end]

    def _dialogue(self, row: Conversation) -> Dialogue | None:
        line_break = len(self.tokenizer.encode("\n"))  # none where spaces at the ends go
        fitted = self._fit(row["messages"], self.limit + line_break, for_generation=False)
        if fitted is None:
            return None
        end = len(fitted.ids) - line_break
        return Dialogue(fitted.ids[:end], fitted.is_answer[:end], row["id"], row["domain"])

    def _pair(self, row: Preference) -> Pair | None:
        chosen, rejected = self.answer(row["chosen"]), self.answer(row["rejected"])
        room = self.limit - max(len(chosen), len(rejected))
        if (prompt := self.prompt(row["prompt"], room)) is None:
            return None
        return Pair(prompt, chosen, rejected, row["margin"] or 0.0, row["id"])

    def _fit(
        self, messages: Sequence[Message], room: int, *, for_generation: bool
    ) -> Rendered | None:
        self.counts.rows += 1
        kept = list(messages)
        rendered = self.tokenizer.render(kept, for_generation=for_generation)
        if len(rendered.ids) <= room:
            return rendered
        while len(rendered.ids) > room and (shorter := _without_first_exchange(kept)):
            kept = shorter
            rendered = self.tokenizer.render(kept, for_generation=for_generation)
        if len(rendered.ids) > room:
            rendered = self._cut_question(kept, rendered, len(rendered.ids) - room)
        self.counts.shortened += int(rendered is not None)
        self.counts.left_out += int(rendered is None)
        return rendered

    def _cut_question(
        self, messages: Sequence[Message], rendered: Rendered, excess: int
    ) -> Rendered | None:
        """Without the first `excess` tokens of the first question; none if it has no more than that."""
        first = 1 if messages[0]["role"] == "system" else 0
        if excess >= len(self.tokenizer.encode_content(messages[first]["content"], "user")):
            return None
        bare: Message = {"role": "user", "content": ""}
        ending = 1 + len(self.tokenizer.encode("\n"))
        begin = len(self.tokenizer.render([*messages[:first], bare]).ids) - ending
        cut = slice(begin, begin + excess)
        ids, is_answer = list(rendered.ids), list(rendered.is_answer)
        del ids[cut], is_answer[cut]
        return Rendered(ids, is_answer)


def _without_first_exchange(messages: list[Message]) -> list[Message] | None:
    first = 1 if messages[0]["role"] == "system" else 0
    rest = messages[first + 2 :]
    return [*messages[:first], *rest] if rest else None


@dataclass(frozen=True)
class BucketedOrder:
    """Which rows each step sees: every row once per epoch, rows of like length together.

    The epochs' permutations follow each other in one endless list; each pool of it is sorted by
    length, cut into batches, and its batches are shuffled. Nothing but seed and step decides. The pool
    at the seam of two epochs mixes the end of one with the beginning of the next.
    """

    lengths: Sequence[int]
    batch_rows: int
    seed: int

    def rows_at(self, step: int) -> list[int]:
        """Row numbers of a step, `batch_rows` of them, the longest last."""
        pool, place = divmod(step, self._pool_batches)
        if pool not in self._pools:
            self._pools.clear()
            self._pools[pool] = self._batches_of(pool)
        return self._pools[pool][place]

    @functools.cached_property
    def _pool_batches(self) -> int:
        assert self.lengths, "no rows"
        # A pool is no longer than an epoch, or copies of a row would meet in one batch.
        return max(1, min(POOL_BATCHES, len(self.lengths) // self.batch_rows))

    @functools.cached_property
    def _pools(self) -> dict[int, list[list[int]]]:
        """The batches of the pool that was asked for last: steps follow each other."""
        return {}

    def _batches_of(self, pool: int) -> list[list[int]]:
        batches = self._pool_batches
        members = self._members(pool * batches * self.batch_rows, batches * self.batch_rows)
        length = np.asarray(self.lengths)[members]
        by_length = members[np.argsort(length, kind="stable")].reshape(batches, self.batch_rows)
        return by_length[_generator(self.seed, 1, pool).permutation(batches)].tolist()

    def _members(self, start: int, count: int) -> np.ndarray:
        rows = len(self.lengths)
        first, last = start // rows, (start + count - 1) // rows
        epochs = [
            _generator(self.seed, 0, epoch).permutation(rows) for epoch in range(first, last + 1)
        ]
        return np.concatenate(epochs)[start - first * rows :][:count]


def right_pad(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
    """(B, T) int64, rows filled up at the right."""
    longest = max((len(row) for row in rows), default=0)
    ids = np.full((len(rows), longest), fill, dtype=np.int64)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = row
    return torch.from_numpy(ids)


def dialogue_batch(rows: Sequence[Dialogue], pad: int) -> tuple[Tensor, Tensor]:
    """Inputs and labels, (B, T) each: the label of a place is the next token where the assistant
    says it, else NO_LABEL."""
    inputs = right_pad([row.ids[:-1] for row in rows], pad)
    labels = right_pad(
        [
            [
                token if is_answer else NO_LABEL
                for token, is_answer in zip(row.ids[1:], row.is_answer[1:], strict=True)
            ]
            for row in rows
        ],
        NO_LABEL,
    )
    return inputs, labels


def pair_batch(rows: Sequence[Pair], pad: int) -> tuple[Tensor, Tensor]:
    """Inputs and labels, (2 B, T) each, all chosen before all rejected; labels as for dialogues."""
    sides = [(row.prompt, row.chosen) for row in rows] + [
        (row.prompt, row.rejected) for row in rows
    ]
    inputs = right_pad([[*prompt, *answer][:-1] for prompt, answer in sides], pad)
    labels = right_pad(
        [[NO_LABEL] * (len(prompt) - 1) + answer for prompt, answer in sides], NO_LABEL
    )
    return inputs, labels


def _generator(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))
