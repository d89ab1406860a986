"""Map a function over shards in worker processes; every shard's result is an artifact of its own.

reads items   writes one part per item   cost only the items whose part is not in the store

Workers are never forked from the run itself (one would keep a dead parent's locks): they come from a
server process that is begun anew, has loaded what they need and holds nothing; they end with the run.
Where several machines share a store, two that build the same part wait for each other.
"""

import functools
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from storage.errors import PartsFailed
from storage.identity import fingerprint as fingerprint_of
from storage.record import Record
from storage.store import PARTS_BUILT, Store
from storage.store_local import empty_folder, read_record
from tasks.processes import die_with_writer
from tasks.stage import Job

PART_POLL_SECONDS = 0.2
THREAD_LIMITS = ("POLARS_MAX_THREADS", "NUMBA_NUM_THREADS", "OMP_NUM_THREADS", "RAYON_NUM_THREADS")

LOADED = ("__main__", "tasks.fanout", "pyarrow.parquet", "tasks.kernels")
"""Modules that the server of workers loads once. Threads that they begin (of an allocator and of OpenBLAS,
which both know of forks) sleep by the time when the last is loaded. Not polars: it takes the number of
its threads when it is loaded, and begins some that know of no fork."""

Build = Callable[..., dict[str, Any]]


@dataclass(frozen=True)
class PartItem:
    """One piece of work."""

    identity: dict[str, Any]
    """What decides the result, plain JSON values; the build function and the version are added."""
    arguments: tuple[Any, ...] = ()
    """Given to the build function after the folder to write in; must pickle."""
    label: str = ""
    """Names the item in messages."""
    cost: float = 0.0
    """How long it takes beside the others, in any unit; the dearest are begun first."""


@dataclass(frozen=True)
class Part:
    """A built item: a committed artifact of kind `part`."""

    fingerprint: str
    digest: str
    path: Path
    metrics: dict[str, Any]
    is_reused: bool
    """Whether it was in the store before this fan-out."""

    @property
    def files(self) -> Path:
        """Folder of what the build function wrote."""
        return self.path / "files"


@dataclass(frozen=True)
class _Task:
    """All that a worker process is told about one item."""

    store_url: str
    cache: Path | None
    build: Build
    arguments: tuple[Any, ...]
    record: Record
    label: str
    cost: float


@dataclass
class _Progress:
    """Counts finished items, and why some failed."""

    job: Job
    total: int
    done: int = 0
    failures: dict[str, str] = field(default_factory=dict[str, str])

    def add(self, fingerprint: str, failure: str | None) -> None:
        """One more item is finished; `failure` says how when it did not succeed."""
        self.done += 1
        if failure is not None:
            self.failures[fingerprint] = failure
        else:
            _note_part(self.job, fingerprint)
        self.job.report_progress(self.done, self.total, "parts")


def fan_out(job: Job, build: Build, items: Sequence[PartItem], *, version: int = 1) -> list[Part]:
    """Build the part of every item that the store does not hold; the parts, in item order.

    `build(files, *arguments)` is a function of a module; it writes under `files` and returns plain
    JSON figures. It runs in the main thread of a worker process, or of this one when the job has one
    worker. Raises PartsFailed, after all other items are done, when some raised or their worker died.
    """
    tasks = [_task(job, build, item, version) for item in items]
    parts = _look_up(job.store, [task.record.fingerprint for task in tasks], is_reused=True)
    missing = {t.record.fingerprint: t for t in tasks if parts[t.record.fingerprint] is None}
    progress = _Progress(job, len(parts), len(parts) - len(missing))
    for fingerprint in [fp for fp in parts if fp not in missing]:
        _note_part(job, fingerprint)
    if missing:
        _build_all(job, sorted(missing.values(), key=lambda task: -task.cost), progress)
        parts |= _look_up(job.store, list(missing), is_reused=False)
    found = [part for task in tasks if (part := parts[task.record.fingerprint])]
    if progress.failures or len(found) < len(tasks):
        raise _failed(missing, progress.failures, len(parts))
    job.parts += [fp for fp in parts if fp not in job.parts]
    job.metrics["shards"] = _counted(job, built=len(missing), reused=len(parts) - len(missing))
    return found


def _task(job: Job, build: Build, item: PartItem, version: int) -> _Task:
    name = f"{build.__module__}.{build.__qualname__}"
    if "<" in name:
        raise ValueError(f"{name} cannot be sent to a worker; use a function of a module")
    identity = {"part": name, "version": version, **item.identity}
    record = Record(
        fingerprint=fingerprint_of(identity),
        kind="part",
        stage=f"{job.stage}/part",
        digest="",
        identity=identity,
        node=job.node,
    )
    label = item.label or name
    return _Task(job.store.url, job.store.cache, build, item.arguments, record, label, item.cost)


def _look_up(
    store: Store, fingerprints: Sequence[str], *, is_reused: bool
) -> dict[str, Part | None]:
    def part(fingerprint: str, path: Path | None) -> Part | None:
        record = read_record(path) if path else None
        if path is None or record is None:
            return None
        return Part(fingerprint, record.digest, path, record.metrics, is_reused)

    unique = list(dict.fromkeys(fingerprints))
    return {fp: part(fp, path) for fp, path in zip(unique, store.find_all(unique), strict=True)}


