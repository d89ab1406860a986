"""Proximal policy optimisation and its relatives: a policy learns what to say from what its answers earn.

Up to four models: the policy, its frozen reference, the value model that starts as the reward model, and the
reward model. Worker: `python -m model.ppo JOBFILE`.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from conf.contract import JobFile
from conf.ppo import PpoConfig
from model.batches import Batch, micro_batch_rows
from model.best import Best
from model.dialogues import BucketedOrder, Renderer
from model.engine import Engine, Loss, build_engine
from model.held_answers import HeldAnswers
from model.journal import Journal
from model.lessons import Lesson, policy_step_loss, value_step_loss
from model.loop import Diverged, Stopped, accumulate, takes_optimizer
from model.lora import add_lora, merge_lora
from model.opinions import reward_opinions, truth_opinion
from model.ranks import Ranks
from model.rollouts import (
    Answering,
    Models,
    Prompt,
    advantages_of,
    kl_of,
)
from model.tuning import rate_at, update_rule
from model.weights import Checkpoints, Write, load_model, save_model
from model.worker import identity_of_job, run
from storage.checkpoint import TOKENIZER, RewardScale
from storage.conversations import read_conversations
from storage.tokenizer import ChatTokenizer

RATIO_TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2}
"""How far the ratio of the first minibatch may be from 1: rounding, no more."""
KL_ERROR_LIMIT = 0.2
BAD_UPDATES = 5


def main() -> None:
    """Entry of the worker."""
    run(work)


def work(job: JobFile, ranks: Ranks, journal: Journal) -> dict[str, Any]:
    """Let the job's policy learn from what its answers earn; the figures of the result."""
    settings = PpoConfig.model_validate(job.settings)
    source = Path(job.inputs["policy"])
    tokenizer = ChatTokenizer(source / TOKENIZER)
    models = load_models(job, settings, ranks.device)
    prompts, counts = prompts_of(job, "train", tokenizer, models, settings)
    held, _ = prompts_of(job, "held", tokenizer, models, settings)
    trainer = Trainer(models, prompts, tokenizer, settings, job, ranks, journal)
    answers = HeldAnswers(trainer.answering, held, truth_opinion(job, settings))
    checkpoints = Checkpoints(job.state / "checkpoints", identity_of_job(job, settings), ranks)
    trainer.begin(checkpoints, answers)
    trainer.train(checkpoints, answers)
    kept = trainer.restore_best()
    after = answers.figures(settings.held_prompts)
    trained = trainer.models_now().policy
    merge_lora(trained)
    if ranks.is_first:
        save_model(job.files, trained, role="policy", tokenizer=source / TOKENIZER)
    state = trainer.state
    return {
        "iterations": state.iteration,
        "kept_iteration": kept,
        "answers": state.iteration * settings.rollout_rows,
        "prompts": counts,
        "held_before": state.before,
        "held_after": after,
        "kl_coef": state.kl_coef,
        "skipped_updates": state.skipped,
        "seconds": state.seconds,
        **state.figures,
    }


def load_models(job: JobFile, settings: PpoConfig, device: torch.device) -> Models:
    """The models of the job; the value model starts as the reward model, else as a policy that values
    everything 0."""
    source = Path(job.inputs["policy"])
    judge = Path(job.inputs["reward"]) if "reward" in job.inputs else None
    policy = load_model(source, device=device)
    reference = None
    if settings.lora.rank:
        add_lora(policy, settings.lora, settings.seed)
    else:
        reference = load_model(source, device=device).requires_grad_(False)
    value = None
    if settings.method == "ppo":
        value = load_model(judge or source, device=device, is_scalar=True)
        if judge is None:
            with torch.no_grad():
                cast("torch.nn.Linear", value.score_head).weight.zero_()
    return Models(
        policy=policy,
        reference=reference,
        value=value,
        reward=judge and load_model(judge, device=device).requires_grad_(False),
        scale=RewardScale.read(judge) if judge else RewardScale(mean=0.0, std=1.0),
    )


