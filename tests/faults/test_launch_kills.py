"""kill -9 of the flow, of the supervisor, of the guardian: what goes on, what ends, what resumes."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from conf.contract import EXIT, ExitFile
from conf.launch import LaunchConfig
from storage.store import Store
from tasks.follower import FOLLOWERS, newest_attempt
from tasks.launch import JobFailed
from tasks.processes import interrupt, is_alive
from tasks.stage import execute
from tests.tasks.launching import (
    CounterConfig,
    count,
    counter,
    make_job,
    processes_of,
    run,
    starts,
    wait_for,
)

ROOT = Path(__file__).resolve().parents[2]

FLOW = """
import sys
from pathlib import Path
from tests.faults.test_launch_kills import build
build(Path(sys.argv[1]), steps=int(sys.argv[2]), orphan_seconds=float(sys.argv[3]))
"""


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BESSEMER_HOME", str(tmp_path))


def build(root: Path, *, steps: int, orphan_seconds: float = 60.0, **more: Any) -> Any:
    """The counter stage through the store, as a flow runs it."""
    launch = LaunchConfig(threads=1, orphan_seconds=orphan_seconds)
    settings = CounterConfig(steps=steps, step_seconds=0.02, launch=launch)
    spec = counter.spec  # type: ignore[attr-defined]
    return execute(
        spec,
        node="counter",
        settings=settings,
        inputs={},
        sources={},
        store=Store(root),
        workers=1,
        **more,
    )


def start_flow(
    root: Path, steps: int, orphan_seconds: float = 60.0
) -> "tuple[subprocess.Popen[bytes], Path]":
    """A flow in a process of its own, and the attempt it works on, once its worker counts."""
    flow = subprocess.Popen(
        [sys.executable, "-c", FLOW, str(root), str(steps), str(orphan_seconds)],
        cwd=ROOT,
        start_new_session=True,
    )
    attempts = root / "attempts"
    wait_for(lambda: any(attempts.glob("*/*/state/count.0")))
    fingerprint = next(attempts.glob("*/*/state/count.0")).parents[2].name
    attempt = newest_attempt(root, fingerprint)
    assert attempt is not None
    return flow, attempt


def kill_flow(flow: "subprocess.Popen[bytes]") -> None:
    """kill -9 of the flow's whole process group."""
    os.killpg(flow.pid, signal.SIGKILL)
    flow.wait()


def test_a_killed_flow_leaves_its_job_running_and_the_next_flow_joins_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flow, attempt = start_flow(tmp_path / "store", 200)
    kill_flow(flow)
    workers = (attempt / "logs/started.0").read_text().split()
    assert is_alive(int(workers[0]))
    seen: list[float] = []
    with caplog.at_level("INFO", "bessemer.counter"):
        outcome = build(
            tmp_path / "store",
            steps=200,
            report_progress=lambda done, total, unit: seen.append(done),
        )
    assert outcome.record.metrics["count"] == 200
    assert (outcome.artifact.logs / "started.0").read_text().split() == workers
    assert "already being built by another process; following it" in caplog.messages
    assert seen
    assert 0 < seen[0] < 200


def test_a_job_that_ended_alone_is_not_run_again(tmp_path: Path) -> None:
    flow, attempt = start_flow(tmp_path / "store", 20)
    kill_flow(flow)
    wait_for(lambda: (attempt / "state" / EXIT).exists() and not processes_of(attempt))
    outcome = build(tmp_path / "store", steps=20)
    assert outcome.record.metrics["count"] == 20
    assert len((outcome.artifact.logs / "started.0").read_text().split()) == 1


def test_a_job_that_nobody_follows_ends_after_a_while_and_can_be_resumed(tmp_path: Path) -> None:
    flow, attempt = start_flow(tmp_path / "store", 180, orphan_seconds=1.5)
    kill_flow(flow)
    wait_for(lambda: (attempt / "state" / EXIT).exists() and not processes_of(attempt))
    ended = ExitFile.model_validate_json((attempt / "state" / EXIT).read_text())
    assert "nobody has followed the job" in ended.reason
    assert "a checkpoint was saved" in ended.reason
    reached = int((attempt / "state/count.0").read_text())
    assert 0 < reached < 180
    assert build(tmp_path / "store", steps=180).record.metrics["count"] == 180


def join_and_interrupt(root: Path, attempt: Path, *, steps: int) -> None:
    """Follow a job that another flow started, then be interrupted as a cancelled flow is."""
    caught: list[KeyboardInterrupt] = []

    def follow() -> None:
        try:
            build(root, steps=steps)
        except KeyboardInterrupt as error:
            caught.append(error)

    joined = threading.Thread(target=follow)
    joined.start()
    wait_for(lambda: len(list((attempt / "state" / FOLLOWERS).iterdir())) == 2)
    interrupt(joined.ident or 0)
    joined.join(60)
    assert caught


def test_a_flow_that_joined_stops_the_job_when_it_is_stopped(tmp_path: Path) -> None:
    flow, attempt = start_flow(tmp_path / "store", 5000)
    kill_flow(flow)
    join_and_interrupt(tmp_path / "store", attempt, steps=5000)
    wait_for(lambda: not processes_of(attempt))


def test_a_follower_that_leaves_does_not_stop_the_job_of_another(tmp_path: Path) -> None:
    flow, attempt = start_flow(tmp_path / "store", 200)
    join_and_interrupt(tmp_path / "store", attempt, steps=200)
    assert flow.wait(30) == 0


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("victim", ["supervisor", "guardian", "both"])
def test_no_rank_outlives_its_supervisor(tmp_path: Path, victim: str, processes: int) -> None:
    job = make_job(tmp_path)
    launch = {"processes": processes, "engine": "ddp" if processes == 2 else "plain"}
    errors: list[JobFailed] = []

    def follow() -> None:
        try:
            run(job, steps=5000, is_deaf=victim != "guardian", launch=launch)
        except JobFailed as error:
            errors.append(error)

    follower = threading.Thread(target=follow)
    follower.start()
    wait_for(lambda: count(job, processes - 1) > 2)
    guardian, supervisor = supervising(job.path)
    for pid in {"supervisor": [supervisor], "guardian": [guardian]}.get(
        victim, [guardian, supervisor]
    ):
        os.kill(pid, signal.SIGKILL)
    follower.join(60)
    wait_for(lambda: not processes_of(job.path))
    # A process that has just ended is still there until its new parent looks.
    wait_for(
        lambda: not any(is_alive(pid) for rank in range(processes) for pid in starts(job, rank))
    )
    assert {
        "supervisor": "the supervisor was killed (SIGKILL)",
        "guardian": "stopped on request; a checkpoint was saved",
        "both": "guardian and supervisor were both killed",
    }[victim] in errors[0].ended.reason
    reached = count(job)
    assert run(job, steps=reached + 1)["count"] == reached + 1


def supervising(attempt: Path) -> tuple[int, int]:
    """The pids of guardian and supervisor of an attempt's job."""
    lines = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in processes_of(attempt)}
    pair = [pid for pid, line in lines.items() if b"tasks.supervisor" in line]
    parents = {pid: int(Path(f"/proc/{pid}/stat").read_text().split()[3]) for pid in pair}
    child = next(pid for pid in pair if parents[pid] in pair)
    return parents[child], child
