"""The data stages in a memory group against the same without a limit: `python -m benchmarks.bounded_memory`.

`--data DIR [--megabytes 3000] [--limit-mb 1024]`; needs to be root on Linux, where a memory group can be made.
The text is grown as for the row `landing`. Prints every stage's seconds and largest anonymous memory (what
the kernel cannot take back); ends with an error if a digest differs.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.landing import documents_of, lines_of, write_files
from benchmarks.work import WORKERS, Work, corpus_of
from flows.execution import Execution
from flows.preparation import Request, prepare
from flows.runs import Home

GROUP = "bessemer-bounded-memory"
BASE_MEGABYTES = 48.0
SAMPLE_SECONDS = 0.05
RECIPE = """
stages:
  extract: {{sources: [{{path: "pages/*.parquet", domain: web}}]}}
  filter: {{from: {{corpus: extract}}}}
  dedup: {{from: {{corpus: filter}}}}
  decontaminate: {{from: {{corpus: dedup}}, exams: [{{path: "{data}/eval/ceval/val/*.csv"}}]}}
  tokenizer: {{from: {{corpus: decontaminate}}, vocabulary: 32000, sample_bytes: 8000000}}
  tokenize: {{from: {{corpus: decontaminate, tokenizer: tokenizer}}, difficulty: [length, trigram]}}
"""


class Group:
    """A memory group of the kernel, of either version, that this process and its children are in."""

    def __init__(self, limit_mb: int) -> None:
        """Join it; 0 is no limit."""
        root = Path("/sys/fs/cgroup")
        is_first = (root / "memory").is_dir()
        self._folder = (root / "memory" if is_first else root) / GROUP
        self._folder.mkdir(exist_ok=True)
        self._name = "total_rss" if is_first else "anon"
        limit = "memory.limit_in_bytes" if is_first else "memory.max"
        unlimited = "-1" if is_first else "max"
        (self._folder / limit).write_text(str(limit_mb << 20) if limit_mb else unlimited)
        (self._folder / "cgroup.procs").write_text(str(os.getpid()))
        self.peak = 0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            lines = (self._folder / "memory.stat").read_text("utf-8").splitlines()
            now = next(int(line.split()[1]) for line in lines if line.split()[0] == self._name)
            self.peak = max(self.peak, now)
            time.sleep(SAMPLE_SECONDS)


def main() -> None:
    """Make the text, run both sides, compare."""
    parser = argparse.ArgumentParser(prog="bounded_memory", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of data")
    parser.add_argument("--megabytes", type=float, default=3000.0)
    parser.add_argument("--limit-mb", type=int, default=1024)
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        _run(arguments.inside, arguments.limit_mb)
        return
    with tempfile.TemporaryDirectory(prefix="bessemer-memory-") as folder:
        root = Path(folder)
        _make(root, arguments.data.absolute(), arguments.megabytes)
        sides = [_side(root, limit) for limit in (arguments.limit_mb, 0)]
    _report(sides, f"{arguments.megabytes:.0f} MB of text, {arguments.limit_mb} MiB")


def _make(root: Path, data: Path, megabytes: float) -> None:
    corpus, size = corpus_of(root / "base", data, BASE_MEGABYTES)
    work = Work(root, data, corpus, size)
    lines = {language: lines_of(work, language) for language in ("zh", "en")}
    (root / "pages").mkdir()
    write_files(root / "pages", "page", documents_of(lines, random.Random(0)), megabytes)
    (root / "recipe.yaml").write_text(RECIPE.format(data=data), "utf-8")


def _side(root: Path, limit_mb: int) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "benchmarks.bounded_memory", "--data", str(root)]
    command += ["--inside", str(root), "--limit-mb", str(limit_mb)]
    rows: list[dict[str, Any]] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        for line in process.stdout:
            print(line, end="", flush=True)
            rows.append(json.loads(line))
    if process.returncode:
        raise SystemExit(
            f"limit {limit_mb} MiB: ended with {process.returncode} after {len(rows)} stages"
        )
    return rows


def _run(root: Path, limit_mb: int) -> None:
    """The graph's stages one after another, without Prefect, one JSON line each."""
    group = Group(limit_mb)
    os.environ["BESSEMER_WORKERS"] = str(WORKERS)
    home = Home(root / f"home-{limit_mb}")
    execution: Execution = prepare(Request(str(root / "recipe.yaml")), home, base=root)
    execution.start()
    while (name := execution.next_ready(execution.selected)) is not None:
        group.peak, started = 0, time.perf_counter()
        execution.run(name)
        stage = execution.record.stages[name]
        if stage.error:
            raise RuntimeError(f"{name} failed: {stage.error}")
        row = {"stage": name, "digest": stage.digest, "peak_mib": group.peak >> 20}
        print(json.dumps({**row, "seconds": time.perf_counter() - started}), flush=True)


def _report(sides: list[list[dict[str, Any]]], title: str) -> None:
    table = Table(title=title)
    for name in ("stage", "same bytes", "MiB", "seconds", "MiB without limit", "seconds"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    for bounded, free in zip(*sides, strict=True):
        is_same = bounded["digest"] == free["digest"]
        figures = [f"{x:.0f}" for row in (bounded, free) for x in (row["peak_mib"], row["seconds"])]
        table.add_row(bounded["stage"], "yes" if is_same else "NO", *figures)
    Console(width=100).print(table)
    if any(x["digest"] != y["digest"] for x, y in zip(*sides, strict=True)):
        raise SystemExit("a stage gave other bytes under the limit")


if __name__ == "__main__":
    main()