def prompts_of(
    job: JobFile, split: Any, tokenizer: ChatTokenizer, models: Models, settings: PpoConfig
) -> tuple[list[Prompt], dict[str, int]]:
    """Prompts of one side up to the header of the last answer, and how they fitted.

    Raises ValueError when no prompt can be answered within the context.
    """
    contexts = [m.shape.context for m in (models.policy, models.reward) if m is not None]
    context = min(contexts)
    renderer = Renderer(tokenizer, context)
    room = context - settings.max_new_tokens
    rows = list(read_conversations(Path(job.inputs["conversations"]), split))
    fitted = [(renderer.prompt(row["messages"][:-1], room), row) for row in rows]
    prompts = [Prompt(ids, row) for ids, row in fitted if ids is not None]
    if split == "train" and not prompts:
        raise ValueError(
            f"none of {len(rows)} prompts leaves room for max_new_tokens={settings.max_new_tokens} in "
            f"a context of {context}; lower max_new_tokens, or look at the conversations"
        )
    return prompts, renderer.counts.take()


@dataclass
class TrainerState:
    """Where the training is; with the engines, all that a resume needs."""

    iteration: int
    kl_coef: float
    skipped: int = 0
    """Updates that were left out, since loss or gradients were not finite."""
    bad_in_row: int = 0
    seconds: float = 0.0
    figures: dict[str, float] = field(default_factory=dict[str, float])
    before: dict[str, Any] = field(default_factory=dict[str, Any])
    """Figures of answers to held-out prompts before anything was learnt."""
    scales: dict[str, tuple[float, float]] = field(default_factory=dict[str, tuple[float, float]])
    """Mean and deviation of each source of the reward beside the reward model."""
    best_truth: float | None = None
    looks_in_vain: int = 0
    """Looks at the truth since the best one."""


