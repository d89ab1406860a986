"""The reward model: one number for a whole answer, learnt from which of two answers is better.

Worker: `python -m model.reward JOBFILE`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from conf.contract import ExitCode, JobFile
from conf.reward import RewardConfig
from model.batches import Batch
from model.best import Best
from model.dialogues import Pair, Renderer, right_pad
from model.engine import Loss, build_engine
from model.generate import generate_batches
from model.journal import Journal
from model.loop import Ended, train
from model.ranks import Ranks
from model.transformer import Transformer
from model.tuning import (
    batches_of,
    computing_in,
    loop_plan,
    order_of,
    spread,
    steps_of,
    training_figures,
    update_rule,
)
from model.weights import Checkpoints, load_model, save_model
from model.worker import identity_of_job, run
from storage.checkpoint import TOKENIZER, RewardScale
from storage.preferences import read_preferences
from storage.scores import share
from storage.tokenizer import ChatTokenizer

EVALUATED_ROWS = 32
"""Held-out pairs in one forward pass, and answers for the scale."""
MARGIN_GROUPS = 4
MOST_MARGINS = 8
"""Accuracy is told for each margin where there are no more than this, else for quarters of the pairs."""


class GateClosed(Ended):
    """The accuracy on held-out pairs stayed below what on_gate=fail asks for."""

    code = ExitCode.GATE


def main() -> None:
    """Entry of the worker."""
    run(work)


def work(job: JobFile, ranks: Ranks, journal: Journal) -> dict[str, Any]:
    """Train the job's reward model; the figures of the result."""
    settings = RewardConfig.model_validate(job.settings)
    source = Path(job.inputs["policy"])
    model = load_model(source, is_scalar=True, seed=settings.seed)
    tokenizer = ChatTokenizer(source / TOKENIZER)
    renderer = Renderer.within(tokenizer, settings.context, model.shape.context)
    folder = Path(job.inputs["preferences"])
    rows = renderer.pairs(read_preferences(folder, "train"))
    fitted = renderer.counts.take()
    held = renderer.pairs(read_preferences(folder, "held"))
    rows = shuffled_labels(rows, settings.seed) if settings.shuffle_labels else rows
    steps = steps_of(settings, len(rows))
    batch_at = batches_of(
        order_of(settings, [row.length for row in rows], ranks),
        lambda numbers: reward_batch([rows[row] for row in numbers], tokenizer.pad),
        job.launch,
        ranks,
    )
    best = Best(job.state / "best.safetensors", ranks)

    engine = build_engine(model, job.launch, ranks, update_rule(settings))

    def evaluate(step: int) -> dict[str, float]:
        now = engine.whole()
        figures = held_accuracy(held_scores(now, held, tokenizer.pad, settings, ranks))
        if held and settings.on_gate == "keep_best":
            best.offer(now, step, figures["held_accuracy"])
        return figures

    state = train(
        engine,
        batch_at=batch_at,
        loss=step_loss(settings),
        plan=loop_plan(settings, steps, job.launch),
        checkpoints=Checkpoints(job.state / "checkpoints", identity_of_job(job, settings), ranks),
        journal=journal,
        evaluate=evaluate,
    )
    model = engine.whole()
    kept_step = best.restore(model) if held and settings.on_gate == "keep_best" else steps
    accuracy = final_accuracy(
        held_scores(model, held, tokenizer.pad, settings, ranks), held, settings
    )
    policy = load_model(source, device=ranks.device)
    scale, answers = score_scale(policy, model, rows, tokenizer, settings)
    if ranks.is_first:
        save_model(job.files, model, role="reward", tokenizer=source / TOKENIZER)
        scale.write(job.files)
    return {
        **training_figures(settings, steps, len(rows), state),
        "kept_step": kept_step,
        "train": fitted,
        "accuracy": accuracy,
        "scale": {"mean": scale.mean, "std": scale.std, "n": answers},
    }


def shuffled_labels(rows: Sequence[Pair], seed: int) -> list[Pair]:
    """The pairs with their answers exchanged wherever a coin says so: the negative control."""
    coins = _coins(len(rows), seed, 0)
    return [
        row._replace(chosen=row.rejected, rejected=row.chosen) if coin else row
        for row, coin in zip(rows, coins, strict=True)
    ]


