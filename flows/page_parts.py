"""What a page of ours is made of: sections with charts and tables, as HTML that needs nothing from outside."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from flows import charts
from flows.runs import StageRecord

LONG_TABLE_ROWS = 14
MAX_POINTS = 400


@dataclass
class Table:
    """A table of the page; a number is set right-aligned."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    is_samples: bool = False
    is_detail: bool = False

    @property
    def is_folded(self) -> bool:
        """Whether it is shown only when asked for."""
        return self.is_detail or (bool(self.title) and len(self.rows) > LONG_TABLE_ROWS)


@dataclass
class Detail:
    """Text that is shown when asked for."""

    title: str
    text: str
    is_open: bool
    """Whether it is shown at once."""


@dataclass
class Section:
    """A part of the page."""

    id: str
    title: str
    text: str = ""
    wide: list[str] = field(default_factory=list[str])
    charts: list[str] = field(default_factory=list[str])
    tables: list[Table] = field(default_factory=list[Table])
    details: list[Detail] = field(default_factory=list[Detail])
    links: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    """What is said, and the address relative to the page."""

    def __bool__(self) -> bool:
        return bool(self.wide or self.charts or self.tables or self.details or self.links)


def write_page(target: Path, title: str, subtitle: str, sections: Sequence[Section]) -> Path:
    """Write the whole page; empty sections are left out."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "page"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    environment.filters["figure"] = number
    text = environment.get_template("report.html").render(
        title=title, subtitle=subtitle, sections=[section for section in sections if section]
    )
    target.write_text(text, "utf-8", "replace")  # JSON can have halves of characters, UTF-8 cannot
    return target


class Exact(float):
    """A figure with three digits after the point, also where they are noughts."""


def number(value: float) -> str:
    """A figure for people."""
    if isinstance(value, Exact):
        return f"{value:,.3f}"
    if isinstance(value, int) or float(value).is_integer():
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}" if abs(value) >= 1e-3 else f"{value:.2e}"


def blank(value: Any) -> Any:
    """A value as a cell: numbers and text as they are, nothing for None, what is nested in words."""
    match value:
        case None:
            return ""
        case bool():
            return "yes" if value else "no"
        case int() | float() | str():
            return value
        case dict():
            pairs = cast("dict[str, Any]", value).items()
            return ", ".join(f"{name} {_inner(item)}" for name, item in pairs)
        case list():
            return ", ".join(_inner(item) for item in cast("list[Any]", value))
        case _:
            return str(value)


def _inner(value: Any) -> str:
    cell = blank(value)
    if isinstance(value, dict | list):
        return f"({cell})"
    return number(cell) if isinstance(cell, int | float) else str(cell)


def flat(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of nested mappings as a cell, with its place."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from flat(item, f"{place} {name}".strip())
    else:
        yield place, blank(value)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics file; none where there is no such file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text("utf-8").splitlines() if line]


def series_of(metric: str, curves: Mapping[str, list[dict[str, Any]]]) -> charts.Series:
    """One curve a node, or a node and domain for metrics such as `held_loss/web`."""
    series: dict[str, tuple[list[float], list[float]]] = {}
    for node, rows in curves.items():
        keys = dict.fromkeys(key for row in rows for key in row)
        names = [key for key in keys if key == metric or key.startswith(f"{metric}/")]
        if len(names) == 2 and metric in names:
            names = [metric]  # the one part is the whole
        for name in names:
            part = name.removeprefix(metric).removeprefix("/")
            label = " ".join(filter(None, (node if len(curves) > 1 else "", part))) or node
            points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
            series[label] = _thinned(points)
    return series


def _thinned(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    step = -(-len(points) // MAX_POINTS) or 1
    chosen = [*points[: len(points) - 1 : step], *points[-1:]]
    return [x for x, _ in chosen], [y for _, y in chosen]


def shown_answer(row: Mapping[str, Any]) -> str:
    """An answer for people; bytes that are no character as `‹?›`, except where the answer was cut off in one."""
    answer = str(row["answer"])
    if not row["is_ended"]:
        answer = answer.rstrip("\ufffd") + " …"
    return answer.replace("\ufffd", "‹?›")


def stage_tables(stage: StageRecord) -> Iterator[Table]:
    """The small tables that a stage wrote for people."""
    if stage.path is None or not (path := Path(stage.path) / "logs" / "tables.json").exists():
        return
    for title, rows in json.loads(path.read_text("utf-8")).items():
        if rows:
            columns = list(dict.fromkeys(key for row in rows for key in row))
            yield Table(
                f"{stage.node}: {title.replace('_', ' ')}",
                [column.replace("_", " ") for column in columns],
                [[blank(row.get(column)) for column in columns] for row in rows],
            )
