"""What the report shows of alignment: its curves, rewards beside the truth, and the effect on the model."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from flows import charts
from flows.page_parts import Section, stage_tables
from flows.runs import RunRecord
from storage.scores import Figure

CURVES = {
    "reward": (("accuracy", "share of pairs"), ("margin", "reward")),
    "dpo": (("accuracy", "share of pairs"), ("chosen_reward", "nats"), ("rejected_reward", "nats")),
    "ppo": (
        ("kl", "nats"),
        ("clip_fraction", ""),
        ("value_clip_fraction", ""),
        ("ended_share", ""),
        ("answer_tokens", ""),
    ),
}
"""Metrics of a stage that are drawn beside those of every training, and their units."""
REWARDS = {"reward": "kl", "held_reward": "held_kl", "held_truth": "held_kl"}
"""Metrics of rewards and of the divergence of the same answers."""
AGAINST_KL = {
    "world/reward": ("world/kl", "true reward"),
    "world/reward_model": ("world/kl", "reward model"),
    "held/reward_model": ("held/kl", "reward model, held-out questions"),
}
"""Figures of an evaluation, the divergence of the same answers, and what the chart of both is called."""
STAGE, ANSWERS = "effect", "answers before and after"
WINS = "answers that are better"
Rows = Sequence[Mapping[str, Any]]


def rewards(curves: Mapping[str, Rows]) -> Iterator[str]:
    """Charts of what answers earn, the truth beside it where it was looked at, over steps and over KL."""
    over_steps = dict.fromkeys(REWARDS, "step")
    for title, against, across in (
        ("reward", over_steps, "step"),
        ("reward against KL", REWARDS, "KL, nats"),
    ):
        series = {
            " ".join((node if len(curves) > 1 else "", name.replace("_", " "))).strip(): points
            for node, rows in curves.items()
            for name, other in against.items()
            if (points := _points(rows, other, name))[0]
        }
        if series:
            yield charts.lines(series, title=title, across=across, up="")


def _points(rows: Rows, across: str, up: str) -> tuple[list[float], list[float]]:
    known = [row for row in rows if across in row and up in row]
    return [row[across] for row in known], [row[up] for row in known]


def before_and_after(run: RunRecord, scores: Mapping[str, Mapping[str, Figure]]) -> Section:
    """What stages of `effect` found: one chart for each kind of figure."""
    section = Section(
        "change",
        "Before and after",
        "Each model against an earlier one, on the same questions and documents. The mark across is no difference: "
        "half of the answers better, a change of 0. More bits per byte is forgetting.",
    )
    kinds: dict[str, list[charts.Interval]] = {}
    for node, figures in scores.items():
        if (stage := run.stages[node]).stage != STAGE:
            continue
        for name, figure in figures.items():
            if place := _place(name):
                kind, row = place
                interval = (row, figure.value, figure.low, figure.high, figure.chance or 0.0)
                kinds.setdefault(kind, []).append(interval)
        section.tables += [
            replace(table, is_samples=True, is_detail=True)
            for table in stage_tables(stage)
            if table.title.endswith(ANSWERS)
        ]
    for kind, rows in sorted(kinds.items(), key=lambda item: item[0] != WINS):
        across = "share" if kind == WINS else "afterwards - before"
        section.charts.append(charts.intervals(rows, title=kind, across=across))
    section.charts += _against_kl(scores)
    return section


def _against_kl(scores: Mapping[str, Mapping[str, Figure]]) -> Iterator[str]:
    """Each checkpoint as a point: what its answers earn, and how far they are from the reference's."""
    for name, (kl, title) in AGAINST_KL.items():
        points = {
            node: ([figures[kl].value], [figures[name].value])
            for node, figures in scores.items()
            if kl in figures and name in figures
        }
        if len(points) > 1:
            yield charts.lines(points, title=f"{title} against KL", across="KL, nats", up="")


def without_changes(
    run: RunRecord, scores: Mapping[str, Mapping[str, Figure]]
) -> dict[str, Mapping[str, Figure]]:
    """The scores that are no changes of others."""
    return {name: figures for name, figures in scores.items() if run.stages[name].stage != STAGE}


def _place(name: str) -> tuple[str, str] | None:
    """The chart that a figure of the stage stands in, and its row there; none for a single domain."""
    what, *parts, who = name.split("/")
    if parts[0] == "bits_per_byte" and parts[1:] != ["all"]:
        return None
    told = " ".join(parts).replace("_", " ").removesuffix(" all")
    return (WINS, f"{who}, {told}") if what == "wins" else (told, who)
