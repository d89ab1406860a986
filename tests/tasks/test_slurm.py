"""Torch jobs under Slurm, by a stand-in on the PATH that really queues, runs, kills and requeues."""

import os
import re
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest

from conf.contract import ExitCode
from conf.launch import LaunchConfig
from tasks.launch import JobFailed, JobStopped, preflight
from tests.tasks.launching import WORKER, count, make_job, processes_of, run, starts, wait_for

TWO_NODES = {
    "launcher": "slurm",
    "nodes": 2,
    "engine": "ddp",
    "slurm": {"partition": "short"},
    "environment": {"GLOO_SOCKET_IFNAME": "lo"},
}
ONE_NODE = {"launcher": "slurm"}
pytestmark = pytest.mark.usefixtures("queue")


def submitted(queue: Path) -> list[str]:
    """The scripts that were submitted."""
    return [path.read_text("utf-8") for path in sorted(queue.glob("*.script"))]


def in_thread(job: Any, **settings: Any) -> tuple[threading.Thread, list[Any]]:
    """The counter's job, followed by a thread; its result or error."""
    found: list[Any] = []

    def follow() -> None:
        try:
            found.append(run(job, **settings))
        except (JobFailed, KeyboardInterrupt) as error:
            found.append(error)

    thread = threading.Thread(target=follow)
    thread.start()
    return thread, found


@pytest.mark.slow
def test_a_job_on_two_nodes_gives_its_result(tmp_path: Path, queue: Path) -> None:
    job = make_job(tmp_path)
    assert run(job, steps=4, launch=TWO_NODES)["count"] == 4
    assert len(starts(job, 0)) == len(starts(job, 1)) == 1
    [script] = submitted(queue)
    assert "#SBATCH --partition=short" in script
    assert "#SBATCH --nodes=2" in script
    assert "rank 0 begins at 0" in (job.logs / "output.log").read_text()
    assert processes_of(job.path) == []


def test_a_job_that_must_make_room_saves_and_goes_on_from_the_queue(
    tmp_path: Path, queue: Path
) -> None:
    job = make_job(tmp_path)
    thread, found = in_thread(job, steps=150, launch=ONE_NODE)
    wait_for(lambda: count(job) > 2)
    [script] = queue.glob("*.script")
    subprocess.run(["scancel", "--signal=TERM", script.stem], check=True)
    thread.join(60)
    assert found[0]["count"] == 150
    assert len(submitted(queue)) == 1
    first, second = (
        int(line.rpartition(" ")[2])
        for line in (job.logs / "output.log").read_text().splitlines()
        if "begins at" in line
    )
    assert first == 0 < second < 150


def test_a_failure_is_explained_and_ends_the_job(tmp_path: Path, queue: Path) -> None:
    job = make_job(tmp_path)
    with pytest.raises(JobFailed, match="the thing broke"):
        run(job, act="raise", launch=ONE_NODE)
    assert run(job, act="raise", launch=ONE_NODE)["count"] == 3
    assert len(submitted(queue)) == 2


def test_who_stops_following_takes_the_job_out_of_the_queue(tmp_path: Path, queue: Path) -> None:
    def interrupt(done: float, total: float, unit: str) -> None:
        if done > 2:
            raise KeyboardInterrupt

    job = make_job(tmp_path, interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(job, steps=5000, launch=ONE_NODE)
    assert not list(queue.glob("*.status"))
    assert processes_of(job.path) == []
    assert "rank 0 saved at" in (job.logs / "output.log").read_text()
    assert not list(queue.glob("*.requeue"))


def test_a_second_job_waits_in_the_queue_and_says_so(tmp_path: Path) -> None:
    units: list[str] = []
    one = make_job(tmp_path / "one")
    two = make_job(tmp_path / "two", lambda done, total, unit: units.append(unit))
    first, results = in_thread(one, steps=150, launch=ONE_NODE)
    wait_for(lambda: count(one) > 0)
    assert run(two, launch=ONE_NODE)["count"] == 3
    first.join(60)
    assert results[0]["count"] == 150
    assert units[0] == "pending in Slurm's queue"


def test_a_job_whose_follower_was_killed_is_found_again(tmp_path: Path, queue: Path) -> None:
    job = make_job(tmp_path)
    thread, found = in_thread(job, steps=800, launch=ONE_NODE)
    wait_for(lambda: count(job) > 2)
    for pid in processes_of(job.path):
        # Not those that Slurm has started.
        if re.search(rb"tasks\.(supervisor|slurm)", Path(f"/proc/{pid}/cmdline").read_bytes()):
            os.kill(pid, signal.SIGKILL)
    thread.join(60)
    assert found[0].ended.code == ExitCode.FAILED
    assert count(job) < 800, "it goes on by itself"
    assert run(job, steps=800, launch=ONE_NODE)["count"] == 800
    assert len(submitted(queue)) == 1
    assert len(starts(job)) == 1


def test_what_sbatch_refuses_is_said(tmp_path: Path) -> None:
    with pytest.raises(JobFailed, match="invalid partition specified: none") as caught:
        run(make_job(tmp_path), launch={"launcher": "slurm", "slurm": {"partition": "none"}})
    assert not isinstance(caught.value, JobStopped)


def test_without_slurm_the_job_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin")
    with pytest.raises(ValueError, match="sbatch, which is not on the PATH"):
        preflight(LaunchConfig(launcher="slurm"), WORKER, {})
