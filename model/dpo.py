"""Direct preference optimisation: raise chosen over rejected answers, held by a fixed reference.

Worker: `python -m model.dpo JOBFILE`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from conf.contract import JobFile
from conf.dpo import DpoConfig
from model.batches import Batch
from model.best import Best
from model.dialogues import (
    BucketedOrder,
    EasyFirst,
    Pair,
    Renderer,
    labelled_logprobs,
    pair_tensors,
)
from model.engine import Engine, build_engine
from model.engine import Loss as StepLoss
from model.journal import Journal
from model.loop import GateClosed, train
from model.lora import add_lora, merge_lora
from model.ranks import Ranks
from model.soundness import soundness
from model.transformer import Transformer
from model.tuning import (
    batches_of,
    computing_in,
    loop_plan,
    order_of,
    refuse_blind_gate,
    spread,
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

Loss = Literal["sigmoid", "ipo", "ipo_sum", "hinge", "robust", "apo_zero", "simpo", "orpo", "kto"]

EVALUATED_ROWS = 32
"""Pairs in one forward pass without gradients."""
PER_TOKEN = ("ipo", "simpo", "orpo")
"""Losses of means over the tokens of an answer; the others are of sums."""
LEAST_UNLIKELY = 1e-12
"""Probabilities nearer to one than this have the odds of this."""


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
    takes_single = settings.loss == "kto"
    rows = renderer.pairs(read_preferences(folder, "train"), takes_single=takes_single)
    fitted = renderer.counts.take()
    held = renderer.pairs(read_preferences(folder, "held"), takes_single=takes_single)
    refuse_blind_gate(settings.on_gate, held)
    add_lora(model, settings.lora, settings.seed)
    engine = build_engine(model, job.launch, ranks, update_rule(settings))
    # The policy is its own reference as long as it has not learnt; this is before a checkpoint is read.
    course = Course(rows, held, Scorer(engine, settings, ranks), settings, job.state)
    look = Look(course, held, tokenizer, Best(job.state / "best.safetensors", ranks))
    plan = loop_plan(settings, course.steps, job.launch)
    state = train(
        engine,
        batch_at=course.batches(job),
        loss=step_loss(settings),
        plan=plan if settings.on_gate == "off" else replace(plan, is_over=look.is_closed),
        checkpoints=Checkpoints(job.state / "checkpoints", identity_of_job(job, settings), ranks),
        journal=journal,
        evaluate=look,
    )
    tuned = engine.whole()
    kept_step = look.keep_best(tuned) if settings.on_gate == "keep_best" else state.step
    rewards = course.held_rewards(tuned)
    accuracy = final_accuracy(rewards, state.evaluation, look)
    merge_lora(tuned)
    if ranks.is_first:
        save_model(job.files, tuned, role="policy", tokenizer=source / TOKENIZER)
    return {
        **training_figures(settings, state.step, len(rows), state),
        "kept_step": kept_step,
        "train": fitted,
        "accuracy": accuracy,
        **state.evaluation,
        # Of the weights that are kept, where those are not the last ones.
        **held_figures(rewards, held),
    }


class Course:
    """Which pairs each step sees, and what the reference thinks of them."""

    def __init__(
        self,
        rows: Sequence[Pair],
        held: Sequence[Pair],
        scorer: "Scorer",
        settings: DpoConfig,
        folder: Path,
    ) -> None:
        self.rows, self.held, self.scorer, self.settings = rows, held, scorer, settings
        self.steps = steps_of(settings, len(rows))
        self.order: BucketedOrder | EasyFirst
        self.order = order_of(settings, [row.length for row in rows], scorer.ranks)
        seen = range(self.steps) if settings.order == "mixed" else ()
        asked = sorted({row for step in seen for row in self.order.rows_at(step)})
        asked = asked or list(range(len(rows)))  # how easy a pair is must be known of all
        known = cached_reference(
            folder / "reference.safetensors", scorer, [*(rows[row] for row in asked), *held]
        )
        self.reference = torch.zeros(len(rows), 2)
        self.reference[asked] = known[: len(asked)]
        self.held_reference = known[len(asked) :]
        if settings.order == "easy_first":
            self.order = EasyFirst(gaps_of(rows, self.reference), self.order)
        self.strange: Tensor | None = None
        if settings.loss == "kto":
            pairs = [pair for step in range(self.steps) for pair in self._strangers(step)]
            known = cached_reference(folder / "strangers.safetensors", scorer, pairs)
            self.strange = known[:, 0].view(self.steps, -1)

    def batches(self, job: JobFile) -> Callable[[int], list[Batch]]:
        """Step -> this rank's micro-batches."""
        made = batches_of(
            self.order,
            lambda part: dpo_batch([self.rows[row] for row in part], self.reference[part]),
            job.launch,
            self.scorer.ranks,
        )

        def with_divergence(step: int) -> list[Batch]:
            assert self.strange is not None
            strayed = self.scorer.logprobs(self._strangers(step))[:, 0] - self.strange[step]
            found = strayed.mean().clamp(min=0)
            return [
                replace(batch, tensors={**batch.tensors, "divergence": found})
                for batch in made(step)
            ]

        return made if self.strange is None else with_divergence

    def held_rewards(self, model: Transformer) -> Tensor:
        """(held, 2): beta times the log-ratio to the reference, the reward that DPO implies."""
        return self.settings.beta * (self.scorer.logprobs(self.held, model) - self.held_reference)

    def _strangers(self, step: int) -> list[Pair]:
        """Each prompt of a step with an answer to the next one, the chosen where there is one, cut to fit."""
        rows = [self.rows[row] for row in self.order.rows_at(step)]
        found: list[Pair] = []
        for row, other in zip(rows, [*rows[1:], rows[0]], strict=True):
            answer = (other.chosen or other.rejected)[: row.length - len(row.prompt)]
            found.append(row._replace(chosen=answer, rejected=answer))
        return found


