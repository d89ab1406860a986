"""Direct preference optimisation: raise chosen over rejected answers, held by a fixed reference.

Worker: `python -m model.dpo JOBFILE`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from conf.contract import ExitCode, JobFile
from conf.dpo import DpoConfig
from model.batches import Batch
from model.dialogues import Pair, Renderer, pair_batch
from model.engine import Engine, build_engine
from model.engine import Loss as StepLoss
from model.journal import Journal
from model.loop import Ended, train
from model.lora import add_lora, merge_lora
from model.ranks import Ranks
from model.transformer import Transformer, token_logprobs
from model.tuning import (
    batches_of,
    computing_in,
    loop_plan,
    order_of,
    steps_of,
    training_figures,
    update_rule,
)
from model.weights import Checkpoints, load_model, load_tensors, save_model, save_tensors
from model.worker import identity_of_job, run
from storage.checkpoint import TOKENIZER
from storage.preferences import read_preferences
from storage.scores import share
from storage.tokenizer import ChatTokenizer

Loss = Literal["sigmoid", "ipo", "hinge", "robust"]

EVALUATED_ROWS = 32
"""Pairs in one forward pass without gradients."""


class GateClosed(Ended):
    """The policy fell apart, and on_gate=fail forbids that."""

    code = ExitCode.GATE


def main() -> None:
    """Entry of the worker."""
    run(work)


def work(job: JobFile, ranks: Ranks, journal: Journal) -> dict[str, Any]:
    """Train the job's policy on its pairs; the figures of the result."""
    settings = DpoConfig.model_validate(job.settings)
    source = Path(job.inputs["policy"])
    model, tokenizer = load_model(source), ChatTokenizer(source / TOKENIZER)
    renderer = Renderer.within(tokenizer, settings.context, model.shape.context)
    folder = Path(job.inputs["preferences"])
    rows = renderer.pairs(read_preferences(folder, "train"))
    fitted = renderer.counts.take()
    held = renderer.pairs(read_preferences(folder, "held"))
    steps = steps_of(settings, len(rows))
    order = order_of(settings, [row.length for row in rows], ranks)
    add_lora(model, settings.lora, settings.seed)
    engine = build_engine(model, job.launch, ranks, update_rule(settings))
    # The policy is its own reference as long as it has not learnt; this is before a checkpoint is read.
    scorer = Scorer(engine, tokenizer.pad, settings, ranks)
    asked = sorted({row for step in range(steps) for row in order.rows_at(step)})
    known = cached_reference(
        job.state / "reference.safetensors", scorer, [*(rows[row] for row in asked), *held]
    )
    reference = torch.zeros(len(rows), 2)
    reference[asked] = known[: len(asked)]

    def held_rewards() -> Tensor:
        return settings.beta * (scorer.logprobs(held) - known[len(asked) :])

    batch_at = batches_of(
        order,
        lambda part: dpo_batch([rows[row] for row in part], reference[part], tokenizer.pad),
        job.launch,
        ranks,
    )
    state = train(
        engine,
        batch_at=batch_at,
        loss=step_loss(settings),
        plan=loop_plan(settings, steps, job.launch),
        checkpoints=Checkpoints(job.state / "checkpoints", identity_of_job(job, settings), ranks),
        journal=journal,
        evaluate=lambda step: held_figures(held_rewards()),
    )
    accuracy = final_accuracy(held_rewards(), settings)
    tuned = engine.whole()
    merge_lora(tuned)
    if ranks.is_first:
        save_model(job.files, tuned, role="policy", tokenizer=source / TOKENIZER)
    return {
        **training_figures(settings, steps, len(rows), state),
        "train": fitted,
        "accuracy": accuracy,
        **state.evaluation,
    }


class Sided(NamedTuple):
    """A number for the chosen and one for the rejected answer of B pairs, (B,) each."""

    chosen: Tensor
    rejected: Tensor


def dpo_batch(rows: Sequence[Pair], reference: Tensor, pad: int) -> Batch:
    """A micro-batch of pairs: `ids` and `labels` (2 B, T), all chosen before all rejected, and the
    `reference` log-probabilities (B, 2)."""
    ids, labels = pair_batch(rows, pad)
    return Batch(
        tensors={"ids": ids, "labels": labels, "reference": reference},
        weights={
            "pairs": float(len(rows)),
            "chosen_tokens": float(sum(len(row.chosen) for row in rows)),
        },
        tokens=sum(2 * len(row.prompt) + len(row.chosen) + len(row.rejected) - 2 for row in rows),
        samples=[row.name for row in rows],
    )


def step_loss(settings: DpoConfig) -> StepLoss:
    """Mean loss of the step's pairs plus `rpo_alpha` times the chosen answers' mean likelihood loss.

    Source of the second term: Pang et al. 2024, equation 1 (iterative reasoning preference optimisation),
    per token of the step.
    """

    def loss(model: Transformer, batch: Batch, totals: Mapping[str, float]) -> dict[str, Tensor]:
        policy = Sided(*answer_logprobs(model, batch["ids"], batch["labels"]).chunk(2))
        reference = Sided(*batch["reference"].unbind(1))
        likelihood = -policy.chosen.sum() / totals["chosen_tokens"]
        gains = Sided(policy.chosen - reference.chosen, policy.rejected - reference.rejected)
        if settings.loss == "ipo":
            tokens = Sided(*(batch["labels"] >= 0).sum(1).chunk(2))
            policy, reference = _means(policy, tokens), _means(reference, tokens)
        each = dpo_loss(
            *policy,
            *reference,
            beta=settings.beta,
            loss=settings.loss,
            label_smoothing=settings.label_smoothing,
        )
        pairs = totals["pairs"]
        return {
            "loss": each.sum() / pairs + settings.rpo_alpha * likelihood,
            "chosen_reward": settings.beta * gains.chosen.sum() / pairs,
            "rejected_reward": settings.beta * gains.rejected.sum() / pairs,
            "margin": settings.beta * (gains.chosen - gains.rejected).sum() / pairs,
            "accuracy": (gains.chosen > gains.rejected).sum() / pairs,
            "chosen_loss": likelihood,
        }

    return loss


