"""Entry of every rank: `python -m tasks.rank MODULE JOBFILE` runs the worker and notes how it ended.

Launchers lose exit codes (torchrun turns every one into 1, the deepspeed launcher turns a signal
into 0), do not pass on a request to stop, and leave ranks behind when they are killed. So each rank
writes its own pid, exit code and error to `state/ranks/<rank>.json`, and asks the kernel to be
killed together with its launcher.
"""

import contextlib
import faulthandler
import json
import os
import runpy
import signal
import sys
import time
import traceback
from pathlib import Path
from types import FrameType

from tasks.processes import die_with_parent

RANKS = "ranks"
"""Folder in `state/` with one file per rank of the newest start."""
STOPPED = 128 + signal.SIGTERM
"""Exit code of a rank that was asked to stop before the worker listened to the request."""


def rank_output(logs: Path, rank: int) -> Path:
    """File that holds what one rank printed; rank 0 shares the launcher's."""
    return logs / ("output.log" if rank == 0 else f"output.{rank}.log")


def note_path(state: Path, rank: int) -> Path:
    """File in which one rank notes how it ended."""
    return state / RANKS / f"{rank}.json"


def main() -> None:
    """Run the worker module as `__main__`, with the job file as its only argument."""
    module, job_file = sys.argv[1:3]
    rank = int(os.environ.get("RANK", "0"))
    state = Path(job_file).parent
    die_with_parent(signal.SIGKILL)
    if rank > 0:
        _print_to(rank_output(state.parent / "logs", rank))
    faulthandler.enable()
    signal.signal(signal.SIGTERM, _stop)
    note = note_path(state, rank)
    _write(note, code=None, error="", lines=[])
    sys.argv = [module, job_file]
    code, error, lines = _run(module)
    _write(note, code=code, error=error, lines=lines)
    sys.exit(code)


def _run(module: str) -> tuple[int, str, list[str]]:
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        if ended.code is None or isinstance(ended.code, int):
            return ended.code or 0, "", []
        sys.stderr.write(f"{ended.code}\n")
        return 1, ended.code, []
    # The outermost frame of a process: whatever ended the worker has to be written down.
    except BaseException as error:  # noqa: BLE001
        lines = traceback.format_exception(error)
        sys.stderr.write("".join(lines))
        return 1, f"{type(error).__name__}: {error}", "".join(lines).splitlines()[-40:]
    return 0, "", []


def _write(note: Path, *, code: int | None, error: str, lines: list[str]) -> None:
    text = json.dumps(
        {"pid": os.getpid(), "code": code, "error": error, "lines": lines, "time": time.time()}
    )
    partial = note.with_suffix(f".{os.getpid()}")
    partial.write_text(text, "utf-8")
    partial.replace(note)


def _print_to(path: Path) -> None:
    stream = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    os.close(stream)


def _stop(number: int, frame: FrameType | None) -> None:
    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(128 + number)


if __name__ == "__main__":
    main()