def gaps_of(rows: Sequence[Pair], reference: Tensor) -> list[float]:
    """By how much the reference takes each chosen answer for likelier than the rejected one, per token.

    Raises ValueError for a single answer.
    """
    if not all(row.chosen and row.rejected for row in rows):
        raise ValueError(
            "order=easy_first goes by both answers of a pair, and some are single answers with a label; use "
            "order=mixed"
        )
    lengths = torch.tensor([[len(row.chosen), len(row.rejected)] for row in rows])
    means = reference / lengths
    return (means[:, 0] - means[:, 1]).tolist()


class Look:
    """What is found at each look at the held-out pairs, and whether the policy fell apart."""

    def __init__(
        self, course: Course, held: Sequence[Pair], tokenizer: ChatTokenizer, best: Best
    ) -> None:
        self._course, self._tokenizer, self._best = course, tokenizer, best
        self.settings, self._engine = course.settings, course.scorer.engine
        self._prompts = [held[row].prompt for row in spread(len(held), self.settings.gate_answers)]
        if not self.settings.gate_answers:
            self._prompts = []

    def __call__(self, step: int) -> dict[str, float]:
        now, settings = self._engine.whole(), self.settings
        figures = held_figures(self._course.held_rewards(now), self._course.held)
        if self._prompts:
            figures |= soundness(
                now,
                self._prompts,
                self._tokenizer,
                max_new_tokens=settings.max_new_tokens,
                seed=settings.seed,
            )
        # Something is kept even of a policy that was apart before.
        if settings.on_gate == "keep_best" and (step == 0 or not self.is_closed(figures)):
            self._best.offer(now, step, figures["held_accuracy"])
        return figures

    def is_closed(self, figures: Mapping[str, float]) -> bool:
        """Whether the policy of these figures fell apart."""
        return (
            figures.get("held_chosen_reward", 0.0) < self.settings.gate_chosen_reward
            or figures.get("held_sound_share", 1.0) < self.settings.gate_sound_share
        )

    def keep_best(self, model: Transformer) -> int:
        """Give the model the weights that did best; the step that they are of."""
        return self._best.restore(model)


class Sided(NamedTuple):
    """A number for the chosen and one for the rejected answer of B pairs, (B,) each."""

    chosen: Tensor
    rejected: Tensor


def dpo_batch(rows: Sequence[Pair], reference: Tensor) -> Batch:
    """A micro-batch of pairs, packed, all chosen before all rejected, and the `reference`
    log-probabilities (B, 2)."""
    tensors = pair_tensors(rows)
    chosen, rejected = (float(sum(map(bool, side))) for side in _sides(rows))
    return Batch(
        tensors={**tensors, "reference": reference},
        weights={
            "rows": float(len(rows)),
            "chosen": chosen,
            "rejected": rejected,
            "chosen_tokens": float(sum(len(row.chosen) for row in rows)),
        },
        tokens=tensors["ids"].numel(),
        samples=[row.name for row in rows],
    )


def _sides(rows: Sequence[Pair]) -> tuple[list[list[int]], list[list[int]]]:
    return [row.chosen for row in rows], [row.rejected for row in rows]


