"""What a policy says to prompts, and what reference, value model and reward model make of it.

Letters of tensor shapes: B rows, P prompt tokens (left padded), N answer tokens (right padded).
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from conf.ppo import PpoConfig
from model.advantages import generalised_advantages, kl_per_token, token_rewards
from model.generate import generate, left_pad
from model.ranks import Ranks
from model.transformer import AttentionMask, Transformer, token_logprobs
from model.tuning import computing_in
from storage.checkpoint import RewardScale
from storage.tokenizer import ChatTokenizer


@dataclass(frozen=True)
class Models:
    """The four models of PPO; only policy and value model learn."""

    policy: Transformer
    reference: Transformer
    value: Transformer
    reward: Transformer
    scale: RewardScale
    """Mean and deviation that make scores, and with them values, comparable between reward models."""


@dataclass(frozen=True)
class Rollout:
    """Answers to B prompts with everything that the updates need, on the CPU."""

    prompts: Tensor
    """(B, P) int64, left padded."""
    padding: Tensor
    """(B,) padding of each prompt."""
    answers: Tensor
    """(B, N) int64, right padded."""
    mask: Tensor
    """(B, N) float32, 1 on answer tokens."""
    logprobs: Tensor
    """(B, N) of the policy that answered, at the sampling temperature; 0 behind the end."""
    reference: Tensor
    """(B, N) of the reference, likewise."""
    values: Tensor
    """(B, N) before each answer token; 0 behind the end."""
    scores: Tensor
    """(B,) normalised, clipped, and lowered where an answer did not end."""
    ended: Tensor
    """(B,) float32, 1 where the answer ended in time."""

    def rows(self, rows: Sequence[int]) -> "Rollout":
        """Only those rows."""
        picked = torch.as_tensor(rows)
        return Rollout(**{f.name: getattr(self, f.name)[picked] for f in fields(self)})

    def to(self, device: torch.device) -> "Rollout":
        """The same on a device."""
        return Rollout(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    @property
    def last(self) -> Tensor:
        """(B,) number of the last token of each answer."""
        return self.mask.sum(1).long() - 1


def roll_out(
    models: Models,
    prompts: Sequence[Sequence[int]],
    tokenizer: ChatTokenizer,
    settings: PpoConfig,
    *,
    seed: int,
    ranks: Ranks,
    micro_batch: int,
) -> Rollout:
    """Answer and score the prompts, each rank its share; all ranks get the whole.

    The noise of a row depends on the seed and its number alone.
    """
    own = list(range(len(prompts)))[ranks.rank :: ranks.world]
    size = micro_batch or max(1, len(own))
    parts = [
        _roll_out_part(models, prompts, own[start : start + size], tokenizer, settings, seed, ranks)
        for start in range(0, len(own), size)
    ]
    by_rank = ranks.gather((own, [_as_dict(part) for part in parts]))
    order = [row for rows, _ in by_rank for row in rows]
    whole = _join([Rollout(**part) for _, found in by_rank for part in found], tokenizer.pad)
    return whole.rows(sorted(range(len(order)), key=lambda place: order[place]))


def advantages_of(rollout: Rollout, settings: PpoConfig, kl_coef: float) -> tuple[Tensor, Tensor]:
    """Advantages, not yet whitened, and returns, (B, N) each, 0 behind the end."""
    kl = kl_per_token(rollout.logprobs, rollout.reference, settings.kl_estimator) * rollout.mask
    rewards = token_rewards(kl, rollout.scores, rollout.last, kl_coef=kl_coef)
    advantages, returns = generalised_advantages(
        rewards, rollout.values, gamma=settings.gamma, lam=settings.lam
    )
    return advantages * rollout.mask, returns * rollout.mask


def kl_of(rollout: Rollout) -> Tensor:
    """(B,) estimate of each answer's divergence from the reference (k1), in nats."""
    return ((rollout.logprobs - rollout.reference) * rollout.mask).sum(1)


def answer_states(model: Transformer, rollout: Rollout) -> Tensor:
    """(B, N, D): the state from which each answer token is chosen, and its value is read."""
    ids = torch.cat([rollout.prompts, rollout.answers], 1)
    mask = AttentionMask(padding=rollout.padding) if bool(rollout.padding.any()) else None
    return model.hidden(ids, mask=mask)[:, rollout.prompts.shape[1] - 1 : -1]


