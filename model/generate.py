"""Answers by sampling with a key-value cache; the noise of a row depends on nothing but its number.

Letters of tensor shapes: B rows, P prompt tokens (left padded), N new tokens, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.answerer import answerer
from model.transformer import AttentionMask, Cache, Transformer

ALIVE_SHARE = 0.75
"""Rows that are done leave the batch once fewer than this share of it is still going."""

GOLDEN = 0x9E3779B97F4A7C15
MIX_A, MIX_B = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


@dataclass(frozen=True)
class Generated:
    """Answers to B prompts, right padded to the longest, N tokens."""

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


@torch.no_grad()
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
) -> Generated:
    """Answer a batch of prompts; temperature 0 takes the likeliest token.

    An answer is a function of its prompt, the seed and its number in `rows` (0, 1, ... by default),
    not of the rows beside it, up to rounding. Log-probabilities at temperature 0 are those of 1.
    Raises ValueError for an empty prompt, or when prompt and answer do not fit the context.
    """
    _refuse_unfit(model, prompts, max_new_tokens)
    device = model.embedding.weight.device
    numbers = range(len(prompts)) if rows is None else rows
    noise = uniform_noise(seed, numbers, max_new_tokens).to(device)  # (B, N)
    ids = torch.full((len(prompts), max_new_tokens), pad, dtype=torch.int64, device=device)
    logprobs = torch.zeros(ids.shape, device=device)
    lengths = torch.full((len(prompts),), max_new_tokens, device=device)
    prompt_ids, padding = left_pad(prompts, pad, device)  # (B, P)
    live = torch.arange(len(prompts), device=device)  # rows of the result that the cache holds
    is_going = torch.ones(len(prompts), dtype=torch.bool, device=device)
    cache = Cache(
        model.shape,
        len(prompts),
        prompt_ids.shape[1] + max_new_tokens,
        device=device,
        dtype=model.embedding.weight.dtype,
    )
    step_ids, answering = prompt_ids, answerer(model)
    for step in range(max_new_tokens):
        mask = AttentionMask(padding=padding)
        states = answering.body.hidden(step_ids, mask=mask, cache=cache)[:, -1]
        token, logprob = _choose(answering.logits(states).float(), temperature, noise[live, step])
        ids[live, step] = torch.where(is_going, token, pad)
        logprobs[live, step] = torch.where(is_going, logprob, 0.0)
        ends = is_going & (token == eos)
        lengths[live[ends]] = step + 1
        is_going = is_going & ~ends
        going = int(is_going.sum())
        if not going:
            break
        if going < ALIVE_SHARE * len(live):
            kept = is_going.nonzero()[:, 0]
            cache.select(kept)
            live, token, is_going = live[kept], token[kept], is_going[kept]
            padding = None if padding is None else padding[kept]
        step_ids = token[:, None]
    longest = int(lengths.max()) if len(prompts) else 0
    ended = ids.gather(1, (lengths - 1)[:, None])[:, 0] == eos
    return Generated(ids[:, :longest], logprobs[:, :longest], lengths, ended)


def generate_batches(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    batch_rows: int,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    eos: int,
    pad: int,
    rows: Sequence[int] | None = None,
) -> Generated:
    """Answer any number of prompts, those of like length together; the order stays.

    `rows` are the numbers that the noise of each prompt depends on, 0, 1, ... by default.
    """
    numbers = range(len(prompts)) if rows is None else rows
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    shape = (len(prompts), max_new_tokens)
    ids, logprobs = torch.full(shape, pad, dtype=torch.int64), torch.zeros(shape)
    lengths = torch.zeros(len(prompts), dtype=torch.int64)
    ended = torch.zeros(len(prompts), dtype=torch.bool)
    for start in range(0, len(order), batch_rows):
        places = order[start : start + batch_rows]
        part = generate(
            model,
            [prompts[place] for place in places],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            eos=eos,
            pad=pad,
            rows=[numbers[place] for place in places],
        )
        width = part.ids.shape[1]
        ids[places, :width], logprobs[places, :width] = part.ids.cpu(), part.logprobs.cpu()
        lengths[places], ended[places] = part.lengths.cpu(), part.ended.cpu()
    longest = int(lengths.max()) if len(prompts) else 0
    return Generated(ids[:, :longest], logprobs[:, :longest], lengths, ended)


def left_pad(
    rows: Sequence[Sequence[int]], pad: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor | None]:
    """(B, P) ids with the padding at the left, and (B,) how much of it; none where there is none."""
    longest = max((len(row) for row in rows), default=0)
    ids = np.full((len(rows), longest), pad, dtype=np.int64)
    for place, row in enumerate(rows):
        ids[place, longest - len(row) :] = row
    padding = torch.tensor([longest - len(row) for row in rows], device=device)
    return torch.from_numpy(ids).to(device), padding if bool((padding > 0).any()) else None


def uniform_noise(seed: int, rows: Sequence[int], steps: int) -> Tensor:
    """(B, steps) float32 in (0, 1), a pure function of seed, row number and step.

    Source: Steele, Lea and Flood 2014, SplitMix64, keyed by seed and row.
    """
    with np.errstate(over="ignore"):
        key = _mix64(np.asarray(rows, dtype=np.uint64) + _mix64(np.array([seed], dtype=np.uint64)))
        place = np.arange(1, steps + 1, dtype=np.uint64) * np.uint64(GOLDEN)
        bits = _mix64(key[:, None] + place[None, :]) >> np.uint64(40)
    return torch.from_numpy((bits.astype(np.float64) + 0.5) / 2.0**24).float()


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
        shares = (logits / temperature).softmax(-1)
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
