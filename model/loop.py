"""The one training loop: pretrain, SFT, reward and DPO differ in their batches and their loss."""

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean, pstdev
from typing import Any

from conf.contract import ExitCode
from conf.launch import LaunchConfig
from model.batches import Batch
from model.engine import Engine, Loss
from model.journal import Journal
from model.ranks import Ranks, same_bits
from model.speed import peak_memory
from model.weights import Checkpoints


class Ended(Exception):
    """The job ends before its time, for a reason that its exit code names."""

    code: ExitCode = ExitCode.FAILED


class Stopped(Ended):
    """Asked to stop; a checkpoint was saved."""

    code = ExitCode.REQUEUE


class GateClosed(Ended):
    """What was learnt is not what on_gate=fail asks for."""

    code = ExitCode.GATE


class Diverged(Ended):
    """Too many steps in a row had a loss or gradients that were not finite, or far out of the usual."""

    code = ExitCode.DIVERGED


USUAL_STEPS = 128
"""So many good steps say what is usual."""
USUAL_AT_LEAST = 64
"""Before so many, everything is."""
USUAL_SPREAD = 0.01
"""A standard deviation is taken to be at least this share of the mean."""


def as_it_is(sample: str) -> str:
    """The name of a sample, said as it is."""
    return sample


def never(evaluation: Mapping[str, float]) -> bool:
    """No evaluation ends a training."""
    return False


@dataclass(frozen=True)
class LoopPlan:
    """How long, how fast, and when to look or save. Nothing here but `steps` and the rate is identity."""

    steps: int
    learning_rate: Callable[[int], float]
    """Update number, from 0 -> rate."""
    checkpoint_steps: int = 0
    """Save every so many steps; 0 for by time alone."""
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    """Which says when else to save, how, and what to go on with."""
    evaluate_steps: int = 0
    """Evaluate every so many steps, before the first and after the last; 0 for never."""
    bad_steps: int = 5
    """So many bad steps in a row end the job."""
    guard_sigmas: float = 0.0
    """A loss or gradient norm so many standard deviations above the mean of the last good steps makes a
    step a bad one; 0 lets everything finite pass."""
    patience: int = 0
    """So many evaluations in a row without a better `held_loss` end the training; 0 for never."""
    least_gain: float = 0.0
    """A better `held_loss` lies more than so many nats below the best one."""
    is_over: Callable[[Mapping[str, float]], bool] = never
    """Whether the newest evaluation ends the training; not asked before the first step."""
    fresh_starts: frozenset[int] = frozenset()
    """Steps from which other data come, so that what was usual no longer is."""
    flops_per_token: float = 0.0
    peak_flops: float = 0.0
    """Of all devices together, per second; 0 leaves out `mfu`."""
    describe: Callable[[str], str] = as_it_is
    """Name of a sample -> what a person needs to find it."""


@dataclass
class LoopState:
    """Where the loop is; with weights and optimizer, all that a resume needs."""

    step: int = 0
    tokens: int = 0
    skipped: int = 0
    """Steps whose update was left out, since loss or gradients were not finite or far out of the usual."""
    bad_in_row: int = 0
    overflows: int = 0
    """Steps left out since gradients did not fit into float16 at the loss scale of then."""
    usual: dict[str, list[float]] = field(default_factory=dict[str, list[float]])
    """Loss and gradient norm of the last good steps."""
    seconds: float = 0.0
    """Spent in steps, over all attempts."""
    figures: dict[str, float] = field(default_factory=dict[str, float])
    """Of the newest step."""
    evaluation: dict[str, float] = field(default_factory=dict[str, float])
    """The newest one."""
    best_loss: float | None = None
    """Held-out loss of the last evaluation that was better than those before it."""
    looks_in_vain: int = 0
    """Evaluations since then."""
    fresh_optimizer_step: int | None = None
    """Behind which the optimizer began anew, if it was told to."""