def step_loss(settings: DpoConfig) -> StepLoss:
    """Mean loss of the step's pairs, a single answer being half of one, plus `rpo_alpha` times the chosen
    answers' mean likelihood loss.

    Source of the second term: Pang et al. 2024, equation 1 (iterative reasoning preference optimisation),
    per token of the step.
    """

    def loss(model: Transformer, batch: Batch, totals: Mapping[str, float]) -> dict[str, Tensor]:
        policy = Sided(*labelled_logprobs(model, batch.tensors).sum(-1).chunk(2))
        reference = Sided(*batch["reference"].unbind(1))
        likelihood = -policy.chosen.sum() / max(totals["chosen_tokens"], 1.0)
        gains = Sided(policy.chosen - reference.chosen, policy.rejected - reference.rejected)
        tokens = Sided(*(batch["labels"] >= 0).sum(1).chunk(2))
        if settings.loss in PER_TOKEN:
            policy, reference = _means(policy, tokens), _means(reference, tokens)
        each = dpo_loss(
            *policy,
            *reference,
            beta=settings.beta,
            loss=settings.loss,
            label_smoothing=settings.label_smoothing,
            gamma=settings.gamma,
            divergence=batch["divergence"] if settings.loss == "kto" else None,
            has=Sided((tokens.chosen > 0).float(), (tokens.rejected > 0).float()),
        )
        pairs = (totals["chosen"] + totals["rejected"]) / 2
        chosen = settings.beta * gains.chosen.sum() / max(totals["chosen"], 1.0)
        rejected = settings.beta * gains.rejected.sum() / max(totals["rejected"], 1.0)
        return {
            "loss": each.sum() / pairs + settings.rpo_alpha * likelihood,
            "chosen_reward": chosen,
            "rejected_reward": rejected,
            "margin": chosen - rejected,
            # Of a single answer: whether its reward has the sign of its label.
            "accuracy": (gains.chosen > gains.rejected).sum() / totals["rows"],
            "chosen_loss": likelihood,
        }

    return loss


def _means(sums: Sided, tokens: Sided) -> Sided:
    return Sided(sums.chosen / tokens.chosen, sums.rejected / tokens.rejected)


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float,
    loss: Loss = "sigmoid",
    label_smoothing: float = 0.0,
    gamma: float = 0.0,
    divergence: Tensor | None = None,
    has: Sided | None = None,
) -> Tensor:
    """(B,) loss of each pair; log 2 (sigmoid) when the policy equals the reference.

    Each of the four is (B,) float32: the log-probability of one whole answer, summed over its tokens;
    for `ipo`, `simpo` and `orpo` the mean over its tokens. `beta` is the pull to the reference, per nat.
    `label_smoothing` is the share of pairs taken to be labelled the wrong way round, `gamma` the margin of
    `simpo`, `divergence` (a scalar, nats) the point that `kto` measures from, `has` is 1 where
    there is an answer for `kto`, 0 elsewhere; all are there without it.

    Source: Rafailov et al. 2023, equation 7 (sigmoid); Mitchell 2023 (its smoothing); Azar et al.
    2023, equation 17 (ipo); Zhao et al. 2023 (hinge); Chowdhury et al. 2024, equation 12 (robust);
    D'Oosterlinck et al. 2024, equation 4 (apo_zero); Meng et al. 2024, equation 6 (simpo); Hong et al.
    2024, equation 7 (orpo, without its likelihood term); Ethayarajh et al. 2024, equation 8 (kto, both
    weights 1, mean of the two answers).
    Raises ValueError if the four shapes differ; broadcasting here would train on wrong pairs.
    """
    shapes = {
        x.shape for x in (policy_chosen, policy_rejected, reference_chosen, reference_rejected)
    }
    if len(shapes) != 1:
        raise ValueError(f"log-probabilities of a batch have shapes {shapes}; one is expected")
    gains = Sided(policy_chosen - reference_chosen, policy_rejected - reference_rejected)
    gain = gains.chosen - gains.rejected
    match loss:
        case "sigmoid":
            return _smoothed(beta * gain, label_smoothing)
        case "robust":
            right, wrong = -F.logsigmoid(beta * gain), -F.logsigmoid(-beta * gain)
            weighted = (1 - label_smoothing) * right - label_smoothing * wrong
            return weighted / (1 - 2 * label_smoothing)
        case "hinge":
            return F.relu(1 - beta * gain)
        case "ipo" | "ipo_sum":
            return (gain - 1 / (2 * beta)).square()
        case "apo_zero":
            return (beta * gains.rejected).sigmoid() - (beta * gains.chosen).sigmoid() + 1
        case "simpo":
            return _smoothed(beta * (policy_chosen - policy_rejected) - gamma, label_smoothing)
        case "orpo":
            return -beta * F.logsigmoid(_log_odds(policy_chosen) - _log_odds(policy_rejected))
        case "kto":
            assert divergence is not None, "kto measures from a divergence"
            better = (beta * (gains.chosen - divergence)).sigmoid()
            worse = (beta * (divergence - gains.rejected)).sigmoid()
            has = has or Sided(torch.ones_like(better), torch.ones_like(worse))
            most = (has.chosen + has.rejected) / 2
            return most - (better * has.chosen + worse * has.rejected) / 2


