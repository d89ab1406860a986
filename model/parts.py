"""Work in parts that the ranks share: each is written whole when it is done, and skipped when it is there.

A job that was ended goes on behind the parts that are done, on any number of ranks.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.contract import JobFile
from model.journal import Journal
from model.loop import Stopped
from model.ranks import Ranks
from model.scoring import Report

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Part:
    """A stretch of the work, and the file of the attempt's state that its rows are written to."""

    file: str
    size: int
    make: Callable[[Report], Rows]


def run_parts(every: Sequence[Part], job: JobFile, ranks: Ranks, journal: Journal) -> None:
    """Do those of the parts that are this rank's and not yet done.

    Raises Stopped between two parts when the job is asked to stop.
    """
    parts = every[ranks.rank :: ranks.world]
    done, total = 0, sum(part.size for part in parts)
    for part in parts:
        if ranks.is_stopping:
            raise Stopped(f"stopped before {part.file}; the parts before it are kept")
        before = done

        def report(now: int, of: int, size: int = part.size, before: int = before) -> None:
            journal.progress(before + size * now // max(of, 1), total, {}, unit="rows")

        _once(job.state / part.file, part.make, report)
        done += part.size


def _once(path: Path, make: Callable[[Report], Rows], report: Report) -> None:
    """The rows of a part, made and written whole unless the file is there."""
    if not path.exists():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in make(report))
        draft = path.with_suffix(".draft")
        draft.write_text(text, "utf-8")
        draft.replace(path)
