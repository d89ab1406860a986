"""Proximal policy optimisation: a policy learns from a reward model what to say.

Four models: the policy, its frozen reference, the value model that starts as the reward model, and the
reward model. Worker: `python -m model.ppo JOBFILE`.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from conf.contract import JobFile
from conf.ppo import PpoConfig
from model.advantages import policy_loss, value_loss, whiten
from model.batches import Batch, micro_batch_rows
from model.dialogues import BucketedOrder, Renderer
from model.engine import Engine, Loss, build_engine
from model.journal import Journal
from model.loop import Diverged, Stopped, accumulate
from model.ranks import Ranks
from model.rollouts import (
    Models,
    Rollout,
    advantages_of,
    answer_logprobs,
    answer_values,
    kl_of,
    roll_out,
)
from model.transformer import Transformer
from model.tuning import rate_at, spread, update_rule
from model.weights import Checkpoints, load_model, save_model
from model.worker import identity_of_job, run
from storage.checkpoint import TOKENIZER, RewardScale
from storage.conversations import read_conversations
from storage.scores import mean
from storage.tokenizer import ChatTokenizer

RATIO_TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2}
"""How far the ratio of the first minibatch may be from 1: rounding, no more."""
KL_ERROR_LIMIT = 0.2
HELD_SEED = 1 << 20
"""Keeps the noise of held-out answers apart from that of any iteration."""
BAD_UPDATES = 5


def main() -> None:
    """Entry of the worker."""
    run(work)


def work(job: JobFile, ranks: Ranks, journal: Journal) -> dict[str, Any]:
    """Train the job's policy with its reward model; the figures of the result."""
    settings = PpoConfig.model_validate(job.settings)
    source, judge = Path(job.inputs["policy"]), Path(job.inputs["reward"])
    tokenizer = ChatTokenizer(source / TOKENIZER)
    models = Models(
        policy=load_model(source, device=ranks.device),
        reference=load_model(source, device=ranks.device).requires_grad_(False),
        value=load_model(judge, device=ranks.device),
        reward=load_model(judge, device=ranks.device).requires_grad_(False),
        scale=RewardScale.read(judge),
    )
    prompts, counts = prompts_of(job, "train", tokenizer, models, settings)
    held, _ = prompts_of(job, "held", tokenizer, models, settings)
    kept = spread(len(held), settings.held_prompts) if settings.held_prompts else []
    held = [held[row] for row in kept]
    trainer = Trainer(models, prompts, tokenizer, settings, job, ranks, journal)
    checkpoints = Checkpoints(job.state / "checkpoints", identity_of_job(job, settings), ranks)
    before = held_figures(trainer.models_now(), held, tokenizer, settings, ranks)
    trainer.resume(checkpoints)
    trainer.train(checkpoints)
    trained = trainer.models_now()
    after = held_figures(trained, held, tokenizer, settings, ranks)
    if ranks.is_first:
        save_model(job.files, trained.policy, role="policy", tokenizer=source / TOKENIZER)
    return {
        "iterations": settings.iterations,
        "answers": settings.iterations * settings.rollout_rows,
        "prompts": counts,
        "held_before": before,
        "held_after": after,
        "kl_coef": trainer.state.kl_coef,
        "skipped_updates": trainer.state.skipped,
        "seconds": trainer.state.seconds,
        **trainer.state.figures,
    }


def prompts_of(
    job: JobFile, split: Any, tokenizer: ChatTokenizer, models: Models, settings: PpoConfig
) -> tuple[list[list[int]], dict[str, int]]:
    """Prompts of one side up to the header of the last answer, and how they fitted.

    Raises ValueError when no prompt can be answered within the context.
    """
    context = min(models.policy.shape.context, models.reward.shape.context)
    room = context - settings.max_new_tokens
    renderer = Renderer(tokenizer, context)
    rows = read_conversations(Path(job.inputs["conversations"]), split)
    found = [renderer.prompt(row["messages"][:-1], room) for row in rows]
    prompts = [prompt for prompt in found if prompt is not None]
    if split == "train" and not prompts:
        raise ValueError(
            f"none of {len(found)} prompts leaves room for max_new_tokens={settings.max_new_tokens} in "
            f"a context of {context}; lower max_new_tokens, or look at the conversations"
        )
    return prompts, renderer.counts.take()


