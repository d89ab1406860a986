"""Answers to prompts that come and go: rows join and leave the batch between two steps.

Letters of tensor shapes: B rows that are live, R rows that join, T tokens, V vocabulary.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from conf.serving import Ask, End, Told
from model.generate import draw, uniform_noise
from model.lanes import Lanes
from model.transformer import Transformer

PREFILL_TOKENS = 512
"""Prompt tokens read in a step, padding included, so that nobody waits long for another's prompt."""
PROMPT_COLUMNS = 16
"""Prompts are padded to multiples of so many tokens: oneDNN makes code for each new size of a product
and keeps it, half a MiB or more for each new length of a prompt."""
COLDEST = 1e-30
"""Temperature below which logits divided by it would not be finite."""


class Slots:
    """Rows being answered by one model.

    An answer is a function of its Ask, not of the rows beside it, up to rounding.
    """

    def __init__(self, model: Transformer, *, rows: int, tokens: int) -> None:
        """At most so many rows at a time, and rows times their longest at most so many tokens.

        Raises ValueError when not even one row of the model's context fits.
        """
        if tokens < model.shape.context:
            raise ValueError(
                f"a cache of {tokens} tokens does not hold one row of the model's context of "
                f"{model.shape.context}; give at least that many"
            )
        self.model, self.rows, self.tokens = model, rows, tokens
        self._waiting: deque[Ask] = deque()
        self._joining: _Joining | None = None
        self._has_joined = False
        """Whether the last step was for prompts."""
        self._lanes = Lanes[_Row](model, rows)

    def add(self, ask: Ask) -> None:
        """Answer it as soon as there is room, in the order of coming.

        Raises ValueError when prompt and answer do not fit the context.
        """
        if ask.places > self.model.shape.context:
            raise ValueError(
                f"a prompt of {len(ask.prompt)} tokens and {ask.max_new_tokens} new ones do not fit "
                f"the context of {self.model.shape.context}; shorten the prompt or max_new_tokens"
            )
        self._waiting.append(ask)

    def drop(self, key: int) -> None:
        """Answer it no further; nothing is told of it from now on."""
        self._waiting = deque(ask for ask in self._waiting if ask.key != key)
        joining = self._joining.rows if self._joining else []
        for row in (*self._lanes.rows, *joining):
            row.is_done = row.is_done or row.ask.key == key

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self._waiting or self._joining or self._lanes.rows)

    @torch.inference_mode()
    def step(self) -> list[Told]:
        """Read some of the prompts that wait, or add one token to every live row.

        The first tokens of prompts are told at once; then the live rows have their turn.
        """
        self._leave()
        if not self._has_joined and (told := self._read_prompts()):
            self._has_joined = True
            return told
        self._has_joined = False
        return self._decode() if self._lanes.rows else []

    def _read_prompts(self) -> list[Told]:
        """The first tokens of those whose prompts have been read to their ends."""
        self._joining = self._joining or self._admit()
        if self._joining is None or not self._joining.read(self.model):
            return []
        joined, self._joining = self._joining, None
        told = self._add_tokens(joined.rows, joined.states)
        self._join(joined)
        return told

    def _decode(self) -> list[Told]:
        """The next token of every live row."""
        live = self._lanes.rows
        states = self._lanes.read(self.model, [row.last for row in live])
        told = self._add_tokens(live, states)
        self._leave()
        return told

    def _admit(self) -> "_Joining | None":
        """Those at the head of the queue for which there is room and which are read in one go."""
        joined: list[Ask] = []
        columns = max((row.ask.places for row in self._lanes.rows), default=0)
        longest = 0
        while self._waiting and len(self._lanes.rows) + len(joined) < self.rows:
            ask = self._waiting[0]
            columns, longest = max(columns, ask.places), max(longest, _padded(len(ask.prompt)))
            if (len(self._lanes.rows) + len(joined) + 1) * columns > self.tokens:
                break
            if joined and (len(joined) + 1) * longest > PREFILL_TOKENS:
                break
            joined.append(self._waiting.popleft())
        return _Joining(self.model, self._lanes, [_Row(ask) for ask in joined]) if joined else None

    def _join(self, joining: "_Joining") -> None:
        places = [place for place, row in enumerate(joining.rows) if not row.is_done]
        rows = [joining.rows[place] for place in places]
        lengths = [len(row.ask.prompt) for row in rows]
        columns = max((row.ask.places for row in rows), default=0)
        self._lanes.join(rows, joining.cache, places, lengths, columns)

    def _leave(self) -> None:
        self._lanes.leave(lambda row: row.is_done)

    def _add_tokens(self, rows: "Sequence[_Row]", states: Tensor) -> list[Told]:
        """Choose the next token of rows whose last states (B, D) are given."""
        logits = self.model.logits(states).float()  # (B, V)
        tokens = _choose(logits, rows)
        figures = _logprobs(logits, tokens, rows)
        told: list[Told] = []
        for row, token, (logprob, top) in zip(rows, tokens.tolist(), figures, strict=True):
            if row.is_done:  # dropped while its prompt was read
                continue
            row.last, row.made = token, row.made + 1
            end: End = "stop" if token in row.ask.stops else ""
            end = end or ("length" if row.made == row.ask.max_new_tokens else "")
            row.is_done = bool(end)
            told.append(Told(row.ask.key, token, end, logprob, top))
        return told


