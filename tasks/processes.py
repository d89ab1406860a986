"""Linux process plumbing for torch jobs: no process is left behind, one job at a time per device.

Two kernel features carry it. PR_SET_PDEATHSIG: a process is signalled when the THREAD that started
it ends, so children are started from main threads only. PR_SET_CHILD_SUBREAPER: a descendant whose
parent died becomes a child of the nearest marked ancestor, so that none leaves the tree, whatever
session or group its launcher put it into.
"""

import contextlib
import ctypes
import fcntl
import os
import select
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def die_with_parent(number: signal.Signals) -> None:
    """Have the kernel send this process a signal when the thread that started it ends."""
    _prctl(_PR_SET_PDEATHSIG, number)


def die_with_writer(pipe: int) -> None:
    """Have the kernel kill this process when nobody has the writing end of a pipe any more.

    Works for a child of another process than the writer's, and while this one is busy in code that
    keeps the interpreter's lock (a regular expression that does not end).
    """
    # Owner and signal belong to the open file, which processes may share; this opens one of our own.
    own = os.open(f"/proc/self/fd/{pipe}", os.O_RDONLY | os.O_NONBLOCK)
    fcntl.fcntl(own, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(own, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(own, fcntl.F_SETFL, os.O_NONBLOCK | os.O_ASYNC)
    if select.select([pipe], [], [], 0)[0]:
        os._exit(1)  # it was closed before


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent dies."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}, {value}) failed")


def interrupt(thread: int) -> None:
    """Raise in a thread of this process, which no signal reaches, what Ctrl-C means."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread), ctypes.py_object(KeyboardInterrupt)
    )


def is_alive(pid: int) -> bool:
    """Whether a process exists and is not a zombie."""
    return _stat(pid)[0] not in ("", "Z", "X")


def start_of(pid: int) -> float:
    """When a process was started, in seconds since the kernel's own start; 0 for one that is not there.

    Unlike a time of day it stays what it is when somebody sets the clock.
    """
    return _stat(pid)[2] / os.sysconf("SC_CLK_TCK")


def descendants(pid: int) -> list[int]:
    """Every process below `pid`, zombies left out, nearest first."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            status, parent, _ = _stat(int(entry.name))
            if status not in ("", "Z", "X"):
                children.setdefault(parent, []).append(int(entry.name))
    found = list(children.get(pid, []))
    for child in found:
        found.extend(children.get(child, []))
    return found


def _stat(pid: int) -> tuple[str, int, int]:
    """State, parent and start (in ticks of the kernel's clock); nothing for a process that is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace")
    except (FileNotFoundError, ProcessLookupError):
        return "", 0, 0
    # The name, in parentheses, may itself hold spaces and parentheses.
    fields = text.rpartition(")")[2].split()
    return fields[0], int(fields[1]), int(fields[19])


def send(pid: int, number: signal.Signals) -> None:
    """Signal a process that may have ended meanwhile."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def kill_descendants(*, patience_seconds: float = 10.0) -> list[int]:
    """SIGKILL everything below this process and reap it; returns what would not die (stuck in the kernel)."""
    end = time.monotonic() + patience_seconds
    while below := descendants(os.getpid()):
        for pid in below:
            send(pid, signal.SIGKILL)
        _reap()
        if time.monotonic() > end:
            return below
        time.sleep(0.01)
    _reap()
    return []


def _reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def cuda_devices() -> list[str]:
    """CUDA devices that this process may use, by number or UUID, found without loading CUDA."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    present = sorted(
        path.name.removeprefix("nvidia")
        for path in Path("/dev").glob("nvidia[0-9]*")
        if path.name.removeprefix("nvidia").isdigit()
    )
    if visible is None:
        return [str(index) for index in range(len(present))]
    named = [name.strip() for name in visible.split(",") if name.strip()]
    return [] if not present or "-1" in named else named


def uses_cuda(device: str) -> bool:
    """Whether a job with this `launch.device` computes on CUDA; with `auto` it does where there is any."""
    return device == "cuda" or (device == "auto" and bool(cuda_devices()))


def out_of_memory_kills() -> int:
    """How often the kernel has killed for memory since the host started; 0 where it does not say."""
    try:
        text = Path("/proc/vmstat").read_text("utf-8")
    except (FileNotFoundError, PermissionError):
        return 0
    return next((int(line.split()[1]) for line in text.splitlines() if "oom_kill" in line), 0)


class HostLock:
    """A lock of this host, freed by the kernel when its holder ends, however it ends."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stream: int | None = None

    def try_take(self) -> bool:
        """Take the lock unless another process has it."""
        # Opened for reading: in a sticky folder another user's file may not be opened with O_CREAT.
        try:
            stream = os.open(self.path, os.O_RDONLY)
        except FileNotFoundError:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            stream = os.open(self.path, os.O_RDONLY | os.O_CREAT, 0o644)
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(stream)
            return False
        self._stream = stream
        return True

    def release(self) -> None:
        """Give the lock back."""
        if self._stream is not None:
            os.close(self._stream)
            self._stream = None


def take_cpu() -> HostLock | None:
    """The right to train on this host's CPU, or None while another job of this home has it."""
    home = os.environ.get("BESSEMER_HOME")
    lock = HostLock(Path(home or tempfile.gettempdir()) / "bessemer-cpu.lock")
    return lock if lock.try_take() else None


def take_cuda(count: int) -> dict[str, HostLock] | None:
    """`count` free CUDA devices with their locks, or None; all or nothing, so that jobs cannot deadlock."""
    taken: dict[str, HostLock] = {}
    for device in _candidates(count):
        lock = HostLock(Path(tempfile.gettempdir()) / f"bessemer-cuda-{device}.lock")
        if lock.try_take():
            taken[device] = lock
        if len(taken) == count:
            return taken
    for lock in taken.values():
        lock.release()
    return None


def _candidates(count: int) -> Iterator[str]:
    devices = cuda_devices()
    if len(devices) < count:
        raise ValueError(
            f"the job wants {count} CUDA devices, this host offers {len(devices)}; "
            "lower launch.processes or set launch.device=cpu"
        )
    yield from devices
