"""The few figures that say how a run went: those that its stages name as headlines, from their artifacts."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, cast

from flows.runs import RunRecord, StageRecord
from storage.scores import Figure, Scores
from tasks import stage as registry

DONE = ("hit", "built")
FIGURE_KEYS = {"value", "n", "low", "high"}


@dataclass(frozen=True)
class Headline:
    """One figure as people read it."""

    node: str
    label: str
    figure: Figure


def headlines(run: RunRecord, paths: Mapping[str, Path]) -> list[Headline]:
    """Headline figures of every node that is done; `paths` are folders of its artifacts.

    A node that only judges comes right after the last one that it judges.
    """
    found: list[Headline] = []
    for node in _reading_order(run):
        stage = run.stages[node]
        if stage.status in DONE and node in paths:
            found += _of_node(stage, paths[node])
    return found


def _of_node(stage: StageRecord, path: Path) -> Iterator[Headline]:
    spec = registry.stages().get(stage.stage)
    if spec is None or not spec.headlines:
        return
    figures = dict(figures_in(stage.metrics))
    if stage.kind == Scores.kind:
        figures |= Scores(path).figures()
    for pattern, label in spec.headlines.items():
        for name, figure in figures.items():
            if fnmatchcase(name, pattern) and figure.n:
                yield Headline(stage.node, _filled(label, pattern, name), figure)


def _filled(label: str, pattern: str, name: str) -> str:
    """The label with its `*` replaced by what the pattern's stood for."""
    before, star, after = pattern.partition("*")
    if not star:
        return label
    last = after.rpartition("*")[2]
    return label.replace("*", name.removeprefix(before).removesuffix(last))


def figures_in(value: Any, place: str = "") -> Iterator[tuple[str, Figure]]:
    """Metrics that are figures with n and interval; a nested one by its path."""
    if not isinstance(value, dict):
        return
    content = cast("dict[str, Any]", value)
    if content.keys() >= FIGURE_KEYS:
        yield place, Figure.model_validate(content)
        return
    for name, item in content.items():
        yield from figures_in(item, f"{place}/{name}" if place else name)


def _reading_order(run: RunRecord) -> list[str]:
    places = {node: place for place, node in enumerate(run.stages)}

    def key(node: str) -> tuple[int, int]:
        stage = run.stages[node]
        judged = [places[name] for name in stage.reads if name in places]
        is_judge = stage.kind == Scores.kind and judged
        return (max(judged) if is_judge else places[node], places[node])

    return sorted(run.stages, key=key)
