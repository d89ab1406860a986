"""Reads metrics that a training job writes, while it does."""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BATCH = 1000
"""Most lines at a time, and most metrics that MLflow takes in one call."""


@dataclass
class MetricsTail:
    """The new lines of a metrics.jsonl that may move, and may be cut back when a job resumes."""

    path: Path | None = None
    offset: int = 0
    last: bytes = b""
    """The last line that was read; when it no longer stands before `offset`, the file was cut."""

    def batches(self) -> Iterator[list[dict[str, Any]]]:
        """Lines not read before, at most `BATCH` at a time; asked again, it goes on behind the
        batches whose successor was asked for."""
        while self.path is not None and self.path.exists():
            lines = self._lines()
            if not lines:
                return
            yield [row for line in lines if (row := _row(line)) is not None]
            self.offset += sum(map(len, lines))
            self.last = lines[-1]

    def _lines(self) -> list[bytes]:
        assert self.path is not None
        with self.path.open("rb") as stream:
            stream.seek(max(0, self.offset - len(self.last)))
            if stream.read(len(self.last)) != self.last:
                self.offset, self.last = 0, b""
            stream.seek(self.offset)
            # A line without its end is still being written.
            lines = [line for line in stream.readlines(BATCH * 200) if line.endswith(b"\n")]
        return lines[:BATCH]


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        sys.stderr.write(f"not a line of metrics, left out: {line[:200]!r}\n")
        return None
    return row if isinstance(row, dict) else None
