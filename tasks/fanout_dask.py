"""Parts on a Dask cluster that is up."""

from collections.abc import Mapping
from queue import Empty, SimpleQueue
from typing import Any

from distributed import Client, Future, KilledWorker, get_worker

from tasks.fanout_cluster import CONNECT_SECONDS, Sight, wrong_with
from tasks.fanout_local import DIED, Ended, build_apart
from tasks.fanout_part import Task


def connect(address: str) -> "DaskCluster":
    """Connect to the scheduler. Raises OSError when it does not answer."""
    return DaskCluster(Client(address, timeout=CONNECT_SECONDS, set_as_default=False))


class DaskCluster:
    """A scheduler and its workers."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._futures: dict[Any, Task] = {}
        self._ended: SimpleQueue[Any] = SimpleQueue()

    def look(self, sight: Sight) -> Mapping[str, str | None]:
        """What is wrong with each worker; none when there is no worker in time."""
        try:
            self._client.wait_for_workers(1, timeout=CONNECT_SECONDS)
        except TimeoutError:
            return {}
        found = self._client.run(wrong_with, sight, on_error="return")
        return {
            name: f"{type(wrong).__name__}: {wrong}" if isinstance(wrong, Exception) else wrong
            for name, wrong in found.items()
        }

    def submit(self, task: Task) -> None:
        """Have a part built by a slot of a worker."""
        # Not pure: another run may wait for an equal part, and must not take our failure for its own.
        future: Future[str | None] = self._client.submit(build_on_slot, task, pure=False)
        self._futures[future] = task
        future.add_done_callback(self._ended.put)

    def next_ended(self, seconds: float) -> Ended | None:
        """A part that has ended."""
        try:
            future = self._ended.get(timeout=seconds)
        except Empty:
            return None
        task = self._futures.pop(future)
        try:
            return task, future.result()
        except KilledWorker:
            return task, DIED
        except Exception as error:  # noqa: BLE001 - what the worker or the scheduler could not do
            return task, f"{type(error).__name__}: {error}"

    def cancel(self) -> None:
        """Take back what is not done, and part."""
        self._client.cancel(list(self._futures), force=True)
        self._client.close()


def build_on_slot(task: Task) -> str | None:
    """Build a part in a process of its own, as long as the run that wants it is there."""
    from multiprocessing import current_process

    worker = get_worker()
    key = worker.get_current_task()
    # A nanny's worker may have no processes, lest they outlive it; ours end with it.
    current_process().daemon = False

    def is_wanted() -> bool:
        state = worker.state.tasks.get(key)
        return state is not None and state.state != "cancelled"

    return build_apart(task, 1, is_wanted)