def _counted(job: Job, *, built: int, reused: int) -> dict[str, int]:
    """Figures of this fan-out added to those of earlier ones of the same job."""
    before = job.metrics.get("shards", {"built": 0, "reused": 0})
    return {"built": before["built"] + built, "reused": before["reused"] + reused}


def _note_part(job: Job, fingerprint: str) -> None:
    """Keep gc from a part whose whole is not committed yet."""
    job.state.mkdir(parents=True, exist_ok=True)
    with (job.state / PARTS_BUILT).open("a", encoding="utf-8") as stream:
        stream.write(f"{fingerprint}\n")


def _failed(tasks: dict[str, _Task], failures: dict[str, str], total: int) -> PartsFailed:
    lines = [f"{tasks[fp].label}: {reason}" for fp, reason in failures.items()]
    shown = "\n".join(lines[:5]) + (f"\n... and {len(lines) - 5} more" if len(lines) > 5 else "")
    return PartsFailed(
        f"{len(lines)} of {total} parts failed; the others are kept and will be reused.\n{shown}"
    )


def _build_all(job: Job, tasks: list[_Task], progress: _Progress) -> None:
    # A build may set timers, which only a main thread can; others get a process even for one item.
    if job.workers == 1 and threading.current_thread() is threading.main_thread():
        for task in tasks:
            progress.add(task.record.fingerprint, _build_part(task))
        return
    suspects: list[_Task] = []
    while tasks:
        tasks, died_with = _run_pool(tasks, min(job.workers, len(tasks)), progress)
        suspects += died_with
    for suspect in suspects:
        # A dead worker breaks the whole pool; alone, an item shows whether it was the cause.
        if any(_run_pool([suspect], 1, progress)):
            progress.add(suspect.record.fingerprint, "its worker died (killed, or out of memory)")


def _run_pool(
    tasks: list[_Task], workers: int, progress: _Progress
) -> tuple[list[_Task], list[_Task]]:
    """Run tasks in a fresh pool; if it broke, those not begun and those that were running."""
    with _pool(workers) as pool:
        with _deaf_to_interrupt():
            # Submitting starts the workers.
            waiting = {pool.submit(_build_part, task): task for task in tasks}
        running: set[Future[str | None]] = set()
        untouched: list[_Task] = []
        suspects: list[_Task] = []
        for future in as_completed(waiting):
            running |= {other for other in waiting if other.running()}
            try:
                failure = future.result()
            except BrokenProcessPool:
                is_suspect = future in running or len(tasks) <= workers
                (suspects if is_suspect else untouched).append(waiting[future])
                continue
            progress.add(waiting[future].record.fingerprint, failure)
    if untouched and not suspects:
        return [], untouched
    return untouched, suspects


@contextmanager
def _pool(workers: int) -> Generator[ProcessPoolExecutor]:
    context = get_context("forkserver")
    context.set_forkserver_preload(list(LOADED))
    reader, writer = context.Pipe(duplex=False)
    threads = str(max(1, (os.cpu_count() or 1) // workers))
    # The server has the environment of the time when it was begun.
    environment = dict.fromkeys(THREAD_LIMITS, threads) | dict(os.environ)
    pool = ProcessPoolExecutor(
        workers,
        mp_context=context,
        initializer=_begin_worker,
        initargs=(reader, environment),
    )
    try:
        yield pool
    except BaseException:
        writer.close()  # the kernel ends the workers at once
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        writer.close()
        reader.close()


@contextmanager
def _deaf_to_interrupt() -> Generator[None]:
    """Keep Ctrl-C from processes started meanwhile, until they themselves choose to ignore it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin_worker(parent_pipe: Connection, environment: dict[str, str]) -> None:
    """Leave Ctrl-C to the parent, take its environment, and end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    die_with_writer(parent_pipe.fileno())
    os.environ.clear()
    os.environ.update(environment)


def _build_part(task: _Task) -> str | None:
    """Build and commit one part; how it failed, or None. Never raises, so that others go on."""
    try:
        _build_and_commit(task)
    except Exception as error:  # noqa: BLE001 - told to the parent, which raises it with the label
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
    return None


@functools.cache
def _open(url: str, cache: Path | None) -> Store:
    """One store for each process: on S3 its connection and its lease keeper are costly to begin."""
    return Store(url, cache=cache)


def _build_and_commit(task: _Task) -> None:
    store = _open(task.store_url, task.cache)
    fingerprint = task.record.fingerprint
    while (claim := store.claim(fingerprint)) is None:
        time.sleep(PART_POLL_SECONDS)
    with claim:
        if store.find(fingerprint):
            return
        empty_folder(claim.path / "files")
        started = time.monotonic()
        metrics = task.build(claim.path / "files", *task.arguments)
        seconds = round(time.monotonic() - started, 3)
        store.commit(claim, task.record.model_copy(update={"metrics": metrics, "seconds": seconds}))
