"""What the updates of an iteration learn from, and the losses by which they do.

Letters of tensor shapes: B rows, N answer tokens (right padded), W answer tokens of all rows end to end, V
vocabulary, D width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from conf.ppo import PpoConfig
from model.advantages import kl_per_token, policy_loss, value_loss
from model.batches import Batch
from model.engine import Loss
from model.packing import Packing
from model.rollouts import Rollout, answer_values
from model.transformer import LOGITS_AT_ONCE, Transformer, token_logprobs
from storage.checkpoint import RewardScale


@dataclass(frozen=True)
class Lesson:
    """What an iteration's updates learn from."""

    rollout: Rollout
    advantages: Tensor
    """(B, N), 0 behind the ends of the answers; returns likewise."""
    returns: Tensor
    kl_coef: float

    def batch(self, rows: Sequence[int]) -> Batch:
        """A micro-batch of some rows: them packed, and per answer token (W,) what the losses need."""
        rollout = self.rollout
        is_token = rollout.mask[rows] > 0
        by_token = {
            "labels": rollout.answers,
            "logprobs": rollout.logprobs,
            "reference": rollout.reference,
            "values": rollout.values,
            "advantages": self.advantages,
            "returns": self.returns,
        }
        tensors = {name: value[rows][is_token] for name, value in by_token.items()}
        tokens = int(is_token.sum())
        return Batch({**rollout.packed(rows), **tensors}, {"tokens": float(tokens)}, tokens)


def policy_step_loss(settings: PpoConfig, kl_coef: float) -> Loss:
    """Clipped policy loss per answer token of the step, with the divergence and the entropy that the settings
    put into it; how much was clipped, how far the policy went."""

    def loss(model: Transformer, batch: Batch, totals: Mapping[str, float]) -> dict[str, Tensor]:
        tokens, old = totals["tokens"], batch["logprobs"]
        # The head after the states: ZeRO 3 lets go of a tied embedding once that has been read.
        states = model.hidden(batch["ids"], packing=Packing.of(batch.tensors))[0]
        logprobs = token_logprobs(model.head_weight, states, batch["labels"], settings.temperature)
        each, is_clipped = policy_loss(logprobs, old, batch["advantages"], clip=settings.ratio_clip)
        added = each
        if settings.kl_in == "loss":
            kl = kl_per_token(logprobs, batch["reference"], settings.kl_estimator)
            added = added + kl_coef * kl
        if settings.entropy_coef:
            entropies = token_entropies(model.head_weight, states, settings.temperature)
            added = added - settings.entropy_coef * entropies
        ratio = (logprobs - old).exp()
        return {
            "loss": added.sum() / tokens,
            "clip_fraction": is_clipped.sum() / tokens,
            # Mean over the tokens, which a few wrong log-probabilities would move as well.
            "ratio_gap": (ratio - 1).abs().sum() / tokens,
            # Never negative, so that it can end an iteration's updates.
            "policy_kl": kl_per_token(old, logprobs, "k3").sum() / tokens,
        }

    return loss


def value_step_loss(settings: PpoConfig, scale: RewardScale) -> Loss:
    """Clipped value loss per answer token of the step, and how much was clipped."""

    def loss(model: Transformer, batch: Batch, totals: Mapping[str, float]) -> dict[str, Tensor]:
        tokens, values = totals["tokens"], answer_values(model, batch.tensors, scale)
        each, is_clipped = value_loss(
            values, batch["values"], batch["returns"], clip=settings.value_clip
        )
        return {"loss": each.sum() / tokens, "clip_fraction": is_clipped.sum() / tokens}

    return loss


def token_entropies(head_weight: Tensor, states: Tensor, temperature: float) -> Tensor:
    """(W,) float32: entropy of the distribution of the next token at each of the states (W, D), in nats."""
    rows = max(1, LOGITS_AT_ONCE // head_weight.shape[0])
    parts = [
        checkpoint(_entropies, head_weight, part, temperature, use_reentrant=False)
        for part in states.split(rows)
    ]
    return torch.cat(cast("list[Tensor]", parts))


def _entropies(head_weight: Tensor, states: Tensor, temperature: float) -> Tensor:
    logprobs = (F.linear(states, head_weight).float() / temperature).log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1)
