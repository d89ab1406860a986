"""What a job says of itself while it runs: metrics line by line, and where it is."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conf.contract import METRICS, PROGRESS, RESULT, SAMPLES

PROGRESS_SECONDS = 0.5
"""Least time between two writes of the progress file."""


class Journal:
    """Writes `metrics.jsonl`, `progress.json` and `result.json` in `logs`; silent on other ranks."""

    def __init__(self, logs: Path, *, is_writer: bool = True) -> None:
        self._logs, self._is_writer, self._told = logs, is_writer, 0.0
        if is_writer:
            logs.mkdir(parents=True, exist_ok=True)
            self._stream = (logs / METRICS).open("ab", buffering=0)

    @property
    def offset(self) -> int:
        """Bytes of metrics so far; goes into a checkpoint."""
        return self._stream.seek(0, 2) if self._is_writer else 0

    def cut(self, offset: int) -> None:
        """Forget the metrics behind the offset of the checkpoint from which the job goes on."""
        if self._is_writer:
            self._stream.truncate(offset)

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Add one line; what is not a finite number is left out, since JSON has no such number."""
        if self._is_writer:
            line = {"step": step, "time": round(time.time(), 3), **_finite(figures)}
            self._stream.write(json.dumps(line).encode("utf-8") + b"\n")

    def progress(
        self,
        step: int,
        total: int,
        figures: Mapping[str, float],
        *,
        unit: str = "steps",
        is_due: bool = False,
    ) -> None:
        """Replace the progress file, at most every half second unless it `is_due`."""
        now = time.monotonic()
        if not self._is_writer or (now - self._told < PROGRESS_SECONDS and not is_due):
            return
        self._told = now
        place = {"step": step, "total": total, "unit": unit, "updated": time.time()}
        _replace(self._logs / PROGRESS, {**place, **_finite(figures)})

    def samples(self, step: int, texts: Mapping[str, str]) -> None:
        """What the model wrote after each prompt; a step that is replayed after a kill is told once."""
        if not self._is_writer:
            return
        path = self._logs / SAMPLES
        # Not splitlines, which also ends lines at signs that a model may write.
        lines = path.read_text("utf-8").split("\n")[:-1] if path.is_file() else []
        kept = [line for line in lines if json.loads(line)["step"] < step]
        added = [{"step": step, "prompt": prompt, "text": text} for prompt, text in texts.items()]
        draft = path.with_suffix(".draft")
        lines = [*kept, *(json.dumps(sample, ensure_ascii=False) for sample in added)]
        draft.write_text("".join(f"{line}\n" for line in lines), "utf-8")
        draft.replace(path)

    def result(self, figures: Mapping[str, Any]) -> None:
        """The figures of the finished job; the last thing that is written."""
        if self._is_writer:
            _replace(self._logs / RESULT, dict(figures))


def _finite(figures: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in figures.items() if abs(value) < float("inf")}


def _replace(path: Path, content: dict[str, Any]) -> None:
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(content, ensure_ascii=False, allow_nan=False), "utf-8")
    draft.replace(path)
