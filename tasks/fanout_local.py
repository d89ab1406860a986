"""Parts in worker processes of this machine.

Workers are never forked from the run itself (one would keep a dead parent's locks): they come from a
server process that is begun anew, has loaded what they need and holds nothing; they end with the run.
"""

import os
import signal
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from tasks.fanout_part import POLL_SECONDS, Task, build_part
from tasks.memory import one_arena
from tasks.processes import die_with_writer

THREAD_LIMITS = (
    "POLARS_MAX_THREADS", "NUMBA_NUM_THREADS", "OMP_NUM_THREADS", "RAYON_NUM_THREADS",
    "FASTOKENS_BPE_THREADS",
)  # fmt: skip
LOADED = ("__main__", "tasks.fanout", "pyarrow.parquet", "tasks.kernels")
"""Modules that the server of workers loads once. Threads that they begin (of an allocator and of OpenBLAS,
which both know of forks) sleep by the time when the last is loaded. Not polars: it takes the number of
its threads when it is loaded, and begins some that know of no fork."""
DIED = "its worker died (killed, or out of memory)"

Result = TypeVar("Result")
Ended = tuple[Task, str | None]
"""A task that has ended, and how it failed."""


def build_here(tasks: Sequence[Task], workers: int) -> Iterator[Ended]:
    """Build parts in processes of this machine, as many at once as there are workers."""
    left, suspects = list(tasks), list[Task]()
    while left:
        left, died_with = yield from _run_pool(left, min(workers, len(left)))
        suspects += died_with
    for suspect in suspects:
        # A dead worker breaks the whole pool; alone, an item shows whether it was the cause.
        yield suspect, build_apart(suspect, os.cpu_count() or 1)


def build_apart(
    task: Task, threads: int, is_wanted: Callable[[], bool] = lambda: True
) -> str | None:
    """Build one part in the main thread of a process of its own; how it failed, or None.

    The process is ended when this one ends, or as soon as the part is no longer wanted.
    """
    with _pool(1, threads) as pool:
        with _deaf_to_interrupt():
            future = pool.submit(build_part, task)
        while not wait([future], POLL_SECONDS).done:
            if not is_wanted():
                raise RuntimeError(f"{task.label} is no longer wanted")
        try:
            return future.result()
        except BrokenProcessPool:
            return DIED


def run_apart(function: Callable[..., Result], *arguments: Any) -> Result:
    """Call a function of a module in a process of its own, whose memory the kernel then has back.

    Raises what the function raises, and RuntimeError if its process dies.
    """
    with _pool(1, os.cpu_count() or 1) as pool:
        with _deaf_to_interrupt():
            future = pool.submit(function, *arguments)
        while not wait([future], POLL_SECONDS).done:
            pass
        try:
            return future.result()
        except BrokenProcessPool:
            raise RuntimeError(f"{function.__name__}: {DIED}") from None


def _run_pool(
    tasks: Sequence[Task], workers: int
) -> Generator[Ended, None, tuple[list[Task], list[Task]]]:
    """Run tasks in a fresh pool; if it broke, returns those not begun and those that were running."""
    with _pool(workers, max(1, (os.cpu_count() or 1) // workers)) as pool:
        with _deaf_to_interrupt():
            # Submitting starts the workers.
            waiting = {pool.submit(build_part, task): task for task in tasks}
        running: set[Future[str | None]] = set()
        untouched: list[Task] = []
        suspects: list[Task] = []
        left = set(waiting)
        while left:
            # Without a time-out no interrupt would reach this thread until a part has ended.
            done, left = wait(left, POLL_SECONDS, FIRST_COMPLETED)
            running |= {future for future in left if future.running()}
            for future in done:
                try:
                    failure = future.result()
                except BrokenProcessPool:
                    is_suspect = future in running or len(tasks) <= workers
                    (suspects if is_suspect else untouched).append(waiting[future])
                    continue
                yield waiting[future], failure
    if untouched and not suspects:
        return [], untouched
    return untouched, suspects


@contextmanager
def _pool(workers: int, threads: int) -> Generator[ProcessPoolExecutor]:
    context = get_context("forkserver")
    context.set_forkserver_preload(list(LOADED))
    reader, writer = context.Pipe(duplex=False)
    # The server has the environment of the time when it was begun.
    environment = dict.fromkeys(THREAD_LIMITS, str(threads)) | dict(os.environ)
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
    """Leave Ctrl-C to the parent, take its environment, end with it, and keep little memory that is free."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    die_with_writer(parent_pipe.fileno())
    os.environ.clear()
    os.environ.update(environment)
    one_arena()
