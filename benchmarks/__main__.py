"""Measures every row and prints the table: `python -m benchmarks [--data DIR] [--megabytes N] [NAME ...]`.

The text is that of DIR/pretrain (laid out as the README says), without DIR that of the demo's world.
"""

import argparse
import importlib
import pkgutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import benchmarks
from benchmarks.work import Row, Work, corpus_of

WIDTH = 100
"""Columns of the table, also where the output is no terminal."""


def main() -> None:
    """Measure what is asked for, or all."""
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", help="rows to measure; all by default")
    parser.add_argument("--data", type=Path, help="folder of data; its pretrain/ is read")
    parser.add_argument("--megabytes", type=float, default=64.0, help="text to work on, at most")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bessemer-bench-") as folder:
        corpus, megabytes = corpus_of(Path(folder), arguments.data, arguments.megabytes)
        work = Work(Path(folder), arguments.data, corpus, megabytes)
        rows: list[Row] = []
        for name in _names(arguments.names):
            rows += importlib.import_module(f"benchmarks.{name}").measure(work)
    Console(width=WIDTH).print(_table(rows, megabytes))


def _names(asked: list[str]) -> Iterator[str]:
    """Modules with a `measure`; raises SystemExit for a name that is none."""
    known = [
        module.name
        for module in pkgutil.iter_modules(benchmarks.__path__)
        if module.name not in ("__main__", "gpu", "peers", "work")
    ]
    if unknown := set(asked) - set(known):
        raise SystemExit(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    yield from asked or known


def _table(rows: list[Row], megabytes: float) -> Table:
    table = Table(title=f"{megabytes:.1f} MB of text", title_justify="left", box=SIMPLE_HEAD)
    for name in ("work", "against"):
        table.add_column(name, overflow="fold")
    for name in ("ours", "theirs", "", "ratio", "goal", "floor", "met"):
        table.add_column(name, no_wrap=True, justify="left" if name in ("", "met") else "right")
    for row in rows:
        ratio = row.ours / row.theirs
        met = "goal" if ratio >= row.goal else "floor" if ratio >= row.floor else "NOTHING"
        figures = (f"{row.ours:,.3g}", f"{row.theirs:,.3g}", row.unit, f"{ratio:,.3g}")
        table.add_row(row.work, row.peer, *figures, f"{row.goal:g}", f"{row.floor:g}", met)
    return table


if __name__ == "__main__":
    main()
