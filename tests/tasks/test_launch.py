"""Torch jobs: started, followed, explained, stopped. All with real processes."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from conf.contract import EXIT, JOB, ExitCode, ExitFile, JobFile
from conf.launch import LaunchConfig
from conf.settings import SourceSpec
from storage.bucket import Bucket
from storage.source import HashCache, resolve
from tasks.follower import CANCEL
from tasks.launch import JobFailed, JobStopped, preflight
from tasks.processes import cores, descendants, interrupt, take_cpu
from tests.tasks.launching import (
    WORKER,
    count,
    make_job,
    processes_of,
    run,
    starts,
    wait_for,
)


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The host's lock of another test or program must not hold these up.
    monkeypatch.setenv("BESSEMER_HOME", str(tmp_path))


def ended(job: Any) -> ExitFile:
    return ExitFile.model_validate_json((job.state / EXIT).read_text())


def test_a_worker_finds_files_of_s3_on_its_machine(s3_server: str, tmp_path: Path) -> None:
    Bucket(f"{s3_server}/{tmp_path.name}").put("own/score.py", b"def score(answer): ...\n")
    (tmp_path / "near.py").write_text("", "utf-8")
    patterns = (f"{s3_server}/{tmp_path.name}/own/*.py", "near.py")
    specs = tuple(SourceSpec(path=path) for path in patterns)
    hashes = HashCache(tmp_path / "hashes.sqlite")
    job = make_job(tmp_path)
    found = resolve(specs, artifacts={}, base=tmp_path, ledger=None, hashes=hashes)
    job.sources = {"functions": found}
    run(job, steps=1)
    told = JobFile.model_validate_json((job.state / JOB).read_text("utf-8"))
    far, near = map(Path, told.sources["functions"])
    assert far.read_bytes() == b"def score(answer): ...\n"
    assert far.is_relative_to(job.state)
    assert near == tmp_path / "near.py"


def test_a_job_returns_its_result_and_shows_progress_and_output(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[tuple[float, float, str]] = []
    job = make_job(tmp_path, lambda *progress: seen.append(progress))
    with caplog.at_level("INFO", "bessemer.counter"):
        assert run(job, steps=4, step_seconds=0.15) == {"count": 4, "threads": "1"}
    assert (job.files / "count.txt").read_text() == "4"
    assert seen[-1] == (4, 4, "steps")
    assert "rank 0 begins at 0" in caplog.messages
    assert ended(job).code == ExitCode.DONE
    assert processes_of(job.path) == []


def test_a_job_that_has_ended_well_is_not_run_again(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    first = run(job)
    assert run(job, launch={"deadline_seconds": 99.0}) == first
    assert len(starts(job)) == 1
    # Other settings are another job: it goes on from what the attempt has saved.
    assert run(job, steps=5)["count"] == 5
    assert len(starts(job)) == 2


def test_threads_divide_the_cores(tmp_path: Path) -> None:
    assert run(make_job(tmp_path), launch={"threads": 0})["threads"] == str(cores())


@pytest.mark.parametrize(
    ("act", "code", "words"),
    [
        ("raise", ExitCode.FAILED, "the worker failed: RuntimeError: 配置错误: the thing broke"),
        ("memory", ExitCode.FAILED, "out of memory"),
        ("import", ExitCode.FAILED, "cannot import a_module_that_is_not_there"),
        ("diverge", ExitCode.DIVERGED, "loss or gradients were not finite"),
        ("kill", ExitCode.FAILED, "was killed (SIGKILL)"),
        ("crash", ExitCode.FAILED, "crashed (SIGSEGV)"),
    ],
)
def test_a_failure_is_explained_and_the_next_run_resumes(
    tmp_path: Path, act: str, code: int, words: str
) -> None:
    job = make_job(tmp_path)
    with pytest.raises(JobFailed) as caught:
        run(job, act=act, act_at=2)
    assert caught.value.ended.code == code
    assert words in caught.value.ended.reason
    assert any(f"about to {act}" in line for line in caught.value.ended.tail) or act in (
        "raise",
        "memory",
        "import",
    )
    assert processes_of(job.path) == []
    assert run(job, act=act, act_at=2)["count"] == 3
    assert "rank 0 begins at 2" in (job.logs / "output.log").read_text()


def test_a_worker_that_ends_without_a_result_has_failed(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    (job.path / "logs").mkdir(parents=True)
    # A folder where the result should go: the worker's last step cannot happen.
    (job.logs / "result.json.0.partial").mkdir()
    with pytest.raises(JobFailed, match="IsADirectoryError"):
        run(job)


def test_a_rank_that_is_killed_takes_the_job_with_it(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    launch = {"processes": 2, "engine": "ddp"}
    with pytest.raises(JobFailed, match=r"rank 1 of 2 was killed \(SIGKILL\)") as caught:
        run(job, act="kill", act_rank=1, steps=500, launch=launch)
    assert any("rank 1 is about to kill" in line for line in caught.value.ended.tail)
    assert processes_of(job.path) == []


def test_exit_codes_survive_torchrun(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    launch = {"processes": 2, "engine": "ddp"}
    with pytest.raises(JobFailed, match="rank 1 of 2 diverged"):
        run(job, act="diverge", act_rank=1, steps=500, launch=launch)
    assert ended(job).code == ExitCode.DIVERGED


@pytest.mark.slow
def test_the_deepspeed_launcher_is_stopped_rank_by_rank(tmp_path: Path) -> None:
    # This launcher does not pass on a request to stop.
    job = make_job(tmp_path)
    launch = {"processes": 2, "engine": "zero2", "launcher": "deepspeed"}
    assert "a checkpoint was saved" in stopped_in_the_middle(job, rank=1, launch=launch).reason


def stopped_in_the_middle(job: Any, *, rank: int = 0, **settings: Any) -> ExitFile:
    """Start a long job, interrupt it as a flow does once the rank has counted a little."""
    caught: list[KeyboardInterrupt] = []

    def follow() -> None:
        try:
            run(job, steps=5000, **settings)
        except KeyboardInterrupt as error:
            caught.append(error)

    follower = threading.Thread(target=follow)
    follower.start()
    # All ranks: one that is still starting has nothing to save.
    wait_for(lambda: all(count(job, other) > 2 for other in range(rank + 1)))
    interrupt(follower.ident or 0)
    follower.join(60)
    assert caught
    assert processes_of(job.path) == []
    return ended(job)


def test_stopping_lets_every_rank_save_and_leaves_no_process(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    caught = stopped_in_the_middle(job, rank=1, launch={"processes": 2, "engine": "ddp"})
    assert caught.code == ExitCode.REQUEUE
    assert "a checkpoint was saved" in caught.reason
    assert "rank 1 saved at" in (job.logs / "output.1.log").read_text()
    reached = count(job, 0)
    run(job, steps=reached + 1)
    assert f"rank 0 begins at {reached}" in (job.logs / "output.log").read_text()


def test_a_job_that_does_not_listen_is_killed_after_the_grace(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    caught = stopped_in_the_middle(job, is_deaf=True, launch={"grace_seconds": 0.3})
    assert "no new checkpoint was saved" in caught.reason


def test_an_exception_in_the_follower_stops_the_job_first(tmp_path: Path) -> None:
    def interrupt(done: float, total: float, unit: str) -> None:
        raise KeyboardInterrupt

    job = make_job(tmp_path, interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(job, steps=5000)
    assert ended(job).code == ExitCode.REQUEUE
    assert processes_of(job.path) == []


@pytest.mark.parametrize(
    ("limit", "error", "words"),
    [
        ({"deadline_seconds": 1.0}, JobStopped, "the deadline of 1 s has passed"),
        ({"stall_seconds": 1.0}, JobFailed, "stood still"),
    ],
)
def test_a_job_past_its_limit_is_ended(
    tmp_path: Path, limit: dict[str, float], error: type[JobFailed], words: str
) -> None:
    job = make_job(tmp_path)
    with pytest.raises(error, match=words):
        run(job, act="hang", is_deaf=True, launch={"grace_seconds": 0.2, **limit})
    assert processes_of(job.path) == []
    assert run(job)["count"] == 3


def test_a_second_job_waits_for_the_processor_and_says_so(tmp_path: Path) -> None:
    lock = take_cpu()
    assert lock is not None
    seen: list[str] = []

    def see(done: float, total: float, unit: str) -> None:
        if not seen:
            time.sleep(0.5)
            lock.release()
        seen.append(unit)

    job = make_job(tmp_path, see)
    assert run(job)["count"] == 3
    assert seen[0] == "waiting for another job"
    assert job.waited_seconds > 0.5
    assert ended(job).waited_seconds == job.waited_seconds


def test_a_waiting_job_can_be_stopped(tmp_path: Path) -> None:
    lock = take_cpu()
    assert lock is not None
    job = make_job(tmp_path, lambda done, total, unit: (job.state / CANCEL).touch())
    with pytest.raises(JobStopped, match="stopped on request"):
        run(job)
    lock.release()
    assert starts(job) == []


def test_two_calls_for_one_attempt_run_one_job(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    results: list[dict[str, Any]] = []
    threads = [
        threading.Thread(target=lambda: results.append(run(job, steps=30))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == [{"count": 30, "threads": "1"}] * 2
    assert len(starts(job)) == 1


def test_a_signal_to_the_supervisor_stops_the_job_in_order(tmp_path: Path) -> None:
    job = make_job(tmp_path)

    asked: list[int] = []

    def stop(done: float, total: float, unit: str) -> None:
        if not asked:  # progress is told again while the job is ending
            guardians = (pid for pid in descendants(os.getpid()) if pid in processes_of(job.path))
            asked.append(next(guardians))
            os.kill(asked[0], signal.SIGTERM)

    job.report_progress = stop
    with pytest.raises(JobStopped, match="a checkpoint was saved"):
        run(job, steps=5000)


@pytest.mark.parametrize(
    ("launch", "words"),
    [
        (LaunchConfig(processes=2), "plain is one process"),
        (LaunchConfig(threads=4096), "threads are more than"),
        (LaunchConfig(device="cuda", processes=4096, engine="ddp"), "CUDA devices"),
    ],
)
def test_an_impossible_launch_is_refused_before_it_starts(launch: LaunchConfig, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        preflight(launch, WORKER, {})


def test_more_processes_than_devices_are_refused_where_the_device_is_found_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in ("tasks.launch", "tasks.processes"):
        monkeypatch.setattr(f"{module}.cuda_devices", lambda: ["0"])
    preflight(LaunchConfig(), WORKER, {})
    with pytest.raises(ValueError, match=r"device=auto .* offers 1 CUDA devices; set .*device=cpu"):
        preflight(LaunchConfig(processes=2, engine="ddp"), WORKER, {})


def test_a_kernel_that_cannot_be_made_here_is_refused_before_it_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", "")
    launch = LaunchConfig(engine="zero3", adamw="deepspeed", device="cpu")
    with pytest.raises(ValueError, match=r"needs a C\+\+ compiler .* set launch\.adamw=torch"):
        preflight(launch, WORKER, {})


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("one slots=2\n", r"names 1 hosts, launch\.nodes=2"),
        ("one slots=2\ntwo slots=1\n", r"gives two 1 slots, launch\.processes=2"),
        ("one slots=2\ntwo 2\n", "'two 2' is not `HOST slots=N`"),
    ],
)
def test_a_host_file_that_does_not_fit_is_refused(tmp_path: Path, lines: str, words: str) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text(lines, "utf-8")
    launch = LaunchConfig(
        launcher="deepspeed", engine="zero1", nodes=2, processes=2, hostfile=str(hosts)
    )
    with pytest.raises(ValueError, match=words):
        preflight(launch, WORKER, {})


def test_an_unknown_worker_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no module tests\.tasks\.workers\.nobody"):
        preflight(LaunchConfig(), "tests.tasks.workers.nobody", {})


@pytest.mark.parametrize("module", ["tasks.supervisor", "tasks.rank", "tasks.tracking"])
def test_the_processes_around_a_job_load_nothing_heavy(module: str) -> None:
    heavy = ("torch", "mlflow", "prefect", "polars", "pyarrow", "numpy")
    look = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", look], capture_output=True, check=True)
    assert answer.stdout == b"[]\n"


def test_the_process_tree_is_seen_whole() -> None:
    begin = time.process_time()
    assert os.getpid() in descendants(os.getppid())
    assert time.process_time() - begin < 1
