"""Parts on a Ray cluster that is up."""

import logging
import socket
import threading
from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import RayError, WorkerCrashedError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tasks.fanout_cluster import CONNECT_SECONDS, Sight, wrong_with
from tasks.fanout_local import DIED, Ended, build_apart
from tasks.fanout_part import Task

_joining = threading.Lock()


def connect(address: str) -> "RayCluster":
    """Join the cluster; a process joins once and stays. Raises OSError when it does not answer."""
    with _joining:
        if not ray.is_initialized():
            _check_answers(address)
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    return RayCluster()


def _check_answers(address: str) -> None:
    """Ray itself would try for minutes, and say so on the screen."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit():
        socket.create_connection((host, int(port)), CONNECT_SECONDS).close()


class RayCluster:
    """The nodes of the cluster that this process has joined."""

    def __init__(self) -> None:
        self._tasks: dict[Any, Task] = {}
        self._build = ray.remote(num_cpus=1, max_retries=2)(build_on_slot)
        self._look = ray.remote(num_cpus=0, max_retries=0)(wrong_with)

    def look(self, sight: Sight) -> Mapping[str, str | None]:
        """What is wrong with each node."""
        asked: dict[str, Any] = {}
        for node in ray.nodes():
            if node["Alive"] and node["Resources"].get("CPU"):
                place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                look = self._look.options(scheduling_strategy=place)
                asked[f"{node['NodeName']} {node['NodeID'][:8]}"] = look.remote(sight)
        return {name: self._seen(reference) for name, reference in asked.items()}

    @staticmethod
    def _seen(reference: Any) -> str | None:
        try:
            return ray.get(reference, timeout=CONNECT_SECONDS)
        except RayError as error:
            return f"{type(error).__name__}: {error}"

    def submit(self, task: Task) -> None:
        """Have a part built by a slot of a node."""
        self._tasks[self._build.remote(task)] = task

    def next_ended(self, seconds: float) -> Ended | None:
        """A part that has ended."""
        ended, _ = ray.wait(list(self._tasks), num_returns=1, timeout=seconds)
        if not ended:
            return None
        task = self._tasks.pop(ended[0])
        try:
            return task, ray.get(ended[0])
        except WorkerCrashedError:
            return task, DIED
        except RayError as error:
            return task, f"{type(error).__name__}: {error}"

    def cancel(self) -> None:
        """Take back what is not done."""
        for reference in self._tasks:
            ray.cancel(reference, force=True)


def build_on_slot(task: Task) -> str | None:
    """Build a part in a process of its own, which ends with the worker."""
    return build_apart(task, 1)