@dataclass
class _Row:
    """An answer in the making."""

    ask: Ask
    noise: list[float] = field(default_factory=list[float])
    made: int = 0
    last: int = 0
    """The token that is to be read next."""
    is_done: bool = False

    def __post_init__(self) -> None:
        if self.ask.temperature > 0:
            steps = self.ask.max_new_tokens
            self.noise = uniform_noise(self.ask.seed, [self.ask.row], steps)[0].tolist()


class _Joining:
    """Prompts that are being read into a cache of their own, padded at the right."""

    def __init__(self, model: Transformer, lanes: Lanes[_Row], rows: list[_Row]) -> None:
        weight = model.embedding.weight
        longest = _padded(max(len(row.ask.prompt) for row in rows))
        longest = min(longest, model.shape.context)
        padded = [[*row.ask.prompt, *[0] * (longest - len(row.ask.prompt))] for row in rows]
        self.rows = rows
        self.ids = torch.tensor(padded, device=weight.device)  # (R, T)
        self.cache = lanes.new_cache(len(rows), longest)
        self.states = weight.new_zeros(len(rows), model.shape.dim)
        """(R, D): the state behind the last token of each prompt that has been read to its end."""

    def read(self, model: Transformer) -> bool:
        """Read the next columns; whether all is read."""
        start = self.cache.length
        columns = PREFILL_TOKENS // len(self.rows) // PROMPT_COLUMNS * PROMPT_COLUMNS
        end = min(self.ids.shape[1], start + max(columns, PROMPT_COLUMNS))
        states = model.hidden(self.ids[:, start:end], cache=self.cache)
        for place, row in enumerate(self.rows):
            length = len(row.ask.prompt)
            if start < length <= end:
                self.states[place] = states[place, length - 1 - start]
        return end == self.ids.shape[1]


def _padded(tokens: int) -> int:
    return -(-tokens // PROMPT_COLUMNS) * PROMPT_COLUMNS


def _choose(logits: Tensor, rows: Sequence[_Row]) -> Tensor:
    """(B,) the next token of each row."""
    tokens = logits.argmax(-1)
    drawing = [place for place, row in enumerate(rows) if row.ask.temperature > 0]
    if drawing:
        asks = [rows[place].ask for place in drawing]
        noise = [rows[place].noise[rows[place].made] for place in drawing]
        temperature = logits.new_tensor([[max(ask.temperature, COLDEST)] for ask in asks])
        picked = logits if len(drawing) == len(rows) else logits[drawing]
        shares = _likeliest((picked / temperature).softmax(-1), asks)
        drawn = draw(shares, logits.new_tensor(noise))
        # Noise that rounds to 1 would choose the last token, which may have no share.
        has_share = shares.gather(-1, drawn[:, None])[:, 0] > 0
        tokens[drawing] = torch.where(has_share, drawn, shares.argmax(-1))
    return tokens


def _likeliest(shares: Tensor, asks: Sequence[Ask]) -> Tensor:
    """(B, V) the shares, 0 for what top_k leaves out and then for what top_p leaves out.

    Source: Fan et al. 2018 (top-k); Holtzman et al. 2020, section 3.1 (nucleus).
    """
    if all(ask.top_k == 0 and ask.top_p == 1.0 for ask in asks):
        return shares
    vocabulary = shares.shape[-1]
    most = shares.new_tensor([[float(ask.top_k or vocabulary)] for ask in asks])
    portion = shares.new_tensor([[ask.top_p] for ask in asks])
    ordered, tokens = shares.sort(dim=-1, descending=True, stable=True)
    ordered = ordered * (torch.arange(vocabulary, device=shares.device) < most)
    before = ordered.cumsum(-1) - ordered
    is_kept = (portion == 1.0) | (before < portion * ordered.sum(-1, keepdim=True))
    return torch.zeros_like(shares).scatter(-1, tokens, ordered * is_kept)


Figures = tuple[float | None, list[tuple[int, float]] | None]


def _logprobs(logits: Tensor, tokens: Tensor, rows: Sequence[_Row]) -> list[Figures]:
    """For each row the log-probability of its token, and of the likeliest, where they were asked for."""
    asked = [place for place, row in enumerate(rows) if row.ask.logprobs is not None]
    found: list[Figures] = [(None, None)] * len(rows)
    if not asked:
        return found
    asks = [rows[place].ask for place in asked]
    logprobs = logits[asked].log_softmax(-1)
    chosen = logprobs.gather(-1, tokens[asked][:, None])[:, 0].tolist()
    most = max(cast("int", ask.logprobs) for ask in asks)
    values, ids = logprobs.topk(min(most, logprobs.shape[-1]), dim=-1)
    for number, place in enumerate(asked):
        top = list(zip(ids[number].tolist(), values[number].tolist(), strict=True))
        found[place] = (chosen[number], top[: asks[number].logprobs])
    return found
