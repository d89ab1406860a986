"""How a torch job ended, found from what its ranks and its launcher left, and said in words."""

import json
import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from conf.contract import ExitCode, ExitFile
from tasks.rank import RANKS, STOPPED, rank_output

TAIL_LINES = 30
TAIL_BYTES = 64 * 1024

_OUT_OF_MEMORY = re.compile(
    r"MemoryError|OutOfMemoryError|out of memory|can't allocate memory|Cannot allocate memory|bad_alloc"
)
_PEER_LOST = re.compile(
    r"Connection (closed|reset) by peer|Broken pipe|Connection refused|Socket Timeout|"
    r"DistNetworkError|DistBackendError|collective operation timeout|Timed out waiting|"
    r"wait timeout|NCCL (communicator was )?(error|aborted)|remote process exited"
)
_TIME_OUT = re.compile(
    r"collective operation timeout|Timed out waiting|Socket Timeout|wait timeout|Watchdog caught"
)
_MISSING_MODULE = re.compile(r"No module named '?([\w.]+)|cannot import name '(\w+)'")
_EXIT_OF_A_RANK = r"exitcode\s*:\s*(-\d+)\D.*pid: {pid}\)"
"""In torchrun's words, which also tell how the others ended that it stopped because of that one."""
_DEEPSPEED_EXIT = r"exits with return code = (-\d+)"


@dataclass(frozen=True)
class RankNote:
    """What one rank wrote about itself; `code` is None when it had no chance to write its end."""

    rank: int
    pid: int
    code: int | None
    error: str
    lines: list[str] = field(default_factory=list[str])
    time: float = 0.0


def read_notes(state: Path) -> list[RankNote]:
    """The notes of all ranks that started, by rank."""
    notes: list[RankNote] = []
    for path in (state / RANKS).glob("*.json"):
        content = json.loads(path.read_text("utf-8"))
        notes.append(RankNote(rank=int(path.stem), **content))
    return sorted(notes, key=lambda note: note.rank)


def tail_of(path: Path, lines: int = TAIL_LINES) -> list[str]:
    """The last lines of a file that may be long; empty when there is none."""
    if not path.exists():
        return []
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - TAIL_BYTES))
        return stream.read().decode("utf-8", "replace").splitlines()[-lines:]


def explain(
    notes: Sequence[RankNote],
    *,
    ranks: int,
    launcher_code: int | None,
    output: Path,
    has_result: bool,
    is_short_of_memory: bool,
    seconds: float,
) -> ExitFile:
    """How a job ended that nobody stopped.

    `launcher_code` is the exit code of the process that the supervisor started (negative: a signal),
    `output` what it printed, `is_short_of_memory` whether the kernel killed for memory meanwhile.
    """
    if len(notes) == ranks and all(note.code == 0 for note in notes):
        if has_result:
            return ExitFile(code=ExitCode.DONE, reason="done", tail=[], seconds=seconds)
        return ExitFile(
            code=ExitCode.FAILED,
            reason="every rank ended without an error, but no result.json was written; "
            "the worker must write it last",
            tail=tail_of(output),
            seconds=seconds,
        )
    culprit = _culprit(notes)
    if culprit is None:
        return ExitFile(
            code=ExitCode.FAILED,
            reason=_launcher_reason(launcher_code, len(notes), ranks, tail_of(output, 400)),
            tail=tail_of(output),
            seconds=seconds,
        )
    own_tail = tail_of(rank_output(output.parent, culprit.rank))
    return ExitFile(
        code=_code(culprit),
        reason=_reason(culprit, ranks, launcher_code, tail_of(output, 400), is_short_of_memory),
        tail=culprit.lines[-TAIL_LINES:] or own_tail,
        seconds=seconds,
    )


def _code(note: RankNote) -> ExitCode:
    return ExitCode(note.code) if note.code in list(ExitCode) else ExitCode.FAILED


def _culprit(notes: Sequence[RankNote]) -> RankNote | None:
    """The rank that failed first: its own error before a lost peer, a kill before both's echoes."""

    def weight(note: RankNote) -> tuple[int, float]:
        match note.code:
            case ExitCode.DIVERGED | ExitCode.GATE:
                order = 0
            case ExitCode.REQUEUE:
                order = 4
            case None:
                order = 2
            case code if code == STOPPED:
                order = 5
            case _ if _PEER_LOST.search(note.error):
                order = 3
            case _:
                order = 1
        return order, note.time

    return min((note for note in notes if note.code != 0), key=weight, default=None)


def _reason(
    note: RankNote,
    ranks: int,
    launcher_code: int | None,
    output: list[str],
    is_short_of_memory: bool,
) -> str:
    who = "the worker" if ranks == 1 else f"rank {note.rank} of {ranks}"
    match note.code:
        case ExitCode.DIVERGED:
            return (
                f"{who} diverged: loss or gradients were not finite too often in a row; "
                "lower the learning rate, or look at the samples named in the log"
            )
        case ExitCode.GATE:
            return f"{who} did not pass a gate with on_gate=fail; see the log for figure and limit"
        case ExitCode.REQUEUE:
            return f"{who} stopped itself after a checkpoint; run again to go on"
        case None:
            number = _signal(note, launcher_code, ranks, output)
            return _killed(who, number, is_short_of_memory)
        case _:
            return _error_reason(who, note)


def _error_reason(who: str, note: RankNote) -> str:
    error = note.error
    if not error:
        return f"{who} ended with exit code {note.code}; its last lines follow"
    if _OUT_OF_MEMORY.search(error):
        return f"{who} is out of memory ({error}); lower launch.micro_batch or take a smaller shape"
    if _TIME_OUT.search(error):
        return f"{who} waited for the other ranks until the time-out ({error})"
    if _PEER_LOST.search(error):
        return f"{who} lost the connection to another rank ({error})"
    if missing := _MISSING_MODULE.search(error):
        name = missing.group(1) or missing.group(2)
        return f"{who} cannot import {name} ({error}); install what it needs in this environment"
    return f"{who} failed: {error}"


def _killed(who: str, number: int | None, is_short_of_memory: bool) -> str:
    if number is None:
        return f"{who} was killed by a signal before it could say why"
    name = signal.Signals(number).name
    if number == signal.SIGKILL and is_short_of_memory:
        return (
            f"{who} is out of memory: the kernel killed it ({name}); "
            "lower launch.micro_batch or take a smaller shape"
        )
    if number == signal.SIGKILL:
        return (
            f"{who} was killed ({name}), by hand or by a memory limit that the kernel does not "
            "report here; run again to go on from the newest checkpoint"
        )
    return f"{who} crashed ({name}); its last lines follow"


def _signal(note: RankNote, launcher_code: int | None, ranks: int, output: list[str]) -> int | None:
    if ranks == 1 and launcher_code is not None and launcher_code < 0:
        return -launcher_code
    text = "\n".join(output)
    for pattern in (_EXIT_OF_A_RANK.format(pid=note.pid), _DEEPSPEED_EXIT):
        if found := re.search(pattern, text):
            return -int(found.group(1))
    return None


def _launcher_reason(code: int | None, started: int, ranks: int, output: list[str]) -> str:
    if code is not None and code < 0:
        return f"the launcher was killed ({signal.Signals(-code).name})"
    text = "\n".join(output)
    if missing := _MISSING_MODULE.search(text):
        return f"the launcher cannot import {missing.group(1) or missing.group(2)}"
    return (
        f"the launcher ended with exit code {code} after {started} of {ranks} ranks had started; "
        "its last lines follow"
    )