def train(
    engine: Engine,
    *,
    batch_at: Callable[[int], Sequence[Batch]],
    loss: Loss,
    plan: LoopPlan,
    checkpoints: Checkpoints,
    journal: Journal,
    evaluate: Callable[[int], dict[str, float]] | None = None,
) -> LoopState:
    """Train to the end, or until patience ends, from the newest checkpoint if there is one.

    `batch_at(step)` gives this rank's micro-batches of update number `step`, a pure function of it.
    `evaluate(step)` is called on all ranks after `step` updates. Raises Stopped after SIGTERM, with a
    checkpoint saved, and Diverged.
    """
    state = _resume(engine, checkpoints, journal, plan.launch)
    run = _Run(engine, batch_at, loss, plan, checkpoints, journal, evaluate, state)
    journal.progress(state.step, plan.steps, state.figures, is_due=True)
    if state.step == 0:
        run.look_before()
    try:
        while state.step < plan.steps and not 0 < plan.patience <= state.looks_in_vain:
            if state.step and plan.is_over(state.evaluation):
                break
            run.advance()
    finally:
        checkpoints.settle()
    journal.progress(state.step, plan.steps, state.figures, is_due=True)
    return state


def _resume(
    engine: Engine, checkpoints: Checkpoints, journal: Journal, launch: LaunchConfig
) -> LoopState:
    saved = checkpoints.newest()
    if saved is None:
        journal.cut(0)
        return LoopState()
    has_optimizer = takes_optimizer(launch, engine.ranks, saved.step)
    engine.load(saved.path, has_optimizer=has_optimizer)
    journal.cut(saved.state["metrics_bytes"])
    state = LoopState(**saved.state["loop"])
    if not has_optimizer:
        state.fresh_optimizer_step = state.step
    return state


def takes_optimizer(launch: LaunchConfig, ranks: Ranks, step: int) -> bool:
    """Whether who goes on from a checkpoint takes the optimizer's state, too; said where it does not."""
    if launch.resume == "strict":
        return True
    if ranks.is_first:
        sys.stderr.write(
            f"launch.resume=weights: goes on behind step {step} with the weights that it had, and with an "
            f"optimizer that begins anew; the result is not that of an unbroken run\n"
        )
        sys.stderr.flush()
    return False


def resume_figures(state: LoopState) -> dict[str, int]:
    """What a result says of a training whose optimizer began anew on the way."""
    step = state.fresh_optimizer_step
    return {} if step is None else {"fresh_optimizer_step": step}


