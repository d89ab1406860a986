"""What the launcher's tests share: a job whose worker is the counter, and a look at its processes."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import pytest

from conf.launch import LaunchConfig
from conf.settings import RUNTIME, Settings
from storage.artifact import Artifact
from storage.store import Store
from tasks.launch import run_worker
from tasks.processes import is_alive
from tasks.stage import Job, stage

WORKER = "tests.tasks.workers.counter"


class CounterConfig(Settings):
    """Settings of the counting worker; all but `steps` are ways to misbehave."""

    steps: int = 3
    """How far to count."""
    step_seconds: Annotated[float, RUNTIME] = 0.01
    """Time per step."""
    act: Annotated[str, RUNTIME] = ""
    """What to do once at `act_at` on rank `act_rank`."""
    act_at: Annotated[int, RUNTIME] = 1
    """Step of the act."""
    act_rank: Annotated[int, RUNTIME] = 0
    """Rank of the act."""
    is_deaf: Annotated[bool, RUNTIME] = False
    """Whether requests to stop are ignored."""
    launch: Annotated[LaunchConfig, RUNTIME] = LaunchConfig(threads=1)
    """Where it runs."""


class Count(Artifact):
    """A folder with count.txt."""

    kind = "count"


@stage(version=1, uses_torch=True)
def counter(job: Job, settings: CounterConfig) -> Count:
    """Count by a torch job."""
    job.metrics.update(run_worker(job, WORKER, settings, {}))
    return Count(job.path)


def make_job(root: Path, report: Callable[[float, float, str], None] | None = None) -> Job:
    """A job in a folder of its own, outside any store's books."""
    job = Job(node="counter", stage="counter", path=root / "attempt", store=Store(root / "store"))
    if report is not None:
        job.report_progress = report
    return job


def run(job: Job, **settings: Any) -> dict[str, Any]:
    """Run the counter with these settings and, under `launch`, these launch settings."""
    launch = LaunchConfig(**{"threads": 1, **settings.pop("launch", {})})
    return run_worker(job, WORKER, CounterConfig(launch=launch, **settings), {})


def starts(job: Job, rank: int = 0) -> list[int]:
    """The pids of every start of a rank's worker, oldest first."""
    path = job.logs / f"started.{rank}"
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def count(job: Job, rank: int = 0) -> int:
    """How far a rank has counted."""
    path = job.state / f"count.{rank}"
    return int(path.read_text()) if path.exists() else 0


def wait_for(condition: Callable[[], Any], seconds: float = 60.0) -> None:
    """Wait until something holds. Raises AssertionError when it does not in time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def processes_of(attempt: Path) -> list[int]:
    """Every live process that names the attempt's folder on its command line."""
    found: list[int] = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid() and is_alive(int(entry.name)):
            try:
                line = (entry / "cmdline").read_bytes()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if str(attempt / "state").encode() in line:
                found.append(int(entry.name))
    return sorted(found)


def install_ssh(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host file of two addresses of this machine, and an `ssh` that runs a command here, with a home of
    its own for each host; returns the file."""
    stand_in = folder / "bin" / "ssh"
    stand_in.parent.mkdir()
    stand_in.write_text(f'#!/bin/sh\nexec env BESSEMER_HOME="{folder}/$3" sh -c "$4"\n', "utf-8")
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", f"{stand_in.parent}{os.pathsep}{os.environ['PATH']}")
    hostfile = folder / "hosts"
    hostfile.write_text("# two nodes\n127.0.0.1 slots=1\n127.0.0.2 slots=1\n", "utf-8")
    return hostfile