def shuffled_accuracy(scores: Sequence[tuple[float, float]], seed: int) -> dict[str, Any]:
    """Accuracy on held-out pairs with labels by other coins: 1/2 unless training saw them.

    Against the true labels a model of shuffled ones may well be right or wrong throughout: chance
    decides the sign of what it takes for quality, once for all pairs.
    """
    coins = _coins(len(scores), seed, 1)
    right = [
        (rejected > chosen) if coin else (chosen > rejected)
        for (chosen, rejected), coin in zip(scores, coins, strict=True)
    ]
    return share(sum(right), len(right), chance=0.5).model_dump()


def _coins(count: int, seed: int, side: int) -> np.ndarray:
    key = np.random.SeedSequence((seed, 4, side))
    return np.random.Generator(np.random.Philox(key)).integers(0, 2, count)


def reward_batch(rows: Sequence[Pair], pad: int) -> Batch:
    """A micro-batch of pairs: `ids` (2 B, T), all chosen before all rejected, and their `lengths`."""
    sides = [*(r.prompt + r.chosen for r in rows), *(r.prompt + r.rejected for r in rows)]
    lengths = [len(side) for side in sides]
    return Batch(
        tensors={
            "ids": right_pad(sides, pad),
            "lengths": torch.tensor(lengths),
            "margins": torch.tensor([row.margin for row in rows], dtype=torch.float32),
        },
        weights={"pairs": float(len(rows))},
        tokens=sum(lengths),
        samples=[row.name for row in rows],
    )


def step_loss(settings: RewardConfig) -> Loss:
    """Mean loss of the step's pairs, and how many are in the right order."""

    def loss(model: Transformer, batch: Batch, totals: Mapping[str, float]) -> dict[str, Tensor]:
        chosen, rejected = last_token_scores(model, batch["ids"], batch["lengths"]).chunk(2)
        margins = settings.margin_weight * batch["margins"]
        each = reward_loss(chosen, rejected, margins, centring=settings.centring)
        return {
            "loss": each.sum() / totals["pairs"],
            "accuracy": (chosen > rejected).sum() / totals["pairs"],
            "margin": (chosen - rejected).sum() / totals["pairs"],
        }

    return loss


def last_token_scores(model: Transformer, ids: Tensor, lengths: Tensor) -> Tensor:
    """(B,) float32: the score of each row, read at its last real token; ids (B, T) right padded."""
    hidden = model.hidden(ids)
    rows = torch.arange(len(ids), device=ids.device)
    return model.score(hidden[rows, lengths - 1])


def reward_loss(chosen: Tensor, rejected: Tensor, margin: Tensor, *, centring: float) -> Tensor:
    """(B,) loss of each pair from the scores of its answers, (B,) each.

    -log sigmoid(chosen - rejected - margin), and `centring` times (chosen + rejected) squared, which
    keeps the scores near zero without changing their order.
    Source: Touvron et al. 2023 (Llama 2), equation 2; Eisenstein et al. 2023, section 2 (centring).
    """
    if not chosen.shape == rejected.shape == margin.shape:
        raise ValueError(
            f"scores {tuple(chosen.shape)}, {tuple(rejected.shape)} and margins "
            f"{tuple(margin.shape)} must have one shape"
        )
    ranking = -F.logsigmoid(chosen - rejected - margin)
    return ranking + centring * (chosen + rejected).square()


@torch.no_grad()
def held_scores(
    model: Transformer, held: Sequence[Pair], pad: int, settings: RewardConfig, ranks: Ranks
) -> list[tuple[float, float]]:
    """Scores of the chosen and the rejected answer of every pair, in order."""
    own = sorted(range(len(held)), key=lambda row: held[row].length)[ranks.rank :: ranks.world]
    found: dict[int, tuple[float, float]] = {}
    for start in range(0, len(own), EVALUATED_ROWS):
        part = own[start : start + EVALUATED_ROWS]
        batch = reward_batch([held[row] for row in part], pad).to(ranks.device)
        with computing_in(settings.precision, ranks.device):
            scores = last_token_scores(model, batch["ids"], batch["lengths"]).tolist()
        found |= dict(
            zip(part, zip(scores[: len(part)], scores[len(part) :], strict=True), strict=True)
        )
    merged: dict[int, tuple[float, float]] = {}
    for partial in ranks.gather(found):
        merged |= partial
    return [merged[row] for row in range(len(held))]