@dataclass
class _Run:
    engine: Engine
    batch_at: Callable[[int], Sequence[Batch]]
    loss: Loss
    plan: LoopPlan
    checkpoints: Checkpoints
    journal: Journal
    evaluate: Callable[[int], dict[str, float]] | None
    state: LoopState

    def __post_init__(self) -> None:
        self._saved = time.monotonic()
        self._is_looking = self.evaluate is not None and self.plan.evaluate_steps > 0

    def look_before(self) -> None:
        """Evaluate the untrained model, so that curves have a beginning."""
        if self.evaluate is not None and self._is_looking:
            self.state.evaluation = self.evaluate(0)
            self._compare()
            self.journal.write(0, self.state.evaluation)

    def advance(self) -> None:
        """One step, its figures, and a checkpoint when it is time."""
        state, plan = self.state, self.plan
        started = time.perf_counter()
        batches = self.batch_at(state.step)
        waited = time.perf_counter() - started
        if state.step in plan.fresh_starts:
            state.usual = {}
        rate = plan.learning_rate(state.step)
        figures, tokens = accumulate(self.engine, self.loss, batches)
        is_usual = all(map(math.isfinite, figures.values())) and figures["loss"] <= self._limit(
            "loss"
        )
        limit = self._limit("norm")
        norm = self.engine.step(rate, limit) if is_usual else math.nan
        self._guard(is_usual, norm, limit, figures, batches)
        seconds = time.perf_counter() - started
        state.step, state.tokens = state.step + 1, state.tokens + tokens
        state.seconds += seconds
        state.figures = figures | {
            "lr": rate,
            "gradient_norm": norm,
            "tokens_per_second": tokens / seconds,
            "tokens": state.tokens,
            "skipped": state.skipped,
            "data_wait_share": waited / seconds,
        }
        if plan.peak_flops:
            state.figures["mfu"] = plan.flops_per_token * tokens / seconds / plan.peak_flops
        if self.engine.scale is not None:
            state.figures |= {"loss_scale": self.engine.scale.value, "overflows": state.overflows}
        self._report()
        self._save_when_due()

    def _limit(self, name: str) -> float:
        """Up to where the loss or the norm of a step is usual."""
        seen = self.state.usual.get(name, [])
        if not self.plan.guard_sigmas or len(seen) < USUAL_AT_LEAST:
            return math.inf
        mean = fmean(seen)
        return mean + self.plan.guard_sigmas * max(pstdev(seen), USUAL_SPREAD * abs(mean))

    def _guard(
        self,
        is_usual: bool,
        norm: float,
        limit: float,
        figures: Mapping[str, float],
        batches: Sequence[Batch],
    ) -> None:
        state = self.state
        if is_usual and math.isfinite(norm) and norm <= limit:
            state.bad_in_row = 0
            for name, value in (("loss", figures["loss"]), ("norm", norm)):
                state.usual[name] = [*state.usual.get(name, []), value][-USUAL_STEPS:]
            return
        self.engine.discard()
        scale = self.engine.scale
        if is_usual and scale is not None and not math.isfinite(norm) and scale.value >= 1:
            state.overflows += 1
            return
        state.skipped, state.bad_in_row = state.skipped + 1, state.bad_in_row + 1
        if state.bad_in_row >= self.plan.bad_steps:
            self._give_up(norm, figures, batches)

    def _give_up(self, norm: float, figures: Mapping[str, float], batches: Sequence[Batch]) -> None:
        own = ", ".join(self.plan.describe(name) for batch in batches for name in batch.samples)
        samples = ", ".join(self.engine.ranks.gather(own))
        raise Diverged(
            f"step {self.state.step + 1}: loss {figures['loss']}, gradient norm {norm}, the last of "
            f"{self.state.bad_in_row} such steps in a row; its samples were {samples[:2000]}; "
            f"lower the learning rate, or look at these samples"
        )

    def _report(self) -> None:
        step, line = self.state.step, dict(self.state.figures)
        is_last = step == self.plan.steps
        is_due = self._is_looking and (is_last or step % self.plan.evaluate_steps == 0)
        if self.evaluate is not None and is_due:
            self.state.evaluation = self.evaluate(step)
            line |= self.state.evaluation
            self._compare()
        line["peak_memory_bytes"] = peak_memory(self.engine.ranks.device)
        self.journal.write(step, line)
        self.journal.progress(step, self.plan.steps, line)

    def _compare(self) -> None:
        """Whether the evaluation is the best so far; only asked where patience may end."""
        if not self.plan.patience:
            return
        state, loss = self.state, self.state.evaluation["held_loss"]
        if state.best_loss is None or loss < state.best_loss - self.plan.least_gain:
            state.best_loss, state.looks_in_vain = loss, 0
        else:
            state.looks_in_vain += 1

    def _save_when_due(self) -> None:
        ranks, plan, step = self.engine.ranks, self.plan, self.state.step
        is_time = time.monotonic() - self._saved >= plan.launch.checkpoint_seconds
        is_asked, is_late = ranks.add(
            [ranks.is_stopping, is_time and ranks.is_first and step < plan.steps]
        )
        is_round = plan.checkpoint_steps > 0 and step % plan.checkpoint_steps == 0
        if is_asked or is_late or is_round:
            self._save()
        if is_asked and step < plan.steps:
            raise Stopped(f"stopped after step {step} of {plan.steps}, which was saved; run again")

    def _save(self) -> None:
        state: dict[str, Any] = {
            "loop": asdict(self.state),
            "metrics_bytes": self.journal.offset,
        }
        launch, device = self.plan.launch, self.engine.ranks.device
        has_room = launch.checkpoints_beside == "auto" and device.type == "cuda"
        self.checkpoints.save(
            self.state.step,
            state,
            lambda is_lasting: self.engine.snapshot(is_lasting=is_lasting),
            kept=launch.checkpoints_kept,
            is_beside=has_room or launch.checkpoints_beside == "always",
        )
        self._saved = time.monotonic()


def accumulate(
    engine: Engine, loss: Loss, batches: Sequence[Batch]
) -> tuple[dict[str, float], int]:
    """Gradients of one step: its figures over all ranks, and its tokens.

    The totals by which the loss normalises are those of the whole step, since a mean of means is
    wrong where micro-batches hold different numbers of labels.
    """
    ranks = engine.ranks
    names = sorted(batches[0].weights)
    *totals, tokens = ranks.add(
        [*(sum(batch.weights[name] for batch in batches) for name in names),
         sum(batch.tokens for batch in batches)]
    )  # fmt: skip
    by_name = dict(zip(names, totals, strict=True))
    figures: dict[str, Any] = {}
    for number, batch in enumerate(batches):
        with same_bits():
            added = engine.backward(loss, batch, by_name, is_last=number == len(batches) - 1)
        for name, value in added.items():
            figures[name] = figures[name] + value if name in figures else value
    values = ranks.add([float(value) for value in figures.values()])
    return dict(zip(figures, values, strict=True)), int(tokens)
