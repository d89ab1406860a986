"""What a policy says to prompts, and what reference, value model and reward model make of it.

Letters of tensor shapes: B rows, N answer tokens (right padded), W answer tokens of all rows end to end.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from conf.ppo import PpoConfig
from model.advantages import (
    generalised_advantages,
    group_advantages,
    kl_per_token,
    token_rewards,
    whiten,
)
from model.generate import generate
from model.lora import correction_off
from model.opinions import Opinion
from model.packing import Packing, Sequenced, pack
from model.ranks import Ranks
from model.transformer import Transformer, token_logprobs
from model.tuning import computing_in
from storage.checkpoint import RewardScale
from storage.conversations import Conversation
from storage.tokenizer import ChatTokenizer


class Prompt(NamedTuple):
    """A conversation up to the header of its last answer."""

    ids: list[int]
    row: Conversation


@dataclass(frozen=True)
class Models:
    """The models of PPO; only policy and value model learn."""

    policy: Transformer
    reference: Transformer | None
    """None where it is the policy without its correction."""
    value: Transformer | None
    """None where answers are compared with each other."""
    reward: Transformer | None
    """None where others judge."""
    scale: RewardScale
    """Mean and deviation that make scores, and with them values, comparable between reward models."""


@dataclass(frozen=True)
class Rollout:
    """Answers to B prompts with everything that the updates need, on the CPU."""

    prompts: list[list[int]]
    answers: Tensor
    """(B, N) int64, right padded."""
    mask: Tensor
    """(B, N) float32, 1 on answer tokens."""
    logprobs: Tensor
    """(B, N) of the policy that answered, at the sampling temperature; 0 behind the end."""
    reference: Tensor
    """(B, N) of the reference, likewise."""
    values: Tensor
    """(B, N) before each answer token; 0 behind the end, and without a value model."""
    scores: Tensor
    """(B,) of the reward model, normalised, until `earned` makes them what an answer earns."""
    ended: Tensor
    """(B,) float32, 1 where the answer ended in time."""

    @property
    def last(self) -> Tensor:
        """(B,) number of the last token of each answer."""
        return self.mask.sum(1).long() - 1

    @property
    def answer_ids(self) -> list[list[int]]:
        """Tokens of each answer, its end included."""
        lengths = self.mask.sum(1).long().tolist()
        return [ids[:length] for ids, length in zip(self.answers.tolist(), lengths, strict=True)]

    def packed(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Tensors of the Packing of some rows, with the W states from which their tokens are chosen."""
        answers = self.answer_ids
        return pack([
            Sequenced(
                [*self.prompts[row], *answers[row]],
                range(len(self.prompts[row]) - 1, len(self.prompts[row]) + len(answers[row]) - 1),
            )
            for row in rows
        ])  # fmt: skip

    def packed_ends(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """The same with the states at the last tokens of the answers."""
        answers = self.answer_ids
        whole = [[*self.prompts[row], *answers[row]] for row in rows]
        return pack([Sequenced(ids, [len(ids) - 1]) for ids in whole])


@dataclass
class Answering:
    """Lets a policy answer prompts, and says what the answers earn."""

    models: Callable[[], Models]
    """The models as they are now."""
    tokenizer: ChatTokenizer
    settings: PpoConfig
    ranks: Ranks
    micro_batch: int
    opinions: Mapping[str, Opinion]
    scales: dict[str, tuple[float, float]] = field(default_factory=dict[str, tuple[float, float]])
    """Mean and deviation of each opinion, taken once, of what the policy says before it learns."""

    def at(self, prompts: Sequence[Prompt], seed: int) -> tuple[Rollout, dict[str, float]]:
        """Answers with what they earn, and the mean of every source of the reward."""
        models = self.models()
        rollout = self.rollout(models, prompts, seed)
        is_one_of_several = self.opinions and models.reward is not None
        means = {"reward/model": float(rollout.scores.mean())} if is_one_of_several else {}
        extra = torch.zeros(len(prompts))
        for name, values in self.said(self.opinions, prompts, rollout).items():
            known = [value for value in values if value is not None]
            if known:
                means[f"reward/{name}"] = sum(known) / len(known)
            means[f"scored_share/{name}"] = len(known) / max(1, len(values))
            mean, deviation = self.scales.get(name, (0.0, 1.0))
            weight: float = getattr(self.settings.weights, name)
            scaled = [0.0 if value is None else (value - mean) / deviation for value in values]
            extra += weight * torch.tensor(scaled)
        return earned(rollout, extra, self.settings), means

    def measure(self, prompts: Sequence[Prompt], seed: int) -> None:
        """Take the opinions' scales from answers to these prompts."""
        if not self.opinions:
            return
        rollout = self.rollout(self.models(), prompts, seed)
        found = self.said(self.opinions, prompts, rollout)
        for name, values in found.items():
            known = torch.tensor([value for value in values if value is not None])
            if len(known) > 1:
                # Equal scores everywhere leave nothing to normalise by.
                self.scales[name] = (float(known.mean()), float(known.std()) or 1.0)

    def said(
        self, opinions: Mapping[str, Opinion], prompts: Sequence[Prompt], rollout: Rollout
    ) -> dict[str, list[float | None]]:
        """What each opinion says of every answer, asked by the first rank alone."""
        if not opinions:
            return {}
        found: dict[str, list[float | None]] = {}
        if self.ranks.is_first:
            answers = self._answers(prompts, rollout)
            found = {name: opinion(answers) for name, opinion in opinions.items()}
        return self.ranks.gather(found)[0]

    def _answers(self, prompts: Sequence[Prompt], rollout: Rollout) -> list[dict[str, Any]]:
        ended = rollout.ended.tolist()
        return [
            {
                "text": self.tokenizer.decode(ids[: len(ids) - int(is_ended)]).strip(),
                "is_ended": bool(is_ended),
                "messages": prompt.row["messages"][:-1],
                "reference": prompt.row["messages"][-1]["content"],
                **{name: prompt.row[name] for name in ("id", "domain", "language")},
            }
            for prompt, ids, is_ended in zip(prompts, rollout.answer_ids, ended, strict=True)
        ]

    def rollout(self, models: Models, prompts: Sequence[Prompt], seed: int) -> Rollout:
        """Answers with what the models make of them, each rank its share; all ranks get the whole.

        The noise of a row depends on the seed and its number alone.
        """
        ranks = self.ranks
        own = list(range(len(prompts)))[ranks.rank :: ranks.world]
        bare = self._answered(models.policy, [prompts[row].ids for row in own], own, seed)
        size = self.micro_batch or max(1, len(own))
        parts = [
            _judged(models, _rows(bare, range(len(own))[start : start + size]), self)
            for start in range(0, len(own), size)
        ]
        by_rank = ranks.gather((own, [_as_dict(part) for part in parts]))
        order = [row for rows, _ in by_rank for row in rows]
        whole = _join([Rollout(**part) for _, found in by_rank for part in found])
        places = sorted(range(len(order)), key=lambda place: order[place])
        return _rows(whole, places)

    def _answered(
        self, policy: Transformer, prompts: list[list[int]], rows: Sequence[int], seed: int
    ) -> Rollout:
        """Answers to prompts of which nobody has said anything yet."""
        settings, tokenizer = self.settings, self.tokenizer
        made = generate(
            policy,
            prompts,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            seed=seed,
            eos=tokenizer.im_end,
            pad=tokenizer.pad,
            rows=rows,
            at_once=self.micro_batch,
        )
        mask = (torch.arange(made.ids.shape[1]) < made.lengths[:, None]).float()
        return Rollout(
            prompts=prompts,
            answers=made.ids,
            mask=mask,
            logprobs=made.logprobs,
            reference=torch.zeros_like(mask),
            values=torch.zeros_like(mask),
            scores=torch.zeros(len(rows)),
            ended=made.ended.float(),
        )


def earned(rollout: Rollout, extra: Tensor, settings: PpoConfig) -> Rollout:
    """With the scores that answers earn: (B,) of all sources, clipped, and lowered where one did not end."""
    clipped = (settings.weights.model * rollout.scores + extra).clamp(
        -settings.score_clip, settings.score_clip
    )
    return replace(rollout, scores=clipped - settings.unended_penalty * (1 - rollout.ended))


def advantages_of(rollout: Rollout, settings: PpoConfig, kl_coef: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns, (B, N) each, 0 behind the end; those of ppo are whitened."""
    kl = kl_per_token(rollout.logprobs, rollout.reference, settings.kl_estimator) * rollout.mask
    cost = kl_coef if settings.kl_in == "reward" else 0.0
    rewards = token_rewards(kl, rollout.scores, rollout.last, kl_coef=cost)
    if settings.method == "ppo":
        advantages, returns = generalised_advantages(
            rewards, rollout.values, gamma=settings.gamma, lam=settings.lam
        )
        return whiten(advantages * rollout.mask, rollout.mask), returns * rollout.mask
    whole = rewards.sum(1)
    each = group_advantages(whole, settings.method, settings.samples_per_prompt)
    return each[:, None] * rollout.mask, whole[:, None] * rollout.mask


def kl_of(rollout: Rollout) -> Tensor:
    """(B,) estimate of each answer's divergence from the reference (k1), in nats."""
    return ((rollout.logprobs - rollout.reference) * rollout.mask).sum(1)


def answer_logprobs(
    model: Transformer, batch: Mapping[str, Tensor], labels: Tensor, temperature: float
) -> Tensor:
    """(W,) float32 log-probability of each answer token (W,) of packed rows."""
    # The head after the states: ZeRO 3 lets go of a tied embedding once that has been read.
    states = model.hidden(batch["ids"], packing=Packing.of(batch))[0]
    return token_logprobs(model.head_weight, states, labels, temperature)


def answer_values(model: Transformer, batch: Mapping[str, Tensor], scale: RewardScale) -> Tensor:
    """(W,) float32 value before each answer token of packed rows, in normalised score."""
    states = model.hidden(batch["ids"], packing=Packing.of(batch))[0]
    return (model.score(states) - scale.mean) / scale.std


def apart(values: Tensor, mask: Tensor) -> Tensor:
    """(B, N) of (W,) values; 0 behind the ends."""
    return torch.zeros_like(mask).masked_scatter(mask > 0, values)


@torch.no_grad()
def _judged(models: Models, bare: Rollout, asking: Answering) -> Rollout:
    """The rollout with what the other models say of it."""
    settings, device = asking.settings, asking.ranks.device
    rows = range(len(bare.prompts))
    batch = {name: value.to(device) for name, value in bare.packed(rows).items()}
    labels = bare.answers[bare.mask > 0].to(device)

    def logprobs(model: Transformer) -> Tensor:
        found = answer_logprobs(model, batch, labels, settings.temperature)
        return apart(found.cpu(), bare.mask)

    found: dict[str, Tensor] = {}
    with computing_in(settings.precision, device):
        if models.reference is not None:
            found["reference"] = logprobs(models.reference)
        else:
            with correction_off(models.policy):
                found["reference"] = logprobs(models.policy)
        if settings.precision == "bf16":
            # Answers are sampled in float32; the ratio must start at 1 in what the updates compute in.
            found["logprobs"] = logprobs(models.policy)
        if models.value is not None:
            found["values"] = apart(
                answer_values(models.value, batch, models.scale).cpu(), bare.mask
            )
        if models.reward is not None:
            ends = {name: value.to(device) for name, value in bare.packed_ends(rows).items()}
            found["scores"] = answer_values(models.reward, ends, models.scale).cpu()
    return replace(bare, **found)


def _as_dict(rollout: Rollout) -> dict[str, Any]:
    return {part.name: getattr(rollout, part.name) for part in fields(rollout)}


def _rows(rollout: Rollout, rows: Sequence[int]) -> Rollout:
    """Only those rows."""
    picked = torch.as_tensor(rows)
    tensors = {n: v[picked] for n, v in _as_dict(rollout).items() if isinstance(v, Tensor)}
    return Rollout(prompts=[rollout.prompts[row] for row in rows], **tensors)


def _join(parts: Sequence[Rollout]) -> Rollout:
    """Parts below each other, filled up to the longest answer."""
    longest = max(part.answers.shape[1] for part in parts)
    wide: dict[str, list[Tensor]] = {}
    for part in parts:
        for name, value in _as_dict(part).items():
            if isinstance(value, Tensor):
                right = longest - value.shape[1] if value.dim() == 2 else 0
                wide.setdefault(name, []).append(F.pad(value, (0, right)) if right else value)
    tensors = {name: torch.cat(values) for name, values in wide.items()}
    return Rollout(prompts=[prompt for part in parts for prompt in part.prompts], **tensors)
