"""What SFT, reward and DPO share: epochs to steps, settings to an update rule and a course."""

import math
from collections.abc import Callable, Sequence, Sized
from typing import Any, Literal, Protocol

import numpy as np
import torch

from conf.launch import LaunchConfig
from model.batches import Batch, micro_batch_rows
from model.dialogues import BucketedOrder, EasyFirst
from model.loop import LoopPlan, LoopState, resume_figures
from model.optimizer import UpdateRule, learning_rate
from model.ranks import Ranks


class Updates(Protocol):
    """Settings of every stage that updates weights."""

    @property
    def learning_rate(self) -> float: ...
    @property
    def schedule(self) -> Literal["constant", "linear", "cosine"]: ...
    @property
    def warmup(self) -> float: ...
    @property
    def floor(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def clip(self) -> float: ...
    @property
    def precision(self) -> Literal["fp32", "bf16"]: ...


class Epochs(Updates, Protocol):
    """Settings of a stage that goes over its rows a number of times."""

    @property
    def epochs(self) -> float: ...
    @property
    def max_steps(self) -> int: ...
    @property
    def batch_rows(self) -> int: ...
    @property
    def seed(self) -> int: ...
    @property
    def evaluate_every_steps(self) -> int: ...
    @property
    def checkpoint_every_steps(self) -> int: ...


def update_rule(settings: Updates) -> UpdateRule:
    """The settings' update rule."""
    return UpdateRule(
        weight_decay=settings.weight_decay, clip_norm=settings.clip, precision=settings.precision
    )


def rate_at(settings: Updates, update: int, updates: int, peak: float) -> float:
    """Learning rate of an update number, from 0, of so many."""
    return learning_rate(
        update,
        schedule=settings.schedule,
        peak=peak,
        steps=updates,
        warmup_steps=round(settings.warmup * updates),
        floor=settings.floor,
    )


def steps_of(settings: Epochs, rows: int) -> int:
    """Updates of the whole training. Raises ValueError without rows."""
    if not rows:
        raise ValueError(
            "no row is left to train on: the input has none, or none fits the context; look at the "
            "input's counts, or give the model a longer context"
        )
    steps = math.ceil(settings.epochs * rows / settings.batch_rows)
    return min(steps, settings.max_steps) if settings.max_steps else steps


def loop_plan(settings: Epochs, steps: int, launch: LaunchConfig) -> LoopPlan:
    """The settings' course over so many steps; looked at before the first step and at the end."""
    return LoopPlan(
        steps=steps,
        learning_rate=lambda step: rate_at(settings, step, steps, settings.learning_rate),
        checkpoint_steps=settings.checkpoint_every_steps,
        launch=launch,
        evaluate_steps=settings.evaluate_every_steps or steps,
    )


def order_of(settings: Epochs, lengths: Sequence[int], ranks: Ranks) -> BucketedOrder:
    """Which rows each step sees. Raises ValueError when ranks would get unequal shares."""
    if settings.batch_rows % ranks.world:
        raise ValueError(
            f"batch_rows={settings.batch_rows} cannot be split evenly over {ranks.world} processes; "
            f"use a multiple, or other launch.processes"
        )
    return BucketedOrder(lengths, settings.batch_rows, settings.seed)


def batches_of(
    order: BucketedOrder | EasyFirst,
    make: Callable[[list[int]], Batch],
    launch: LaunchConfig,
    ranks: Ranks,
) -> Callable[[int], list[Batch]]:
    """Step -> this rank's micro-batches, each made from the numbers of its rows."""

    def batches(step: int) -> list[Batch]:
        rows = np.array(order.rows_at(step))
        parts = micro_batch_rows(rows, ranks.rank, ranks.world, launch.micro_batch)
        return [make(part.tolist()) for part in parts]

    return batches


def refuse_blind_gate(on_gate: str, held: Sized) -> None:
    """Raises ValueError for a gate without held-out pairs, which would let anything through, or keep what has
    learnt nothing."""
    if on_gate != "off" and not len(held):
        raise ValueError(
            f"on_gate={on_gate} looks at held-out pairs, and there is none that fits the context; hold some "
            "out (pairs.held_share), or set on_gate=off"
        )


def training_figures(settings: Epochs, steps: int, rows: int, state: LoopState) -> dict[str, Any]:
    """What every result says of the training itself."""
    return {
        "steps": steps,
        "epochs": steps * settings.batch_rows / rows,
        "loss": state.figures["loss"],
        "tokens": state.tokens,
        "skipped_steps": state.skipped,
        "seconds": state.seconds,
        "tokens_per_second": state.tokens / state.seconds,
        **resume_figures(state),
    }


def spread(count: int, wanted: int) -> list[int]:
    """Numbers of `wanted` rows spread evenly over `count`; all of them for 0."""
    if not wanted or wanted >= count:
        return list(range(count))
    return np.linspace(0, count - 1, wanted).round().astype(int).tolist()


def computing_in(precision: Literal["fp32", "bf16"], device: torch.device) -> torch.autocast:
    """The context in which a model that is not trained computes, as an engine would."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")