def _means(sums: Sided, tokens: Sided) -> Sided:
    return Sided(sums.chosen / tokens.chosen, sums.rejected / tokens.rejected)


def answer_logprobs(model: Transformer, ids: Tensor, labels: Tensor) -> Tensor:
    """(B,) float32: log-probability of the labelled tokens of each row (B, T), summed, in nats."""
    # The head after the states: ZeRO 3 lets go of a tied embedding once that has been read.
    hidden = model.hidden(ids)
    return token_logprobs(model.head_weight, hidden, labels).sum(-1)


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float,
    loss: Loss = "sigmoid",
    label_smoothing: float = 0.0,
) -> Tensor:
    """(B,) loss of each pair; log 2 (sigmoid) when the policy equals the reference.

    Each argument is (B,) float32: the log-probability of one whole answer, summed over its tokens;
    for `ipo` the mean over its tokens. `beta` is the pull to the reference, per nat.
    `label_smoothing` is the share of pairs taken to be labelled the wrong way round.

    Source: Rafailov et al. 2023, equation 7 (sigmoid); Mitchell 2023 (its smoothing); Azar et al.
    2023, equation 17 (ipo); Zhao et al. 2023 (hinge); Chowdhury et al. 2024, equation 12 (robust).
    Raises ValueError if the four shapes differ; broadcasting here would train on wrong pairs.
    """
    shapes = {
        x.shape for x in (policy_chosen, policy_rejected, reference_chosen, reference_rejected)
    }
    if len(shapes) != 1:
        raise ValueError(f"log-probabilities of a batch have shapes {shapes}; one is expected")
    gain = (policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)
    right, wrong = -F.logsigmoid(beta * gain), -F.logsigmoid(-beta * gain)
    match loss:
        case "sigmoid":
            return (1 - label_smoothing) * right + label_smoothing * wrong
        case "robust":
            weighted = (1 - label_smoothing) * right - label_smoothing * wrong
            return weighted / (1 - 2 * label_smoothing)
        case "hinge":
            return F.relu(1 - beta * gain)
        case "ipo":
            return (gain - 1 / (2 * beta)).square()


class Scorer:
    """Log-probabilities of both answers of pairs under an engine's model, without gradients."""

    def __init__(self, engine: Engine, pad: int, settings: DpoConfig, ranks: Ranks) -> None:
        self._engine, self._pad, self._ranks = engine, pad, ranks
        self.is_first = ranks.is_first
        self._precision: Literal["fp32", "bf16"] = settings.precision

    @torch.no_grad()
    def logprobs(self, rows: Sequence[Pair]) -> Tensor:
        """(rows, 2) float32 on the CPU, the same on all ranks, which share the work."""
        by_length = sorted(range(len(rows)), key=lambda row: rows[row].length)
        model = self._engine.whole()
        own = by_length[self._ranks.rank :: self._ranks.world]
        found = torch.zeros(len(rows), 2)
        for start in range(0, len(own), EVALUATED_ROWS):
            part = own[start : start + EVALUATED_ROWS]
            ids, labels = pair_batch([rows[row] for row in part], self._pad)
            device = self._ranks.device
            with computing_in(self._precision, device):
                sums = answer_logprobs(model, ids.to(device), labels.to(device))
            found[part] = torch.stack(sums.chunk(2), 1).cpu()
        # Every row is computed by one rank and 0 elsewhere.
        return torch.stack(self._ranks.gather(found)).sum(0)


def cached_reference(path: Path, scorer: Scorer, rows: Sequence[Pair]) -> Tensor:
    """(rows, 2) log-probabilities under the reference, computed once per attempt and kept at `path`."""
    if path.exists():
        return load_tensors(path)["logprobs"]
    logprobs = scorer.logprobs(rows)
    if scorer.is_first:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".draft")
        save_tensors(draft, {"logprobs": logprobs})
        draft.replace(path)
    return logprobs


def final_accuracy(rewards: Tensor, settings: DpoConfig) -> dict[str, Any]:
    """Share of held-out pairs (rows, 2) in the right order, with n and interval.

    Raises GateClosed when on_gate=fail and the chosen answers became unlikely.
    """
    chosen_reward = float(rewards[:, 0].double().mean()) if len(rewards) else 0.0
    if settings.on_gate == "fail" and chosen_reward < settings.gate_chosen_reward:
        raise GateClosed(
            f"the mean reward of {len(rewards)} held-out chosen answers is {chosen_reward:.2f}, "
            f"on_gate=fail asks for {settings.gate_chosen_reward} or more: chosen answers became "
            f"unlikely; raise rpo_alpha or beta, or lower the learning rate"
        )
    right = int((rewards[:, 0] > rewards[:, 1]).sum())
    return share(right, len(rewards), chance=0.5).model_dump()


def held_figures(rewards: Tensor) -> dict[str, float]:
    """What is followed during training; nothing without held-out pairs. `rewards` (rows, 2): beta
    times the log-ratio to the reference, the reward that DPO implies."""
    if not len(rewards):
        return {}
    chosen, rejected = rewards.double().unbind(1)
    return {
        "held_accuracy": float((chosen > rejected).double().mean()),
        "held_margin": float((chosen - rejected).mean()),
        "held_chosen_reward": float(chosen.mean()),
        "held_rejected_reward": float(rejected.mean()),
    }


if __name__ == "__main__":
    main()