def held_figures(
    models: Models,
    prompts: Sequence[Sequence[int]],
    tokenizer: ChatTokenizer,
    settings: PpoConfig,
    ranks: Ranks,
) -> dict[str, Any]:
    """Reward, divergence and endings of answers to held-out prompts, with n and interval."""
    if not prompts:
        return {}
    rollout = roll_out(
        models,
        prompts,
        tokenizer,
        settings,
        seed=HELD_SEED + settings.seed,
        ranks=ranks,
        micro_batch=32,
    )
    return {
        "reward": mean(rollout.scores.tolist()).model_dump(),
        "kl": mean(kl_of(rollout).tolist()).model_dump(),
        "ended_share": mean(rollout.ended.tolist()).model_dump(),
        "answer_tokens": mean(rollout.mask.sum(1).tolist()).model_dump(),
    }


@dataclass
class TrainerState:
    """Where PPO is; with both engines, all that a resume needs."""

    iteration: int
    kl_coef: float
    skipped: int
    """Updates that were left out, since loss or gradients were not finite."""
    bad_in_row: int
    seconds: float
    figures: dict[str, float]


class Trainer:
    """Iterations of answering and learning, from any one of them to the end."""

    def __init__(
        self,
        models: Models,
        prompts: Sequence[Sequence[int]],
        tokenizer: ChatTokenizer,
        settings: PpoConfig,
        job: JobFile,
        ranks: Ranks,
        journal: Journal,
    ) -> None:
        self.models, self.prompts, self.tokenizer = models, prompts, tokenizer
        self.settings, self.launch, self.ranks, self.journal = settings, job.launch, ranks, journal
        rule = update_rule(settings)
        self.policy = build_engine(models.policy, job.launch, ranks, rule)
        self.value = build_engine(models.value, job.launch, ranks, rule)
        self.order = BucketedOrder([len(p) for p in prompts], settings.rollout_rows, settings.seed)
        self.state = TrainerState(0, settings.kl_coef, 0, 0, 0.0, {})

    def resume(self, checkpoints: Checkpoints) -> None:
        """Go on from the newest checkpoint, if there is one."""
        saved = checkpoints.newest()
        if saved is None:
            self.journal.cut(0)
            return
        self.policy.load(saved.path / "policy")
        self.value.load(saved.path / "value")
        self.journal.cut(saved.state["metrics_bytes"])
        self.state = TrainerState(**saved.state["trainer"])

    def models_now(self) -> Models:
        """The four models, whole, with what policy and value model have learnt."""
        return replace(self.models, policy=self.policy.whole(), value=self.value.whole())

    def train(self, checkpoints: Checkpoints) -> None:
        """Iterate to the end. Raises Stopped after SIGTERM, with a checkpoint saved, and Diverged."""
        saved_at = time.monotonic()
        settings, state = self.settings, self.state
        while state.iteration < settings.iterations:
            started = time.perf_counter()
            figures = self.iterate(state.iteration)
            state.iteration += 1
            seconds = time.perf_counter() - started
            state.seconds += seconds
            state.figures = figures
            answered = figures["answer_tokens"] * settings.rollout_rows
            line = {**figures, "tokens_per_second": answered / seconds, "skipped": state.skipped}
            self.journal.write(state.iteration, line)
            is_last = state.iteration == settings.iterations
            self.journal.progress(
                state.iteration, settings.iterations, line, unit="iterations", is_due=is_last
            )
            is_late = time.monotonic() - saved_at >= self.launch.checkpoint_seconds
            every = settings.checkpoint_every_iterations
            is_asked, is_due = self.ranks.add(
                [self.ranks.is_stopping, is_late and self.ranks.is_first and not is_last]
            )
            if is_asked or is_due or (every and state.iteration % every == 0):
                self._save(checkpoints)
                saved_at = time.monotonic()
            if is_asked and not is_last:
                raise Stopped(
                    f"stopped after iteration {state.iteration} of {settings.iterations}, which was "
                    f"saved; run again"
                )

    def iterate(self, iteration: int) -> dict[str, float]:
        """Answer one batch of prompts and learn from it; what came of it."""
        settings, state = self.settings, self.state
        rows = self.order.rows_at(iteration)
        rollout = roll_out(
            self.models_now(),
            [self.prompts[row] for row in rows],
            self.tokenizer,
            settings,
            seed=noise_seed(settings.seed, iteration),
            ranks=self.ranks,
            micro_batch=self.launch.micro_batch,
        )
        advantages, returns = advantages_of(rollout, settings, state.kl_coef)
        advantages = whiten(advantages, rollout.mask)
        learnt = self._learn(iteration, rollout, advantages, returns)
        kl = float(kl_of(rollout).mean())
        figures = {
            "reward": float(rollout.scores.mean()),
            "reward_std": float(rollout.scores.std()) if len(rows) > 1 else 0.0,
            "kl": kl,
            "kl_coef": state.kl_coef,
            "answer_tokens": float(rollout.mask.sum(1).mean()),
            "ended_share": float(rollout.ended.mean()),
            **learnt,
        }
        state.kl_coef = adapted_kl_coef(settings, state.kl_coef, kl, len(rows))
        return figures

    def _learn(
        self, iteration: int, rollout: Rollout, advantages: Tensor, returns: Tensor
    ) -> dict[str, float]:
        """All updates of an iteration; the means of their figures."""
        settings = self.settings
        per_epoch = settings.rollout_rows // settings.minibatch_rows
        updates = settings.iterations * settings.epochs * per_epoch
        done = iteration * settings.epochs * per_epoch
        sums: dict[str, float] = {}
        for epoch in range(settings.epochs):
            generator = np.random.Generator(
                np.random.Philox(np.random.SeedSequence((settings.seed, 2, iteration, epoch)))
            )
            shuffled = generator.permutation(len(rollout.scores))
            for members in np.split(shuffled, per_epoch):
                own = micro_batch_rows(
                    members, self.ranks.rank, self.ranks.world, self.launch.micro_batch
                )
                batches = [_minibatch(rollout, advantages, returns, part) for part in own]
                rates = [
                    rate_at(settings, done, updates, peak)
                    for peak in (settings.learning_rate, settings.value_learning_rate)
                ]
                found = self._update(batches, rates[0], rates[1])
                if done == iteration * settings.epochs * per_epoch:
                    assert_first_ratio(found["ratio_gap"], settings)
                for name, value in {**found, "lr": rates[0]}.items():
                    sums[name] = sums.get(name, 0.0) + value / (settings.epochs * per_epoch)
                done += 1
        sums.pop("ratio_gap")
        return sums

    def _update(
        self, batches: Sequence[Batch], policy_rate: float, value_rate: float
    ) -> dict[str, float]:
        policy, policy_norm = self._step(
            self.policy, policy_step_loss(self.settings), batches, policy_rate
        )
        value, value_norm = self._step(
            self.value, value_step_loss(self.settings, self.models.scale), batches, value_rate
        )
        return {
            **policy,
            "gradient_norm": policy_norm,
            "value_loss": value["loss"],
            "value_gradient_norm": value_norm,
        }

    def _step(
        self, engine: Engine, loss: Loss, batches: Sequence[Batch], rate: float
    ) -> tuple[dict[str, float], float]:
        figures, _ = accumulate(engine, loss, batches)
        is_finite = all(math.isfinite(value) for value in figures.values())
        norm = engine.step(rate) if is_finite else math.nan
        if is_finite and math.isfinite(norm):
            self.state.bad_in_row = 0
            return figures, norm
        engine.discard()
        self.state.skipped += 1
        self.state.bad_in_row += 1
        if self.state.bad_in_row >= BAD_UPDATES:
            raise Diverged(
                f"iteration {self.state.iteration + 1}: loss {figures['loss']}, gradient norm {norm}, "
                f"the last of {BAD_UPDATES} such updates in a row; lower learning_rate"
            )
        return dict.fromkeys(figures, 0.0), 0.0

    def _save(self, checkpoints: Checkpoints) -> None:
        def write(folder: Path) -> None:
            self.policy.save(folder / "policy")
            self.value.save(folder / "value")

        state = {"trainer": asdict(self.state), "metrics_bytes": self.journal.offset}
        checkpoints.save(self.state.iteration, state, write)


