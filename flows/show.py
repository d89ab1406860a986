"""What the command line shows: tables, and the progress of a run."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from flows.execution import Execution, Listener
from flows.headlines import headlines
from flows.runs import RunRecord, StageRecord

if TYPE_CHECKING:
    from flows.plan import Planned  # which counts sizes as people write them

COLOURS = {
    "hit": "blue",
    "built": "green",
    "failed": "red",
    "skipped": "yellow",
    "running": "cyan",
    "miss": "yellow",
}
SHORT = 12
PIPE_COLUMNS = 160


def console() -> Console:
    """Standard output; a file or a pipe is given room for whole lines."""
    screen = Console()
    return screen if screen.is_terminal else Console(width=PIPE_COLUMNS)


def error_console() -> Console:
    """Standard error, for progress and complaints; standard output stays for results."""
    return Console(stderr=True)


def table_of(title: str, columns: list[str], rows: list[list[Any]]) -> Table:
    """A plain table."""
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    return table


def stage_table(record: RunRecord) -> Table:
    """How every stage of a run ended."""
    rows = [
        [
            name,
            _coloured(stage.status),
            _duration(stage),
            (stage.fingerprint or "")[:SHORT],
            _headline(stage),
        ]
        for name, stage in record.stages.items()
    ]
    title = f"{record.recipe} {record.run_id}: {record.state} in {record.seconds:,.1f} s"
    return table_of(title, ["node", "status", "seconds", "fingerprint", "figures"], rows)


def plan_table(recipe: str, planned: "list[Planned]") -> Table:
    """What each node would do."""
    rows = [
        [
            item.node,
            _coloured(item.status),
            f"{item.seconds:,.1f}" if item.seconds is not None else "",
            item.why,
        ]
        for item in planned
    ]
    return table_of(
        f"{recipe}: {sum(item.status == 'miss' for item in planned)} of {len(planned)} to build",
        ["node", "store", "seconds last time", "why"],
        rows,
    )


def effects(record: RunRecord) -> Table | None:
    """The measured effect of the stages, in the few figures that they name themselves."""
    paths = {name: Path(stage.path) for name, stage in record.stages.items() if stage.path}
    rows: list[list[Any]] = []
    nodes: set[str] = set()
    for item in headlines(record, paths):
        figure = item.figure
        name = "" if item.node in nodes else item.node
        nodes.add(item.node)
        value = f"{figure.value:.3f}"
        interval = f"{figure.low:.3f} .. {figure.high:.3f}"
        chance = "" if figure.chance is None else f"{figure.chance:.3g}"
        rows.append([name, item.label, value, interval, f"{figure.n:,}", chance])
    if not rows:
        return None
    title = "what every stage did (all figures: the report, and `bessemer show NODE`)"
    columns = ["node", "held-out figure", "value", "95 % interval", "n", "chance"]
    return table_of(title, columns, rows)


def human_bytes(size: float) -> str:
    """A size as people write it."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:,.0f} {unit}"
        size /= 1000
    return f"{size:,.1f} TB"


class Shown:
    """Shows a run on standard error: a line for each node that ended, bars for those at work."""

    def __init__(self, execution: Execution) -> None:
        self._console = error_console()
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[told]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._bars: dict[str, TaskID] = {}
        execution.listeners.append(Listener(on_node=self._on_node, on_progress=self._on_progress))

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        """One line."""
        self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _on_node(self, name: str, stage: StageRecord) -> None:
        if stage.status == "running":
            self._bars[name] = self._progress.add_task(name, total=None, told="")
            return
        if name in self._bars:
            self._progress.remove_task(self._bars.pop(name))
        text = f"{_coloured(stage.status)} {name} {_duration(stage)} s"
        self._progress.console.print(text, highlight=False)
        if stage.status == "failed" and stage.error:
            self.say(stage.error)

    def _on_progress(self, name: str, done: float, total: float, unit: str) -> None:
        if name in self._bars:
            told = f"{done:,.0f}/{total:,.0f} {unit}"
            self._progress.update(self._bars[name], completed=done, total=total, told=told)


def _duration(stage: StageRecord) -> str:
    waited = f" (waited {stage.waited_seconds:,.0f})" if stage.waited_seconds >= 1 else ""
    return f"{stage.seconds:,.1f}{waited}"


def _coloured(status: str) -> str:
    return f"[{COLOURS.get(status, 'white')}]{status:7}[/]"


def _headline(stage: StageRecord) -> str:
    """The first few plain figures of a stage."""
    plain = {
        name: value
        for name, value in stage.metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    figures = ", ".join(f"{name} {_short(value)}" for name, value in list(plain.items())[:4])
    return stage.error.splitlines()[0] if stage.error else figures


def _short(value: float) -> str:
    if isinstance(value, int) or value.is_integer():
        return f"{value:,.0f}" if value < 1e7 else f"{value:.3g}"
    return f"{value:.4g}"
