"""Two or more runs side by side: what changed in the recipe, and what in every figure; one page, from records alone."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.contract import METRICS
from flows import charts
from flows.headlines import figures_in, headlines
from flows.page_parts import (
    Exact,
    Section,
    Table,
    flat,
    read_metrics,
    series_of,
    shown_answer,
    write_page,
)
from flows.runs import Home, RunRecord
from storage.scores import Figure, Scores

CURVES = (("loss", "nats"), ("held_loss", "nats"), ("reward", ""))
SHOWN_PROMPTS = 12
ABSENT = "-"


@dataclass(frozen=True)
class Compared:
    """A run, where its artifacts are, and what it is called on the page."""

    run: RunRecord
    paths: Mapping[str, Path]
    label: str


@dataclass(frozen=True)
class Difference:
    """One figure in every run; None where a run does not have it."""

    node: str
    name: str
    figures: Sequence[Figure | None]

    @property
    def is_apart(self) -> bool:
        """Whether two of the intervals do not meet."""
        known = [figure for figure in self.figures if figure]
        return bool(known) and max(f.low for f in known) > min(f.high for f in known)


def compared(names: Sequence[str], home: Home) -> list[Compared]:
    """The runs whose ids begin so, with their artifacts; without a name the two newest, older first.

    Raises ValueError for a name that no run or several have, and for fewer than two runs.
    """
    known = list(home.records())
    runs = [_run_named(name, known) for name in names] or known[1::-1]
    if len(runs) < 2 or len({run.run_id for run in runs}) < len(runs):
        told = ", ".join(run.run_id for run in runs) or "none"
        raise ValueError(f"runs to compare: {told}; name two or more that `bessemer runs` lists")
    found: list[Compared] = []
    for run in runs:
        store = home.store(run.composed)
        paths = {
            name: path
            for name, stage in run.stages.items()
            if stage.fingerprint and (path := store.find(stage.fingerprint)) is not None
        }
        found.append(Compared(run, paths, f"{run.recipe} {run.run_id}"))
    return found


def _run_named(name: str, known: Sequence[RunRecord]) -> RunRecord:
    found = [run for run in known if run.run_id.startswith(name)]
    if len(found) != 1:
        raise ValueError(
            f"{name}: {len(found)} runs have an id that begins so; see `bessemer runs`"
        )
    return found[0]


def write_comparison(sides: Sequence[Compared], target: Path) -> Path:
    """Write the page that compares the runs."""
    found = differences(sides)
    sections = [_headlines(sides), _recipe(sides), _stages(sides), *_curves(sides), _samples(sides)]
    sections.append(_all_figures(sides, found))
    title = " against ".join(dict.fromkeys(side.run.recipe for side in sides))
    subtitle = "; ".join(f"{side.label}, started {side.run.started}" for side in sides)
    return write_page(target, f"{title}: {len(sides)} runs compared", subtitle, sections)


def recipe_changes(sides: Sequence[Compared]) -> list[tuple[str, list[Any]]]:
    """Place in the recipe, and what every run has there, where they are not all alike."""
    settings = [dict(flat(side.run.composed)) for side in sides]
    places = dict.fromkeys(place for of in settings for place in of)
    rows = [(place, [of.get(place, ABSENT) for of in settings]) for place in places]
    return [(place, values) for place, values in rows if any(v != values[0] for v in values)]


def differences(sides: Sequence[Compared]) -> list[Difference]:
    """Every figure with an interval that two runs or more have, in the order of the first run."""
    each = [_figures(side) for side in sides]
    keys = dict.fromkeys(key for of in each for key in of)
    rows = [Difference(*key, [of.get(key) for of in each]) for key in keys]
    return [row for row in rows if sum(figure is not None for figure in row.figures) > 1]


def _figures(side: Compared) -> dict[tuple[str, str], Figure]:
    found: dict[tuple[str, str], Figure] = {}
    for node, path in side.paths.items():
        stage = side.run.stages[node]
        own = dict(figures_in(stage.metrics))
        if stage.kind == Scores.kind:
            own |= Scores(path).figures()
        found |= {(node, name): figure for name, figure in own.items() if figure.n}
    return found


def _headlines(sides: Sequence[Compared]) -> Section:
    """The figures that the stages call telling; a dot marks those whose intervals do not meet."""
    each = [
        {(item.node, item.label): item.figure for item in headlines(side.run, side.paths)}
        for side in sides
    ]
    keys = dict.fromkeys(key for of in each for key in of)
    rows = [_row(Difference(*key, [of.get(key) for of in each])) for key in keys]
    section = Section(
        "figures",
        "What changed in the figures",
        "Each with its 95 % interval; `apart` where two of them do not meet.",
    )
    section.tables = [Table("", _columns(sides), rows)] if rows else []
    return section


def _all_figures(sides: Sequence[Compared], found: Sequence[Difference]) -> Section:
    section = Section("all", "Every figure")
    for node in dict.fromkeys(item.node for item in found):
        rows = [_row(item) for item in found if item.node == node]
        section.tables.append(Table(node, _columns(sides), rows, is_detail=True))
    plain = [_plain(side) for side in sides]
    keys = dict.fromkeys(key for of in plain for key in of)
    rows = [(*key, *(of.get(key, ABSENT) for of in plain)) for key in keys]
    rows = [row for row in rows if any(value != row[2] for value in row[2:])]
    columns = ("node", "figure", *(side.label for side in sides))
    if rows:
        section.tables.append(Table("other figures that differ", columns, rows, is_detail=True))
    return section


def _plain(side: Compared) -> dict[tuple[str, str], Any]:
    """Numbers of every stage that have no interval."""
    found: dict[tuple[str, str], Any] = {}
    for node, stage in side.run.stages.items():
        known = {name.replace("/", " ") for name, _ in figures_in(stage.metrics)}
        for place, value in flat(stage.metrics):
            if place.rpartition(" ")[0] not in known and isinstance(value, int | float):
                found[node, place] = value
    return found


def _columns(sides: Sequence[Compared]) -> list[str]:
    return ["node", "figure", *(side.label for side in sides), "last - first", ""]


def _row(item: Difference) -> list[Any]:
    first, last = item.figures[0], item.figures[-1]
    change = Exact(last.value - first.value) if first and last else ABSENT
    told = [figure.text() if figure else ABSENT for figure in item.figures]
    return [item.node, item.name, *told, change, "apart" if item.is_apart else ""]


def _recipe(sides: Sequence[Compared]) -> Section:
    rows = [(place, *values) for place, values in recipe_changes(sides)]
    section = Section("recipe", "What changed in the recipe")
    if rows:
        section.tables = [Table("", ("place", *(side.label for side in sides)), rows)]
    else:
        section.tables = [Table("", ("place",), [("nothing: the recipes are the same",)])]
    return section


def _stages(sides: Sequence[Compared]) -> Section:
    """Which artifacts the runs share."""
    rows: list[Sequence[Any]] = []
    for node in dict.fromkeys(name for side in sides for name in side.run.stages):
        stages = [side.run.stages.get(node) for side in sides]
        prints = [(stage.fingerprint or ABSENT)[:12] if stage else ABSENT for stage in stages]
        seconds = [stage.seconds if stage else ABSENT for stage in stages]
        same = "the same" if len(set(prints)) == 1 else "another"
        rows.append((node, same, *prints, *seconds))
    labels = [side.label for side in sides]
    columns = ("node", "artifact", *labels, *(f"seconds, {label}" for label in labels))
    return Section(
        "stages", "What the runs share", tables=[Table("", columns, rows)] if rows else []
    )


def _curves(sides: Sequence[Compared]) -> Iterator[Section]:
    """Curves of a node that more than one run trained, in the same chart."""
    section = Section("curves", "Training")
    for node in dict.fromkeys(name for side in sides for name in side.paths):
        rows = {
            side.label: found
            for side in sides
            if node in side.paths and (found := read_metrics(side.paths[node] / "logs" / METRICS))
        }
        for metric, up in CURVES if len(rows) > 1 else ():
            if series := series_of(metric, rows):
                title = f"{node}: {metric.replace('_', ' ')}"
                section.charts.append(charts.lines(series, title=title, across="step", up=up))
    yield section


def _samples(sides: Sequence[Compared]) -> Section:
    """Answers of the same node to the same prompt."""
    section = Section("samples", "The same prompts")
    answers: dict[tuple[str, str], dict[str, str]] = {}
    for side in sides:
        for node, path in side.paths.items():
            if side.run.stages[node].kind != Scores.kind:
                continue
            for row in Scores(path).answers():
                if row.get("sample", 0) == 0:
                    answers.setdefault((node, row["prompt"]), {})[side.label] = shown_answer(row)
    shared = [(key, of) for key, of in answers.items() if len(of) > 1][:SHOWN_PROMPTS]
    rows = [[*key, *(of.get(side.label, "") for side in sides)] for key, of in shared]
    if rows:
        columns = ("node", "prompt", *(side.label for side in sides))
        section.tables = [Table("", columns, rows, is_samples=True)]
    return section
