"""The one training loop: pretrain, SFT, reward and DPO differ in their batches and their loss."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from conf.contract import ExitCode
from model.batches import Batch
from model.engine import Engine, Loss
from model.journal import Journal
from model.weights import Checkpoints


class Ended(Exception):
    """The job ends before its time, for a reason that its exit code names."""

    code: ExitCode = ExitCode.FAILED


class Stopped(Ended):
    """Asked to stop; a checkpoint was saved."""

    code = ExitCode.REQUEUE


class Diverged(Ended):
    """Too many steps in a row had a loss or gradients that were not finite."""

    code = ExitCode.DIVERGED


@dataclass(frozen=True)
class LoopPlan:
    """How long, how fast, and when to look or save. Nothing here but `steps` and the rate is identity."""

    steps: int
    learning_rate: Callable[[int], float]
    """Update number, from 0 -> rate."""
    checkpoint_steps: int = 0
    """Save every so many steps; 0 for by time alone."""
    checkpoint_seconds: float = 60.0
    evaluate_steps: int = 0
    """Evaluate every so many steps, before the first and after the last; 0 for never."""
    bad_steps: int = 5
    """So many bad steps in a row end the job."""


@dataclass
class LoopState:
    """Where the loop is; with weights and optimizer, all that a resume needs."""

    step: int = 0
    tokens: int = 0
    skipped: int = 0
    """Steps whose update was left out, since loss or gradients were not finite."""
    bad_in_row: int = 0
    seconds: float = 0.0
    """Spent in steps, over all attempts."""
    figures: dict[str, float] = field(default_factory=dict[str, float])
    """Of the newest step."""
    evaluation: dict[str, float] = field(default_factory=dict[str, float])
    """The newest one."""


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
    """Train to the end, from the newest checkpoint if there is one.

    `batch_at(step)` gives this rank's micro-batches of update number `step`, a pure function of it.
    `evaluate(step)` is called on all ranks after `step` updates. Raises Stopped after SIGTERM, with a
    checkpoint saved, and Diverged.
    """
    state = _resume(engine, checkpoints, journal)
    run = _Run(engine, loss, plan, checkpoints, journal, evaluate, state)
    journal.progress(state.step, plan.steps, state.figures, is_due=True)
    if state.step == 0:
        run.look_before()
    while state.step < plan.steps:
        run.advance(batch_at(state.step))
    journal.progress(state.step, plan.steps, state.figures, is_due=True)
    return state


def _resume(engine: Engine, checkpoints: Checkpoints, journal: Journal) -> LoopState:
    saved = checkpoints.newest()
    if saved is None:
        journal.cut(0)
        return LoopState()
    engine.load(saved.path)
    journal.cut(saved.state["metrics_bytes"])
    return LoopState(**saved.state["loop"])


@dataclass
class _Run:
    engine: Engine
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
            self.journal.write(0, self.evaluate(0))

    def advance(self, batches: Sequence[Batch]) -> None:
        """One step, its figures, and a checkpoint when it is time."""
        started = time.perf_counter()
        rate = self.plan.learning_rate(self.state.step)
        figures, tokens = accumulate(self.engine, self.loss, batches)
        is_finite = all(math.isfinite(value) for value in figures.values())
        norm = self.engine.step(rate) if is_finite else math.nan
        self._guard(is_finite and math.isfinite(norm), figures, norm, batches)
        seconds = time.perf_counter() - started
        state = self.state
        state.step, state.tokens = state.step + 1, state.tokens + tokens
        state.seconds += seconds
        state.figures = figures | {
            "lr": rate,
            "gradient_norm": norm,
            "tokens_per_second": tokens / seconds,
            "tokens": state.tokens,
            "skipped": state.skipped,
        }
        self._report()
        self._save_when_due()

    def _guard(
        self, is_good: bool, figures: Mapping[str, float], norm: float, batches: Sequence[Batch]
    ) -> None:
        state = self.state
        if is_good:
            state.bad_in_row = 0
            return
        self.engine.discard()
        state.skipped, state.bad_in_row = state.skipped + 1, state.bad_in_row + 1
        if state.bad_in_row >= self.plan.bad_steps:
            own = ", ".join(name for batch in batches for name in batch.samples)
            samples = ", ".join(self.engine.ranks.gather(own))
            raise Diverged(
                f"step {state.step + 1}: loss {figures['loss']}, gradient norm {norm}, the last of "
                f"{state.bad_in_row} such steps in a row; its samples were {samples[:2000]}; "
                f"lower the learning rate, or look at these samples"
            )

    def _report(self) -> None:
        step, line = self.state.step, dict(self.state.figures)
        is_last = step == self.plan.steps
        is_due = self._is_looking and (is_last or step % self.plan.evaluate_steps == 0)
        if self.evaluate is not None and is_due:
            self.state.evaluation = self.evaluate(step)
            line |= self.state.evaluation
        self.journal.write(step, line)
        self.journal.progress(step, self.plan.steps, line)

    def _save_when_due(self) -> None:
        ranks, plan, step = self.engine.ranks, self.plan, self.state.step
        is_time = time.monotonic() - self._saved >= plan.checkpoint_seconds
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
        self.checkpoints.save(self.state.step, state, self.engine.save)
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
        added = engine.backward(loss, batch, by_name, is_last=number == len(batches) - 1)
        for name, value in added.items():
            figures[name] = figures[name] + value if name in figures else value
    values = ranks.add([float(value) for value in figures.values()])
    return dict(zip(figures, values, strict=True)), int(tokens)
