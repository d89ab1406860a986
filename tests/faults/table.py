"""The table of the fault suite: what each fault cost, a JSON line for each, and a sum at the end."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

FILE = "BESSEMER_FAULT_TABLE"
"""Environment variable: a file to which the lines are added; moments of many runs add up there."""

Commits = Mapping[str, int]
"""Fingerprint -> when its record was written."""


@dataclass(frozen=True)
class Row:
    """One fault, and the plain run after it."""

    fault: str
    stage: str
    seed: int
    lost: int
    """Artifacts that were there after the fault and no longer after the next run, damaged ones left out."""
    rebuilt: int
    """Those that the next run made once more."""
    seconds: float
    """Time of the next run."""


@dataclass
class Table:
    """The rows of this run of the tests."""

    rows: list[Row] = field(default_factory=list[Row])

    def note(
        self,
        fault: str,
        *,
        stage: str = "",
        seed: int = 0,
        before: Commits,
        after: Commits,
        seconds: float,
    ) -> Row:
        """Add what a fault cost, from the commits before and after the run that healed it."""
        lost = sum(name not in after for name in before)
        rebuilt = sum(after.get(name, when) != when for name, when in before.items())
        row = Row(fault, stage, seed, lost, rebuilt, round(seconds, 1))
        self.rows.append(row)
        if path := os.environ.get(FILE):
            with Path(path).open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(asdict(row)) + "\n")
        return row

    def __str__(self) -> str:
        lines = [f"{'fault':<28}{'times':>6}{'lost':>6}{'rebuilt':>8}{'seconds to heal':>17}"]
        for fault in sorted({row.fault for row in self.rows}):
            rows = [row for row in self.rows if row.fault == fault]
            times = [row.seconds for row in rows]
            span = f"{median(times):.1f} (most {max(times):.1f})"
            lost, rebuilt = (
                sum(getattr(row, name) for row in rows) for name in ("lost", "rebuilt")
            )
            lines.append(f"{fault:<28}{len(rows):>6}{lost:>6}{rebuilt:>8}{span:>17}")
        return "\n".join(lines)
