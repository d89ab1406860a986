"""Answers by sampling with a key-value cache; rows come and go, and the noise of each depends on nothing but
its number.

Letters of tensor shapes: B rows, R prompts, P prompt tokens (right padded), N new tokens, V vocabulary, D
width.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from model.answerer import Answerer, answerer
from model.lanes import Lanes
from model.transformer import Transformer

FULL_SHARE = 0.75
"""Prompts that wait are read as soon as no more than this share of the rows is being answered."""

GOLDEN = 0x9E3779B97F4A7C15
MIX_A, MIX_B = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


@dataclass(frozen=True)
class Generated:
    """Answers to B prompts, right padded to the longest, N tokens; on the CPU."""

    ids: Tensor
    """(B, N) int64; the stop token is included."""
    logprobs: Tensor
    """(B, N) float32 at the sampling temperature; 0 behind the end."""
    lengths: Tensor
    """(B,) int64: tokens of each answer, the stop token included."""
    ended: Tensor
    """(B,) whether the answer has its stop token."""

    def answer(self, row: int, *, keep_stop: bool = False) -> list[int]:
        """Ids of one answer."""
        length = int(self.lengths[row])
        drop = int(bool(self.ended[row]) and not keep_stop)
        return self.ids[row, : length - drop].tolist()


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    eos: int,
    pad: int,
    rows: Sequence[int] | None = None,
    at_once: int = 0,
) -> Generated:
    """Answer prompts, at most `at_once` of them at a time (0 for all): as some end, others begin.

    An answer is a function of its prompt, the seed and its number in `rows` (0, 1, ... by default), not
    of the rows beside it, up to rounding. Prompts that begin together and are equal are read once.
    Temperature 0 takes the likeliest token; log-probabilities are those of 1 then. Raises ValueError for an
    empty prompt, or when prompt and answer do not fit the context.
    """
    _refuse_unfit(model, prompts, max_new_tokens)
    numbers = range(len(prompts)) if rows is None else rows
    noise = uniform_noise(seed, numbers, max_new_tokens).to(model.embedding.weight.device)
    answers = [_Answer(row, tuple(prompt)) for row, prompt in enumerate(prompts)]
    with torch.inference_mode():
        sampler = _Sampler(answerer(model), noise, temperature, eos)
        _answer_all(sampler, answers, at_once or len(answers))
    lengths = [len(answer.ids) for answer in answers]
    longest = max(lengths, default=0)
    gaps = [longest - length for length in lengths]
    both, shape = list(zip(answers, gaps, strict=True)), (len(answers), longest)
    return Generated(
        torch.tensor([a.ids + [pad] * gap for a, gap in both], dtype=torch.int64).view(shape),
        torch.tensor([a.logprobs + [0.0] * gap for a, gap in both]).view(shape),
        torch.tensor(lengths, dtype=torch.int64),
        torch.tensor([answer.ids[-1] == eos for answer in answers], dtype=torch.bool),
    )


@dataclass
class _Answer:
    """An answer in the making."""

    row: int
    prompt: tuple[int, ...]
    ids: list[int] = field(default_factory=list[int])
    logprobs: list[float] = field(default_factory=list[float])
    is_done: bool = False


@dataclass(frozen=True)
class _Sampler:
    """A model, and what decides between the tokens that it offers."""

    model: Answerer
    noise: Tensor
    """(B, N) by row and token."""
    temperature: float
    eos: int

    def add_tokens(self, answers: Sequence[_Answer], states: Tensor) -> None:
        """One token to each answer, of its last state (B, D)."""
        place = [answer.row for answer in answers], [len(answer.ids) for answer in answers]
        logits = self.model.logits(states).float()  # (B, V)
        tokens, logprobs = _choose(logits, self.temperature, self.noise[place])
        both = zip(tokens.tolist(), logprobs.tolist(), strict=True)
        for answer, (token, logprob) in zip(answers, both, strict=True):
            answer.ids.append(token)
            answer.logprobs.append(logprob)
            answer.is_done = token == self.eos or len(answer.ids) == self.noise.shape[1]


def _answer_all(sampler: _Sampler, answers: Sequence[_Answer], at_once: int) -> None:
    # Prompts of like length begin together, and so do equal ones.
    waiting = deque(sorted(answers, key=lambda answer: len(answer.prompt)))
    lanes = Lanes[_Answer](sampler.model.body, at_once)
    while waiting or lanes.rows:
        if waiting and len(lanes.rows) <= FULL_SHARE * at_once:
            free = min(at_once - len(lanes.rows), len(waiting))
            _begin(sampler, lanes, [waiting.popleft() for _ in range(free)])
        else:
            live = lanes.rows
            states = lanes.read(sampler.model.body, [answer.ids[-1] for answer in live])
            sampler.add_tokens(live, states)
        lanes.leave(lambda answer: answer.is_done)


def _begin(sampler: _Sampler, lanes: Lanes[_Answer], answers: list[_Answer]) -> None:
    """The first tokens of answers to prompts that are read together, each once."""
    prompts = {
        prompt: place for place, prompt in enumerate(dict.fromkeys(a.prompt for a in answers))
    }
    lengths = [len(prompt) for prompt in prompts]
    padded = [[*prompt, *[0] * (max(lengths) - len(prompt))] for prompt in prompts]
    cache = lanes.new_cache(len(prompts), max(lengths))
    # What fills up the right is seen by nothing before it.
    ids = torch.tensor(padded, device=sampler.noise.device)
    states = sampler.model.body.hidden(ids, cache=cache)  # (R, P, D)
    places = [prompts[answer.prompt] for answer in answers]
    ends = [lengths[place] for place in places]
    lanes.join(answers, cache, places, ends, max(ends) + sampler.noise.shape[1])
    sampler.add_tokens(answers, states[places, [end - 1 for end in ends]])


def uniform_noise(seed: int, rows: Sequence[int], steps: int) -> Tensor:
    """(B, steps) float32 in (0, 1), a pure function of seed, row number and step.

    Source: Steele, Lea and Flood 2014, SplitMix64, keyed by seed and row.
    """
    with np.errstate(over="ignore"):
        key = _mix64(np.asarray(rows, dtype=np.uint64) + _mix64(np.array([seed], dtype=np.uint64)))
        place = np.arange(1, steps + 1, dtype=np.uint64) * np.uint64(GOLDEN)
        bits = _mix64(key[:, None] + place[None, :]) >> np.uint64(40)
    # The largest would be rounded up to 1, at which the last token is drawn, however unlikely.
    places = np.minimum((bits.astype(np.float64) + 0.5) / 2.0**24, 1 - 2.0**-24)
    return torch.from_numpy(places).float()


def _mix64(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(GOLDEN)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(MIX_A)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(MIX_B)
    return x ^ (x >> np.uint64(31))


def _choose(logits: Tensor, temperature: float, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Token and its log-probability, (B,) each, of logits (B, V); one number decides, whatever the
    vocabulary."""
    if temperature == 0:
        token, shares = logits.argmax(-1), logits.softmax(-1)
    else:
        shares = (logits if temperature == 1 else logits / temperature).softmax(-1)
        token = draw(shares, noise)
    return token, shares.gather(-1, token[:, None])[:, 0].log()


def draw(shares: Tensor, noise: Tensor) -> Tensor:
    """(B,) the token at which the running sum of the shares (B, V) passes the noise (B,) in (0, 1).

    The shares need not sum to one.
    """
    total = shares.cumsum(-1)
    token = torch.searchsorted(total, noise[:, None] * total[:, -1:], right=True)[:, 0]
    return token.clamp(max=shares.shape[-1] - 1)


def _refuse_unfit(
    model: Transformer, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> None:
    if not all(prompts):
        raise ValueError("a prompt has no tokens; begin it with at least one, such as <|im_start|>")
    longest = max((len(prompt) for prompt in prompts), default=0)
    if longest + max_new_tokens > model.shape.context:
        raise ValueError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones do not fit the context of "
            f"{model.shape.context}; shorten the prompt or max_new_tokens"
        )