def answer_logprobs(model: Transformer, rollout: Rollout, temperature: float) -> Tensor:
    """(B, N) float32 log-probability of each answer token; 0 behind the end."""
    labels = rollout.answers.masked_fill(rollout.mask == 0, -1)
    # The head after the states: ZeRO 3 lets go of a tied embedding once that has been read.
    states = answer_states(model, rollout)
    return token_logprobs(model.head_weight, states, labels, temperature)


def answer_values(model: Transformer, rollout: Rollout, scale: RewardScale) -> Tensor:
    """(B, N) float32 value before each answer token in normalised score; 0 behind the end."""
    states = answer_states(model, rollout)
    raw = model.score(states)
    return (raw - scale.mean) / scale.std * rollout.mask


def answer_scores(model: Transformer, rollout: Rollout) -> Tensor:
    """(B,) float32: the raw score of each answer, read at its last token."""
    ids = torch.cat([rollout.prompts, rollout.answers], 1)
    mask = AttentionMask(padding=rollout.padding) if bool(rollout.padding.any()) else None
    rows = torch.arange(len(ids), device=ids.device)
    hidden = model.hidden(ids, mask=mask)[rows, rollout.prompts.shape[1] + rollout.last]
    return model.score(hidden)


@torch.no_grad()
def _roll_out_part(
    models: Models,
    prompts: Sequence[Sequence[int]],
    rows: Sequence[int],
    tokenizer: ChatTokenizer,
    settings: PpoConfig,
    seed: int,
    ranks: Ranks,
) -> Rollout:
    asked = [prompts[row] for row in rows]
    generated = generate(
        models.policy,
        asked,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        seed=seed,
        eos=tokenizer.im_end,
        pad=tokenizer.pad,
        rows=rows,
    )
    ids, padding = left_pad(asked, tokenizer.pad, ranks.device)
    places = torch.arange(generated.ids.shape[1], device=ranks.device)
    blank = torch.zeros(len(rows), device=ranks.device)
    mask = (places < generated.lengths[:, None]).float()
    bare = Rollout(
        prompts=ids,
        padding=blank.long() if padding is None else padding,
        answers=generated.ids,
        mask=mask,
        logprobs=generated.logprobs,
        reference=torch.zeros_like(mask),
        values=torch.zeros_like(mask),
        scores=blank,
        ended=generated.ended.float(),
    )
    return _judged(models, bare, settings, ranks)


def _judged(models: Models, bare: Rollout, settings: PpoConfig, ranks: Ranks) -> Rollout:
    """The rollout with what the other models say of it."""
    with computing_in(settings.precision, ranks.device):
        found = {
            "reference": answer_logprobs(models.reference, bare, settings.temperature),
            "values": answer_values(models.value, bare, models.scale),
        }
        if settings.precision == "bf16":
            # Answers are sampled in float32; the ratio must start at 1 in what the updates compute in.
            found["logprobs"] = answer_logprobs(models.policy, bare, settings.temperature)
        raw = answer_scores(models.reward, bare)
    normalised = (raw - models.scale.mean) / models.scale.std
    clipped = normalised.clamp(-settings.score_clip, settings.score_clip)
    found["scores"] = clipped - settings.unended_penalty * (1 - bare.ended)
    return Rollout(**{**_as_dict(bare), **found}).to(torch.device("cpu"))


def _as_dict(rollout: Rollout) -> dict[str, Tensor]:
    return {field.name: getattr(rollout, field.name) for field in fields(rollout)}


def _join(parts: Sequence[Rollout], pad: int) -> Rollout:
    """Parts below each other, filled up to the longest prompt and answer."""
    prompt = max(part.prompts.shape[1] for part in parts)
    answer = max(part.answers.shape[1] for part in parts)
    wide: list[dict[str, Tensor]] = []
    for part in parts:
        left, right = prompt - part.prompts.shape[1], answer - part.answers.shape[1]
        found = _as_dict(part)
        found["prompts"] = F.pad(part.prompts, (left, 0), value=pad)
        found["padding"] = part.padding + left
        found["answers"] = F.pad(part.answers, (0, right), value=pad)
        for name in ("mask", "logprobs", "reference", "values"):
            found[name] = F.pad(found[name], (0, right))
        wide.append(found)
    return Rollout(**{name: torch.cat([part[name] for part in wide]) for name in wide[0]})