def noise_seed(seed: int, iteration: int) -> int:
    """Seed of the sampling noise of an iteration: 0 to 2^63 - 1, different for every pair."""
    entropy = np.random.SeedSequence((seed, 3, iteration)).generate_state(1, np.uint64)
    return int(entropy[0] >> np.uint64(1))


def adapted_kl_coef(settings: PpoConfig, kl_coef: float, kl: float, answers: int) -> float:
    """The coefficient after so many answers with a mean divergence `kl`, moved towards kl_target.

    Source: Ziegler et al. 2019, section 2.2.
    """
    if not settings.kl_target:
        return kl_coef
    error = min(max(kl / settings.kl_target - 1, -KL_ERROR_LIMIT), KL_ERROR_LIMIT)
    return kl_coef * (1 + error * answers / settings.kl_horizon)


def assert_first_ratio(gap: float, settings: PpoConfig) -> None:
    """Before any update the policy is the one that answered: else old log-probabilities are wrong."""
    limit = RATIO_TOLERANCE[settings.precision]
    assert gap <= limit, f"ratio of the first minibatch is off 1 by {gap:.2e}, more than {limit}"


def policy_step_loss(settings: PpoConfig) -> Loss:
    """Clipped policy loss per answer token of the step; how much was clipped, how far the policy went."""

    def loss(model: Transformer, batch: Batch, totals: Mapping[str, float]) -> dict[str, Tensor]:
        rollout = _rollout_of(batch)
        logprobs = answer_logprobs(model, rollout, settings.temperature)
        each, is_clipped = policy_loss(
            logprobs, rollout.logprobs, batch["advantages"], clip=settings.ratio_clip
        )
        mask, tokens = rollout.mask, totals["tokens"]
        gap = ((logprobs - rollout.logprobs).exp() - 1).abs() * mask
        return {
            "loss": (each * mask).sum() / tokens,
            "clip_fraction": (is_clipped * mask).sum() / tokens,
            # Mean over the tokens, which a few wrong log-probabilities would move as well.
            "ratio_gap": gap.sum() / tokens,
            "policy_kl": ((rollout.logprobs - logprobs) * mask).sum() / tokens,
        }

    return loss


def value_step_loss(settings: PpoConfig, scale: RewardScale) -> Loss:
    """Clipped value loss per answer token of the step."""

    def loss(model: Transformer, batch: Batch, totals: Mapping[str, float]) -> dict[str, Tensor]:
        rollout = _rollout_of(batch)
        values = answer_values(model, rollout, scale)
        each = value_loss(values, rollout.values, batch["returns"], clip=settings.value_clip)
        return {"loss": (each * rollout.mask).sum() / totals["tokens"]}

    return loss


def _minibatch(rollout: Rollout, advantages: Tensor, returns: Tensor, rows: Any) -> Batch:
    part = rollout.rows(rows.tolist())
    tokens = int(part.mask.sum())
    tensors = {name: getattr(part, name) for name in Rollout.__dataclass_fields__}
    extra = {"advantages": advantages[rows], "returns": returns[rows]}
    return Batch({**tensors, **extra}, {"tokens": float(tokens)}, tokens)


def _rollout_of(batch: Batch) -> Rollout:
    return Rollout(**{name: batch[name] for name in Rollout.__dataclass_fields__})


if __name__ == "__main__":
    main()
