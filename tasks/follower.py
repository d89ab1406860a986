"""Following a running attempt by its files: output lines, progress, and the request to stop it."""

import contextlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from pydantic import ValidationError

from conf.contract import OUTPUT, PROGRESS, Progress
from tasks.processes import is_alive, start_of

CANCEL = "cancel"
"""In `state/`: its presence asks the supervisor to stop the job."""
FOLLOWERS = "followers"
"""Folder in `state/` with one file per follower, touched every second and named by its process, its start
and its thread."""

TOUCH_SECONDS = 1.0
MAX_LINE_CHARS = 2000

Report = Callable[[float, float, str], None]


class Follower:
    """One process's view of one attempt; within `with`, it counts as a follower."""

    def __init__(self, attempt: Path, say: Callable[[str], None], report: Report) -> None:
        self.attempt = attempt
        self._say = say
        self._report = report
        self._lines = LineReader(attempt / "logs" / OUTPUT)
        name = f"{os.getpid()}-{start_of(os.getpid())}-{threading.get_ident()}"
        self._mark = attempt / "state" / FOLLOWERS / name
        self._touched = 0.0
        self._reported = 0.0

    def __enter__(self) -> "Follower":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._mark.unlink(missing_ok=True)

    def look(self) -> None:
        """Show that somebody follows, and relay what is new. Cheap; call it a few times a second."""
        if time.monotonic() - self._touched > TOUCH_SECONDS:
            self._touched = time.monotonic()
            # The attempt may be committed, and its state removed, at any moment; a stage that is
            # no torch job has no such folder.
            with contextlib.suppress(FileNotFoundError):
                self._mark.touch()
        for line in self._lines.new():
            self._say(line)
        self._relay_progress()

    def leave(self) -> bool:
        """Stop following; ask the job to end unless somebody else follows it. Whether it was asked."""
        self._mark.unlink(missing_ok=True)
        marks = self._mark.parent
        if not marks.is_dir() or any(_is_there(mark) for mark in marks.iterdir()):
            return False
        (self.attempt / "state" / CANCEL).touch()
        return True

    def _relay_progress(self) -> None:
        path = self.attempt / "logs" / PROGRESS
        try:
            modified = path.stat().st_mtime
            if modified == self._reported:
                return
            progress = Progress.model_validate_json(path.read_text("utf-8"))
        except (FileNotFoundError, ValidationError):
            return
        self._reported = modified
        self._report(progress.step, progress.total, progress.unit)


class LineReader:
    """The whole lines that were added to a growing file since the last look."""

    def __init__(self, path: Path, *, from_start: bool = False) -> None:
        self._path = path
        self._offset = 0 if from_start or not path.exists() else path.stat().st_size
        self._rest = b""

    def new(self) -> list[str]:
        """New complete lines, long ones cut; [] while there is no file."""
        try:
            with self._path.open("rb") as stream:
                stream.seek(self._offset)
                content = stream.read()
        except FileNotFoundError:
            return []
        self._offset += len(content)
        *lines, self._rest = (self._rest + content).split(b"\n")
        return [_shorten(line.decode("utf-8", "replace")) for line in lines]


def _shorten(line: str) -> str:
    # A progress bar rewrites its line after each carriage return: the last state is what counts.
    line = line.rstrip("\r").rpartition("\r")[2]
    return line if len(line) <= MAX_LINE_CHARS else f"{line[:MAX_LINE_CHARS]}... (cut)"


def _is_there(mark: Path) -> bool:
    """Whether the process of a mark lives. By no clock: one that is set, or a machine too busy to touch its
    marks, would end a job that somebody follows."""
    pid, started = mark.name.split("-")[:2]
    return start_of(int(pid)) == float(started) and is_alive(int(pid))


def newest_attempt(root: Path, fingerprint: str) -> Path | None:
    """Folder of the newest attempt at a fingerprint below a store's root, None without one."""
    place = root / "attempts" / fingerprint
    with contextlib.suppress(FileNotFoundError):
        numbers = [int(path.name) for path in place.iterdir() if path.name.isdigit()]
        return place / str(max(numbers)) if numbers else None
    return None
