"""Conversations and pairs as token rows of one length limit, and which of them each step sees.

A prompt is shortened from the left, whole exchanges first, its headers kept; an answer never: what
does not fit is left out and counted.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from model.packing import Packing, Sequenced, pack
from model.transformer import AttentionMask, Transformer, token_logprobs
from storage.conversations import Conversation, Message
from storage.preferences import Preference
from storage.tokenizer import ChatTokenizer, Rendered

POOL_BATCHES = 64
"""Rows of so many batches are sorted by length together: little padding, still well mixed."""

NO_LABEL = -1

LearnFrom = Literal["every_answer", "last_answer", "each_answer_alone"]


class Dialogue(NamedTuple):
    """One conversation to learn from."""

    ids: list[int]
    is_answer: list[bool]
    name: str
    """Id of the conversation."""
    domain: str


class Pair(NamedTuple):
    """One prompt with two answers; each ends with `<|im_end|>`, or is empty where there is none."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    margin: float
    name: str
    """Id of the pair."""
    domain: str = ""

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

    def dialogues(
        self, rows: Iterable[Conversation], learn_from: LearnFrom = "every_answer"
    ) -> list[Dialogue]:
        """Conversations that fit, without the line break behind the last answer.

        `each_answer_alone` makes one of each answer: the conversation up to it, of which it alone is learnt.
        """
        parts = (
            (row, messages)
            for row in rows
            for messages in (
                _up_to_each_answer(row["messages"])
                if learn_from == "each_answer_alone"
                else [row["messages"]]
            )
        )
        found = [self._dialogue(row, messages) for row, messages in parts]
        fitting = [dialogue for dialogue in found if dialogue is not None]
        return fitting if learn_from == "every_answer" else [_last_alone(row) for row in fitting]

    def pairs(self, rows: Iterable[Preference], *, takes_single: bool = False) -> list[Pair]:
        """Pairs that fit; both answers of a pair follow the same tokens. Single answers are left out, unless
        they are taken."""
        taken: list[Preference] = []
        for row in rows:
            if takes_single or None not in (row["chosen"], row["rejected"]):
                taken.append(row)
            else:
                self.counts.rows += 1
                self.counts.left_out += 1
        return [found for row in taken if (found := self._pair(row)) is not None]

    def prompt(self, messages: Sequence[Message], room: int) -> list[int] | None:
        """The prompt up to the header of the answer in at most `room` tokens; none if it cannot."""
        fitted = self._fit(messages, room, for_generation=True)
        return None if fitted is None else fitted.ids

    def answer(self, text: str) -> list[int]:
        """An answer with its end."""
        return [*self.tokenizer.encode_content(text), self.tokenizer.im_end]

    def _dialogue(self, row: Conversation, messages: Sequence[Message]) -> Dialogue | None:
        line_break = len(self.tokenizer.encode("\n"))  # none where spaces at the ends go
        fitted = self._fit(messages, self.limit + line_break, for_generation=False)
        if fitted is None:
            return None
        end = len(fitted.ids) - line_break
        return Dialogue(fitted.ids[:end], fitted.is_answer[:end], row["id"], row["domain"])

    def _pair(self, row: Preference) -> Pair | None:
        both = (row["chosen"], row["rejected"])
        chosen, rejected = ([] if text is None else self.answer(text) for text in both)
        room = self.limit - max(len(chosen), len(rejected))
        if (prompt := self.prompt(row["prompt"], room)) is None:
            return None
        return Pair(prompt, chosen, rejected, row["margin"] or 0.0, row["id"], row["domain"])

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


def _up_to_each_answer(messages: Sequence[Message]) -> list[Sequence[Message]]:
    return [messages[: place + 1] for place, m in enumerate(messages) if m["role"] == "assistant"]


def _last_alone(row: Dialogue) -> Dialogue:
    """The same conversation, of whose answers only the last is learnt."""
    end = len(row.ids)
    while not row.is_answer[end - 1]:
        end -= 1
    start = end
    while start and row.is_answer[start - 1]:
        start -= 1
    return row._replace(is_answer=[start <= place < end for place in range(len(row.ids))])


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


@dataclass(frozen=True)
class EasyFirst:
    """Which rows each step sees: in the first epoch those of falling `easiness`, then as `later` says.

    Rows that fill no whole step of the first epoch are first seen in the second.
    """

    easiness: Sequence[float]
    later: BucketedOrder

    def rows_at(self, step: int) -> list[int]:
        """Row numbers of a step."""
        size = self.later.batch_rows
        if (step + 1) * size > len(self.easiness):
            return self.later.rows_at(step)
        return self._by_easiness[step * size : (step + 1) * size]

    @functools.cached_property
    def _by_easiness(self) -> list[int]:
        return sorted(range(len(self.easiness)), key=lambda row: -self.easiness[row])


def right_pad(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
    """(B, T) int64, rows filled up at the right."""
    longest = max((len(row) for row in rows), default=0)
    ids = np.full((len(rows), longest), fill, dtype=np.int64)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = row
    return torch.from_numpy(ids)


def dialogue_tensors(rows: Sequence[Dialogue]) -> dict[str, Tensor]:
    """A packing of conversations, `labels` (R, L): what the assistant says of each, filled up with
    NO_LABEL, and `prefix` (R,): tokens before the first of it."""
    learnt = [
        [place for place, is_answer in enumerate(row.is_answer[1:]) if is_answer] for row in rows
    ]
    both = list(zip(rows, learnt, strict=True))
    labels = [[row.ids[place + 1] for place in places] for row, places in both]
    prefix = [row.is_answer.index(True) if places else 0 for row, places in both]
    return {
        **pack([Sequenced(row.ids[:-1], places) for row, places in both]),
        "labels": right_pad(labels, NO_LABEL),
        "prefix": torch.tensor(prefix),
    }


def pair_tensors(rows: Sequence[Pair]) -> dict[str, Tensor]:
    """A packing of pairs, all chosen before all rejected, and `labels` (2 B, L): the tokens of each answer.

    What both answers of a pair follow, and how both begin, is computed once.
    """
    sides = [
        *((row.prompt, row.chosen) for row in rows),
        *((row.prompt, row.rejected) for row in rows),
    ]
    sequences = [
        Sequenced([*prompt, *answer[:-1]], range(len(prompt) - 1, len(prompt) + len(answer) - 1))
        for prompt, answer in sides
    ]
    labels = right_pad([answer for _, answer in sides], NO_LABEL)
    return {**pack(sequences, is_paired=True), "labels": labels}


def labelled_logprobs(
    model: Transformer, tensors: Mapping[str, Tensor], mask: AttentionMask | None = None
) -> Tensor:
    """(R, L) float32: log-probability of each label of a packing in nats, 0 where there is none."""
    # The head after the states: ZeRO 3 lets go of a tied embedding once that has been read.
    states = model.hidden(tensors["ids"], mask=mask, packing=Packing.of(tensors))[0]  # (W, D)
    is_label = tensors["labels"] >= 0
    found = token_logprobs(model.head_weight, states, tensors["labels"][is_label])
    return torch.zeros(is_label.shape, device=found.device).masked_scatter(is_label, found)


def _generator(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))