def _smoothed(gain: Tensor, label_smoothing: float) -> Tensor:
    right, wrong = -F.logsigmoid(gain), -F.logsigmoid(-gain)
    return (1 - label_smoothing) * right + label_smoothing * wrong


def _log_odds(logprob: Tensor) -> Tensor:
    return logprob - torch.log((-torch.expm1(logprob)).clamp(min=LEAST_UNLIKELY))


class Scorer:
    """Log-probabilities of both answers of pairs under an engine's model, without gradients."""

    def __init__(self, engine: Engine, settings: DpoConfig, ranks: Ranks) -> None:
        self.engine, self.ranks = engine, ranks
        self._precision: Literal["fp32", "bf16"] = settings.precision

    @torch.no_grad()
    def logprobs(self, rows: Sequence[Pair], model: Transformer | None = None) -> Tensor:
        """(rows, 2) float32 on the CPU, the same on all ranks, which share the work."""
        by_length = sorted(range(len(rows)), key=lambda row: rows[row].length)
        model = model or self.engine.whole()
        own = by_length[self.ranks.rank :: self.ranks.world]
        found = torch.zeros(len(rows), 2)
        device = self.ranks.device
        for start in range(0, len(own), EVALUATED_ROWS):
            part = own[start : start + EVALUATED_ROWS]
            tensors = pair_tensors([rows[row] for row in part])
            with computing_in(self._precision, device):
                found_here = labelled_logprobs(
                    model, {name: x.to(device) for name, x in tensors.items()}
                )
            found[part] = torch.stack(found_here.sum(-1).chunk(2), 1).cpu()
        # Every row is computed by one rank and 0 elsewhere.
        return torch.stack(self.ranks.gather(found)).sum(0)


def cached_reference(path: Path, scorer: Scorer, rows: Sequence[Pair]) -> Tensor:
    """(rows, 2) log-probabilities under the reference, computed where there are none at `path` and kept
    there, from where the stage makes them a part for other nodes."""
    if path.exists():
        return load_tensors(path)["logprobs"]
    logprobs = scorer.logprobs(rows)
    if scorer.ranks.is_first:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".draft")
        save_tensors(draft, {"logprobs": logprobs})
        draft.replace(path)
    return logprobs


def final_accuracy(rewards: Tensor, figures: Mapping[str, float], look: Look) -> dict[str, Any]:
    """Share of held-out pairs (rows, 2) in the right order, with n and interval.

    Raises GateClosed when on_gate=fail and the policy of the last look's figures fell apart.
    """
    settings = look.settings
    if settings.on_gate == "fail" and look.is_closed(figures):
        raise GateClosed(
            f"at the last look the mean reward of {len(rewards)} held-out chosen answers was "
            f"{figures.get('held_chosen_reward', 0.0):.2f} (gate_chosen_reward="
            f"{settings.gate_chosen_reward}) and {figures.get('held_sound_share', 1.0):.2f} of sampled "
            f"answers were sound (gate_sound_share={settings.gate_sound_share}): the policy fell apart; "
            f"raise rpo_alpha or beta, or lower the learning rate"
        )
    right = int((rewards[:, 0] > rewards[:, 1]).sum())
    return share(right, len(rewards), chance=0.5).model_dump()


def held_figures(rewards: Tensor, held: Sequence[Pair]) -> dict[str, float]:
    """What is followed during training; nothing without held-out pairs. `rewards` (rows, 2): beta
    times the log-ratio to the reference, the reward that DPO implies; 0 where there is no answer."""
    if not held:
        return {}
    chosen, rejected = rewards.double().unbind(1)
    counts = [max(1, sum(map(bool, side))) for side in _sides(held)]
    means = [
        float(side.sum()) / count for side, count in zip((chosen, rejected), counts, strict=True)
    ]
    return {
        "held_accuracy": float((chosen > rejected).double().mean()),
        "held_margin": means[0] - means[1],
        "held_chosen_reward": means[0],
        "held_rejected_reward": means[1],
    }


if __name__ == "__main__":
    main()