class Trainer:
    """Iterations of answering and learning, from any one of them to the end."""

    def __init__(
        self,
        models: Models,
        prompts: Sequence[Prompt],
        tokenizer: ChatTokenizer,
        settings: PpoConfig,
        job: JobFile,
        ranks: Ranks,
        journal: Journal,
    ) -> None:
        opinions = reward_opinions(job, settings)
        assert models.reward or opinions, "the stage refuses a job without a reward"
        self.models, self.prompts = models, prompts
        self.settings, self.launch, self.ranks, self.journal = settings, job.launch, ranks, journal
        rule = update_rule(settings)
        self.policy = build_engine(models.policy, job.launch, ranks, rule)
        self.value = models.value and build_engine(models.value, job.launch, ranks, rule)
        self.answering = Answering(
            self.models_now, tokenizer, settings, ranks, job.launch.micro_batch, opinions
        )
        groups = settings.rollout_rows // settings.samples_per_prompt
        self.order = BucketedOrder([len(p.ids) for p in prompts], groups, settings.seed)
        self.best = Best(job.state / "best.safetensors", ranks)
        self.state = TrainerState(0, settings.kl_coef)

    def begin(self, checkpoints: Checkpoints, answers: HeldAnswers) -> None:
        """Go on from the newest checkpoint; without one, see how the policy answers before it learns."""
        saved = checkpoints.newest()
        if saved is not None:
            has_optimizer = takes_optimizer(self.launch, self.ranks, saved.step)
            self.policy.load(saved.path / "policy", has_optimizer=has_optimizer)
            if self.value is not None:
                self.value.load(saved.path / "value", has_optimizer=has_optimizer)
            self.journal.cut(saved.state["metrics_bytes"])
            self.state = TrainerState(**saved.state["trainer"])
            self.answering.scales = self.state.scales
            return
        self.journal.cut(0)
        self.answering.measure(self._asked(0), noise_seed(self.settings.seed, 0))
        self.state.scales = self.answering.scales
        self.state.before = answers.figures(self.settings.held_prompts)
        if self.settings.truth_every_iterations:
            self.journal.write(0, self._look(answers))

    def models_now(self) -> Models:
        """The models, whole, with what policy and value model have learnt."""
        value = None if self.value is None else self.value.whole()
        return replace(self.models, policy=self.policy.whole(), value=value)

    def restore_best(self) -> int:
        """Give the policy the weights with the best truth, where it was looked at; their iteration."""
        if not self.settings.truth_every_iterations:
            return self.state.iteration
        best = self.policy.whole()
        kept = self.best.restore(best)
        self.models_now = lambda: replace(self.models, policy=best)
        self.answering.models = self.models_now
        return kept

    def train(self, checkpoints: Checkpoints, answers: HeldAnswers) -> None:
        """Iterate to the end. Raises Stopped after SIGTERM, with a checkpoint saved, and Diverged."""
        saved_at = time.monotonic()
        settings, state = self.settings, self.state
        while not self._is_over():
            started = time.perf_counter()
            figures = self.iterate(state.iteration)
            state.iteration += 1
            seconds = time.perf_counter() - started
            state.seconds += seconds
            state.figures = figures
            answered = figures["answer_tokens"] * settings.rollout_rows
            line = {**figures, "tokens_per_second": answered / seconds, "skipped": state.skipped}
            every = settings.truth_every_iterations
            if every and (state.iteration % every == 0 or state.iteration == settings.iterations):
                line |= self._look(answers)
            self.journal.write(state.iteration, line)
            is_over = self._is_over()
            self.journal.progress(
                state.iteration, settings.iterations, line, unit="iterations", is_due=is_over
            )
            is_late = time.monotonic() - saved_at >= self.launch.checkpoint_seconds
            every = settings.checkpoint_every_iterations
            is_asked, is_due = self.ranks.add(
                [self.ranks.is_stopping, is_late and self.ranks.is_first and not is_over]
            )
            if is_asked or is_due or (every and state.iteration % every == 0):
                self._save(checkpoints)
                saved_at = time.monotonic()
            if is_asked and not is_over:
                raise Stopped(
                    f"stopped after iteration {state.iteration} of {settings.iterations}, which was "
                    f"saved; run again"
                )

    def _is_over(self) -> bool:
        patience = self.settings.truth_patience
        is_vain = 0 < patience <= self.state.looks_in_vain
        return self.state.iteration >= self.settings.iterations or is_vain

    def _look(self, answers: HeldAnswers) -> dict[str, float]:
        """The truth beside the reward; the weights are kept if it was never better."""
        found, state = answers.look(), self.state
        truth = found["held_truth"]
        self.best.offer(self.policy.whole(), state.iteration, truth)
        if state.best_truth is None or truth > state.best_truth:
            state.best_truth, state.looks_in_vain = truth, 0
        else:
            state.looks_in_vain += 1
        return found

    def _asked(self, iteration: int) -> list[Prompt]:
        """The prompts of an iteration, each as often as it is answered."""
        rows = self.order.rows_at(iteration)
        return [self.prompts[row] for row in rows for _ in range(self.settings.samples_per_prompt)]

    def iterate(self, iteration: int) -> dict[str, float]:
        """Answer one batch of prompts and learn from it; what came of it."""
        settings, state = self.settings, self.state
        asked = self._asked(iteration)
        rollout, means = self.answering.at(asked, noise_seed(settings.seed, iteration))
        advantages, returns = advantages_of(rollout, settings, state.kl_coef)
        learnt = self._learn(iteration, Lesson(rollout, advantages, returns, state.kl_coef))
        kl = float(kl_of(rollout).mean())
        figures = {
            "reward": float(rollout.scores.mean()),
            "reward_std": float(rollout.scores.std()) if len(asked) > 1 else 0.0,
            **means,
            "kl": kl,
            "kl_coef": state.kl_coef,
            "entropy": -float(rollout.logprobs.sum() / rollout.mask.sum()),
            "answer_tokens": float(rollout.mask.sum(1).mean()),
            "ended_share": float(rollout.ended.mean()),
            **learnt,
        }
        state.kl_coef = adapted_kl_coef(settings, state.kl_coef, kl, len(asked))
        return figures

    def _learn(self, iteration: int, lesson: Lesson) -> dict[str, float]:
        """All updates of an iteration; the means of their figures."""
        settings = self.settings
        sums: dict[str, float] = {}
        made = 0
        for number, members in self._minibatches(iteration):
            own = micro_batch_rows(
                members, self.ranks.rank, self.ranks.world, self.launch.micro_batch
            )
            batches = [lesson.batch(part.tolist()) for part in own]
            found = self._update(batches, lesson.kl_coef, number)
            if found is None:
                break
            if not made:
                assert_first_ratio(found["ratio_gap"], settings)
            for name, value in found.items():
                sums[name] = sums.get(name, 0.0) + value
            made += 1
        means = {name: value / made for name, value in sums.items() if name != "ratio_gap"}
        return {**means, "updates": made} if settings.stop_kl else means

    def _minibatches(self, iteration: int) -> Iterator[tuple[int, np.ndarray]]:
        """The number of each update of an iteration, and its rows."""
        settings = self.settings
        per_epoch = settings.rollout_rows // settings.minibatch_rows
        number = iteration * settings.epochs * per_epoch
        for epoch in range(settings.epochs):
            key = np.random.SeedSequence((settings.seed, 2, iteration, epoch))
            shuffled = np.random.Generator(np.random.Philox(key)).permutation(settings.rollout_rows)
            for members in np.split(shuffled, per_epoch):
                yield number, members
                number += 1

    def _update(
        self, batches: Sequence[Batch], kl_coef: float, number: int
    ) -> dict[str, float] | None:
        """Learn from a minibatch; None when the policy is already too far from the one that answered."""
        settings = self.settings
        per_epoch = settings.rollout_rows // settings.minibatch_rows
        updates = settings.iterations * settings.epochs * per_epoch
        skipped = self.state.skipped
        rate = rate_at(settings, number, updates, settings.learning_rate)
        loss = policy_step_loss(settings, kl_coef)
        figures, norm = self._step(self.policy, loss, batches, rate, settings.stop_kl or math.inf)
        if figures["policy_kl"] > (settings.stop_kl or math.inf):
            return None
        found = {**figures, "gradient_norm": norm, "lr": rate}
        if self.value is not None:
            rate = rate_at(settings, number, updates, settings.value_learning_rate)
            loss = value_step_loss(settings, self.models.scale)
            value, value_norm = self._step(self.value, loss, batches, rate)
            found |= {f"value_{name}": figure for name, figure in value.items()}
            found["value_gradient_norm"] = value_norm
        if self.state.skipped == skipped:
            self.state.bad_in_row = 0
        return found

    def _step(
        self,
        engine: Engine,
        loss: Loss,
        batches: Sequence[Batch],
        rate: float,
        stop_kl: float = math.inf,
    ) -> tuple[dict[str, float], float]:
        """Figures and gradient norm of an update, which is left out where it cannot or should not be."""
        figures, _ = accumulate(engine, loss, batches)
        if figures.get("policy_kl", 0.0) > stop_kl:
            engine.discard()
            return figures, 0.0
        is_finite = all(math.isfinite(value) for value in figures.values())
        norm = engine.step(rate) if is_finite else math.nan
        if is_finite and math.isfinite(norm):
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
        engines = {"policy": self.policy} | ({"value": self.value} if self.value else {})

        def snapshot(is_lasting: bool) -> Write:
            writes = {name: e.snapshot(is_lasting=is_lasting) for name, e in engines.items()}

            def write(folder: Path) -> None:
                for name, write_one in writes.items():
                    write_one(folder / name)

            return write

        state = {"trainer": asdict(self.state), "metrics_bytes": self.journal.offset}
        kept = self.launch.checkpoints_kept
        checkpoints.save(self.state.iteration, state, snapshot, kept=kept)


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


if __name__ == "__main__":
    main()
