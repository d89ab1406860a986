"""Measures every row and prints the table: `python -m benchmarks [--data DIR] [--megabytes N] [NAME ...]`.

The text is that of DIR/pretrain (laid out as the README says), without DIR that of the demo's world.
`NAME:PART` measures a part of a benchmark that has parts, such as `alignment_steps:dpo,real`.
"""

import argparse
import importlib
import tempfile
from dataclasses import replace
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

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
    names = _names(arguments.names)
    with tempfile.TemporaryDirectory(prefix="bessemer-bench-") as folder:
        corpus, megabytes = corpus_of(Path(folder), arguments.data, arguments.megabytes)
        work = Work(Path(folder), arguments.data, corpus, megabytes)
        rows: list[Row] = []
        try:
            for name in names:
                module, _, parts = name.partition(":")
                part = replace(work, parts=tuple(filter(None, parts.split(","))))
                rows += importlib.import_module(f"benchmarks.{module}").measure(part)
        finally:  # what was measured until something failed
            Console(width=WIDTH).print(_table(rows, megabytes))


def _names(asked: list[str]) -> list[str]:
    """Modules with a `measure`, found without importing them; raises SystemExit for a name that is none."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    known = [file.stem for file in files if "\ndef measure(" in file.read_text("utf-8")]
    if unknown := {name.partition(":")[0] for name in asked} - set(known):
        raise SystemExit(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    return asked or known


def _table(rows: list[Row], megabytes: float) -> Table:
    table = Table(title=f"{megabytes:.1f} MB of text", title_justify="left")
    table.box, table.padding = SIMPLE_HEAD, (0, 1, 0, 0)
    table.add_column("work", overflow="fold", min_width=32)
    table.add_column("against", overflow="fold", max_width=16)
    for name in ("ours", "theirs", "", "ratio", "goal", "floor", "met"):
        table.add_column(name, no_wrap=True, justify="left" if name in ("", "met") else "right")
    for row in rows:
        ratio = row.ours / row.theirs
        met = "goal" if ratio >= row.goal else "floor" if ratio >= row.floor else "neither"
        figures = (f"{row.ours:,.3g}", f"{row.theirs:,.3g}", row.unit, f"{ratio:,.3g}")
        table.add_row(row.work, row.peer, *figures, f"{row.goal:g}", f"{row.floor:g}", met)
    return table


if __name__ == "__main__":
    main()