def held_accuracy(scores: Sequence[tuple[float, float]]) -> dict[str, float]:
    """What is followed during training; nothing without held-out pairs."""
    if not scores:
        return {}
    gaps = [chosen - rejected for chosen, rejected in scores]
    return {
        "held_accuracy": sum(gap > 0 for gap in gaps) / len(gaps),
        "held_margin": sum(gaps) / len(gaps),
    }


def final_accuracy(
    scores: Sequence[tuple[float, float]], held: Sequence[Pair], settings: RewardConfig
) -> dict[str, dict[str, Any]]:
    """The accuracies of the result. Raises GateClosed when on_gate=fail asks for more."""
    accuracy = accuracy_figures(scores, held)
    if settings.shuffle_labels:
        accuracy["held_shuffled"] = shuffled_accuracy(scores, settings.seed)
    found = accuracy["held"]["value"]
    if held and settings.on_gate == "fail" and found < settings.gate_accuracy:
        raise GateClosed(
            f"accuracy on {len(held)} held-out pairs is {found:.3f}, on_gate=fail asks for "
            f"{settings.gate_accuracy}; look at the pairs, train longer, or lower gate_accuracy"
        )
    return accuracy


def accuracy_figures(
    scores: Sequence[tuple[float, float]], held: Sequence[Pair]
) -> dict[str, dict[str, Any]]:
    """Share of held-out pairs in the right order with n and interval: of all, and by margin."""
    is_right = [chosen > rejected for chosen, rejected in scores]
    figures = {"held": share(sum(is_right), len(is_right), chance=0.5).model_dump()}
    for name, members in _by_margin([row.margin for row in held]).items():
        right = sum(is_right[row] for row in members)
        figures[f"margin {name}"] = share(right, len(members), chance=0.5).model_dump()
    return figures


def _by_margin(margins: Sequence[float]) -> dict[str, list[int]]:
    distinct = sorted(set(margins))
    if len(distinct) < 2:
        return {}
    if len(distinct) <= MOST_MARGINS:
        return {
            f"{value:g}": [row for row, margin in enumerate(margins) if margin == value]
            for value in distinct
        }
    order = sorted(range(len(margins)), key=lambda row: margins[row])
    groups = np.array_split(np.array(order), MARGIN_GROUPS)
    return {
        f"{margins[group[0]]:.3g} to {margins[group[-1]]:.3g}": group.tolist() for group in groups
    }


@torch.no_grad()
def score_scale(
    policy: Transformer,
    model: Transformer,
    rows: Sequence[Pair],
    tokenizer: ChatTokenizer,
    settings: RewardConfig,
) -> tuple[RewardScale, int]:
    """Mean and deviation of the scores of the policy's own answers to training prompts, and how many.

    They are taken over what the policy says at first, since that is what PPO will score at first.
    """
    room = model.shape.context - settings.max_new_tokens
    prompts = [row.prompt for row in rows if len(row.prompt) <= room]
    prompts = [prompts[row] for row in spread(len(prompts), settings.scale_answers)]
    if len(prompts) < 2:
        raise ValueError(
            f"{len(prompts)} prompts leave room for an answer of max_new_tokens="
            f"{settings.max_new_tokens} in a context of {model.shape.context}; lower max_new_tokens"
        )
    found = generate_batches(
        policy,
        prompts,
        batch_rows=EVALUATED_ROWS,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        seed=settings.seed,
        eos=tokenizer.im_end,
        pad=tokenizer.pad,
    )
    answers = [prompt + found.answer(row, keep_stop=True) for row, prompt in enumerate(prompts)]
    device = model.embedding.weight.device
    scores: list[float] = []
    for start in range(0, len(answers), EVALUATED_ROWS):
        part = answers[start : start + EVALUATED_ROWS]
        lengths = torch.tensor([len(answer) for answer in part], device=device)
        ids = right_pad(part, tokenizer.pad).to(device)
        scores += last_token_scores(model, ids, lengths).tolist()
    deviation = float(np.std(scores, ddof=1))
    # Equal scores everywhere leave nothing to normalise by.
    return RewardScale(mean=float(np.mean(scores)), std=deviation or 1.0), len(scores)


if __name__ == "__main__":
    main()
