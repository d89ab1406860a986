"""The reward model: one number for a whole answer, learnt from which of two answers is better.

Worker: `python -m model.reward JOBFILE`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from conf.contract import JobFile
from conf.reward import RewardConfig
from model.batches import Batch
from model.best import Best
from model.dialogues import Pair, Renderer
from model.engine import Loss, build_engine
from model.generate import generate
from model.journal import Journal
from model.loop import GateClosed, train
from model.packing import Packing, Sequenced, common_length, pack
from model.ranks import Ranks
from model.reward_figures import accuracy_figures, calibration, length_correlation
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
from model.weights import Checkpoints, load_model, save_model
from model.worker import identity_of_job, run
from storage.checkpoint import TOKENIZER, RewardScale
from storage.preferences import read_preferences
from storage.scores import share
from storage.tokenizer import ChatTokenizer

Compared = Literal["last_token", "from_divergence"]

EVALUATED_ROWS = 32
"""Held-out pairs in one forward pass, and answers for the scale."""


def main() -> None:
    """Entry of the worker."""
    run(work)


def work(job: JobFile, ranks: Ranks, journal: Journal) -> dict[str, Any]:
    """Train the job's reward model; the figures of the result."""
    settings = RewardConfig.model_validate(job.settings)
    source = Path(job.inputs["policy"])
    model = load_model(source, is_scalar=True, seed=settings.seed)
    if settings.start == "random":
        model.initialise(settings.seed)
    tokenizer = ChatTokenizer(source / TOKENIZER)
    renderer = Renderer.within(tokenizer, settings.context, model.shape.context)
    folder = Path(job.inputs["preferences"])
    rows = renderer.pairs(read_preferences(folder, "train"))
    fitted = renderer.counts.take()
    held = renderer.pairs(read_preferences(folder, "held"))
    rows = shuffled_labels(rows, settings.seed) if settings.shuffle_labels else rows
    steps = steps_of(settings, len(rows))
    # Whatever they lack is told before hours of training, not behind.
    refuse_blind_gate(settings.on_gate, held)
    asked = scale_prompts(rows, model.shape.context, settings)
    batch_at = batches_of(
        order_of(settings, [row.length for row in rows], ranks),
        lambda numbers: reward_batch([rows[row] for row in numbers], settings.loss),
        job.launch,
        ranks,
    )
    best = Best(job.state / "best.safetensors", ranks)

    engine = build_engine(model, job.launch, ranks, update_rule(settings))

    def evaluate(step: int) -> dict[str, float]:
        now = engine.whole()
        figures = held_accuracy(held_scores(now, held, settings, ranks))
        if settings.on_gate == "keep_best":
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
    kept_step = best.restore(model) if settings.on_gate == "keep_best" else steps
    scores = held_scores(model, held, settings, ranks)
    accuracy = final_accuracy(scores, held, settings)
    policy = load_model(source, device=ranks.device)
    scale = score_scale(policy, model, asked, tokenizer, settings)
    if ranks.is_first:
        save_model(job.files, model, role="reward", tokenizer=source / TOKENIZER)
        scale.write(job.files)
    return {
        **training_figures(settings, steps, len(rows), state),
        "kept_step": kept_step,
        "train": fitted,
        "accuracy": accuracy,
        "calibration": calibration(scores),
        "length_correlation": length_correlation(scores, held),
        "scale": {"mean": scale.mean, "std": scale.std, "n": len(asked)},
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


def reward_batch(rows: Sequence[Pair], loss: Compared = "last_token") -> Batch:
    """A micro-batch of pairs, packed, all chosen before all rejected.

    `compared` (B, N) says how many scores of each pair meet; those are the wanted places of both sides.
    """
    spans = [compared_tokens(row, loss) for row in rows]
    sides = [
        Sequenced(
            row.prompt + answer,
            [len(row.prompt) + min(token, len(answer) - 1) for token in span],
        )
        for answers in ((row.chosen for row in rows), (row.rejected for row in rows))
        for row, answer, span in zip(rows, answers, spans, strict=True)
    ]
    packed = pack(sides, is_paired=True)
    counts = torch.tensor([len(span) for span in spans])
    return Batch(
        tensors={
            **packed,
            "compared": torch.arange(int(counts.max())) < counts[:, None],
            "margins": torch.tensor([row.margin for row in rows], dtype=torch.float32),
        },
        weights={"pairs": float(len(rows))},
        tokens=packed["ids"].numel(),
        samples=[row.name for row in rows],
    )


def compared_tokens(row: Pair, loss: Compared) -> range:
    """Numbers of the answers' tokens whose scores are compared; the shorter answer ends on the way."""
    longest = max(len(row.chosen), len(row.rejected))
    if loss == "last_token":
        return range(longest - 1, longest)
    return range(min(common_length(row.chosen, row.rejected), longest - 1), longest)


def step_loss(settings: RewardConfig) -> Loss:
    """Mean loss of the step's pairs, their scores at the end, and how many are in the right order."""

    def loss(model: Transformer, batch: Batch, totals: Mapping[str, float]) -> dict[str, Tensor]:
        compared, pairs = batch["compared"], totals["pairs"]
        counts = compared.sum(1)
        chosen, rejected = wanted_scores(model, batch.tensors).chunk(2)  # (tokens compared,)
        margins = settings.margin_weight * batch["margins"].repeat_interleave(counts)
        each = reward_loss(chosen, rejected, margins, centring=settings.centring)
        by_pair = torch.zeros(compared.shape, device=each.device).masked_scatter(compared, each)
        ends = counts.cumsum(0) - 1
        chosen, rejected = chosen[ends], rejected[ends]  # (B,)
        return {
            "loss": (by_pair.sum(1) / counts).sum() / pairs,
            "accuracy": (chosen > rejected).sum() / pairs,
            "margin": (chosen - rejected).sum() / pairs,
            "chosen_reward": chosen.sum() / pairs,
            "rejected_reward": rejected.sum() / pairs,
        }

    return loss


def wanted_scores(model: Transformer, tensors: Mapping[str, Tensor]) -> Tensor:
    """(W,) float32: the score of each wanted place of a packing."""
    states = model.hidden(tensors["ids"], packing=Packing.of(tensors))[0]
    return model.score(states)


def last_token_scores(model: Transformer, rows: Sequence[Sequence[int]]) -> Tensor:
    """(B,) float32: the score of each row of tokens, read at its last one."""
    packed = pack([Sequenced(row, [len(row) - 1]) for row in rows])
    device = model.embedding.weight.device
    return wanted_scores(model, {name: x.to(device) for name, x in packed.items()})


def reward_loss(chosen: Tensor, rejected: Tensor, margin: Tensor, *, centring: float) -> Tensor:
    """(B,) loss of each comparison from the scores of both answers, (B,) each.

    -log sigmoid(chosen - rejected - margin), and `centring` times (chosen + rejected) squared, which
    keeps the scores near zero without changing their order.
    Source: Touvron et al. 2023 (Llama 2), equation 2; Eisenstein et al. 2023, section 2 (centring). Its
    mean over the tokens from where two answers part: DeepSpeed-Chat (Yao et al. 2023), which goes on into
    the padding of the shorter one.
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
    model: Transformer, held: Sequence[Pair], settings: RewardConfig, ranks: Ranks
) -> list[tuple[float, float]]:
    """Scores of the chosen and the rejected answer of every pair, in order."""
    own = sorted(range(len(held)), key=lambda row: held[row].length)[ranks.rank :: ranks.world]
    found: dict[int, tuple[float, float]] = {}
    for start in range(0, len(own), EVALUATED_ROWS):
        part = own[start : start + EVALUATED_ROWS]
        batch = reward_batch([held[row] for row in part]).to(ranks.device)
        with computing_in(settings.precision, ranks.device):
            scores = wanted_scores(model, batch.tensors).tolist()
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
        "held_chosen_reward": sum(chosen for chosen, _ in scores) / len(gaps),
        "held_rejected_reward": sum(rejected for _, rejected in scores) / len(gaps),
    }


def final_accuracy(
    scores: Sequence[tuple[float, float]], held: Sequence[Pair], settings: RewardConfig
) -> dict[str, dict[str, Any]]:
    """The accuracies of the result. Raises GateClosed when on_gate=fail asks for more."""
    accuracy = accuracy_figures(scores, held)
    if settings.shuffle_labels:
        accuracy["held_shuffled"] = shuffled_accuracy(scores, settings.seed)
    found = accuracy["held"]["value"]
    if settings.on_gate == "fail" and found < settings.gate_accuracy:
        raise GateClosed(
            f"accuracy on {len(held)} held-out pairs is {found:.3f}, on_gate=fail asks for "
            f"{settings.gate_accuracy}; look at the pairs, train longer, or lower gate_accuracy"
        )
    return accuracy


def scale_prompts(rows: Sequence[Pair], context: int, settings: RewardConfig) -> list[list[int]]:
    """Training prompts that are answered for the scale of the scores.

    Raises ValueError where fewer than two leave room for an answer.
    """
    room = context - settings.max_new_tokens
    prompts = [row.prompt for row in rows if len(row.prompt) <= room]
    if len(prompts) < 2:
        raise ValueError(
            f"{len(prompts)} prompts leave room for an answer of max_new_tokens="
            f"{settings.max_new_tokens} in a context of {context}; lower max_new_tokens"
        )
    return [prompts[row] for row in spread(len(prompts), settings.scale_answers)]


@torch.no_grad()
def score_scale(
    policy: Transformer,
    model: Transformer,
    prompts: Sequence[list[int]],
    tokenizer: ChatTokenizer,
    settings: RewardConfig,
) -> RewardScale:
    """Mean and deviation of the scores of the policy's own answers to the prompts.

    They are taken over what the policy says at first, since that is what PPO will score at first.
    """
    found = generate(
        policy,
        prompts,
        at_once=EVALUATED_ROWS,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        seed=settings.seed,
        eos=tokenizer.im_end,
        pad=tokenizer.pad,
    )
    answers = [prompt + found.answer(row, keep_stop=True) for row, prompt in enumerate(prompts)]
    scores: list[float] = []
    for start in range(0, len(answers), EVALUATED_ROWS):
        scores += last_token_scores(model, answers[start : start + EVALUATED_ROWS]).tolist()
    deviation = float(np.std(scores, ddof=1))
    # Equal scores everywhere leave nothing to normalise by.
    return RewardScale(mean=float(np.mean(scores)), std=deviation or 1.0)


if __name__ == "__main__":
    main()
