"""How far a stage has come, as its task's page shows it: share, figures of a training, time left."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conf.contract import METRICS
from flows.forecast import human_time

TAIL_BYTES = 1 << 16
"""Of the metrics that are read; a line has some hundred bytes, and a hundred more for each domain."""
FIGURES = {
    "loss": "{:.3f} loss",
    "reward": "{:.3f} reward",
    "tokens_per_second": "{:,.0f} tokens/s",
}


class Progress:
    """Words for each report of done and total; the first report is taken for the begin."""

    def __init__(self, node: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._node, self._clock = node, clock
        self._first: tuple[float, float] | None = None

    def words(self, done: float, total: float, unit: str, logs: Path | None = None) -> str:
        """`pretrain: 300 of 1,200 steps, 2.310 loss, 9,870 tokens/s, 42 s left`.

        `logs` is where a training notes its metrics.
        """
        told = [f"{self._node}: {done:,.0f} of {total:,.0f} {unit}"]
        row = last_row(logs / METRICS) if logs else {}
        told += [form.format(row[name]) for name, form in FIGURES.items() if name in row]
        if (left := self._seconds_left(done, total)) is not None:
            told.append(f"{human_time(left)} left")
        return ", ".join(told)

    def _seconds_left(self, done: float, total: float) -> float | None:
        """At the pace since the first report; that may have come after a resume, far from zero."""
        now = self._clock()
        begun, first = self._first = self._first or (now, done)
        if done <= first or total <= 0:
            return None
        return (now - begun) * max(0.0, total - done) / (done - first)


def last_row(path: Path) -> dict[str, Any]:
    """The newest whole line of a metrics.jsonl; empty where there is none, or a longer one than is read."""
    try:
        with path.open("rb") as stream:
            start = max(0, stream.seek(0, os.SEEK_END) - TAIL_BYTES)
            stream.seek(start)
            lines = stream.read().split(b"\n")[:-1]
    except FileNotFoundError:
        return {}
    whole = lines[1:] if start else lines
    return json.loads(whole[-1]) if whole else {}
