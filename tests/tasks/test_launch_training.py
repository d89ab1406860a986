"""A real torch job under the launchers: the stage's result does not depend on who starts the ranks."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from conf.contract import ExitCode
from conf.launch import LaunchConfig
from conf.pretrain import PretrainConfig
from conf.shape import ShapeConfig
from storage.store import Store
from storage.tokens import Tokens
from tasks.launch import JobFailed, JobStopped, run_worker
from tasks.pretrain import pretrain
from tasks.stage import Job
from tests.model.small_tokens import write_small_tokens
from tests.tasks.launching import install_ssh, make_job, processes_of, run

MARKED = "tests.tasks.workers.marked_pretrain"


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Tokens:
    folder = tmp_path_factory.mktemp("tokens")
    write_small_tokens(folder / "files")
    return Tokens(folder)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BESSEMER_HOME", str(tmp_path))


def train(root: Path, tokens: Tokens, launch: LaunchConfig, rate: float = 3e-3) -> Job:
    """The stage's function on small data, 12 steps."""
    job = Job(node="pretrain", stage="pretrain", path=root / "attempt", store=Store(root))
    settings = PretrainConfig(
        shape=ShapeConfig(dim=32, layers=2, heads=4, kv_heads=2, context=32),
        tokens=12 * 128,
        batch_tokens=128,
        learning_rate=rate,
        evaluate_every_steps=0,
        launch=launch,
    )
    pretrain(job, tokens=tokens, settings=settings)
    assert processes_of(job.path) == []
    return job


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "engine", "sign"),
    [
        ("torchrun", "fsdp", "engine fsdp"),
        ("deepspeed", "zero2", "deepspeed.launcher"),
        ("slurm", "ddp", "[slurm] batch job"),
        pytest.param("deepspeed", "zero1", "deepspeed.launcher", marks=pytest.mark.soak),
        pytest.param("deepspeed", "zero3", "deepspeed.launcher", marks=pytest.mark.soak),
    ],
)
def test_two_jobs_at_once_of_which_one_is_stopped_and_killed_end_with_the_same_bits(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tokens: Tokens,
    queue: Path,
    launcher: Any,
    engine: Any,
    sign: str,
) -> None:
    def run_marked(job: Job, module: str, *rest: Any) -> dict[str, Any]:
        return run_worker(job, MARKED if "marked" in job.path.parts else module, *rest)

    monkeypatch.setattr("tasks.pretrain.run_worker", run_marked)
    launch = LaunchConfig(threads=1, launcher=launcher, engine=engine, processes=2)
    with ThreadPoolExecutor(1) as pool:
        unbroken = pool.submit(train, tmp_path / "whole", tokens, launch)
        with pytest.raises(JobStopped, match="a checkpoint was saved"):
            train(tmp_path / "marked", tokens, launch)
        with pytest.raises(JobFailed, match="was killed"):
            train(tmp_path / "marked", tokens, launch)
        marked, whole = train(tmp_path / "marked", tokens, launch), unbroken.result()
    plain = train(tmp_path / "plain", tokens, LaunchConfig(threads=1))
    assert whole.metrics["loss"] == pytest.approx(plain.metrics["loss"], abs=2e-6)
    assert sign in (whole.logs / "output.log").read_text()
    bits = [
        hashlib.sha256((job.files / "model.safetensors").read_bytes()).hexdigest()
        for job in (whole, marked)
    ]
    assert bits[0] == bits[1]


@pytest.mark.slow
def test_a_host_file_gives_the_loss_of_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokens: Tokens
) -> None:
    hostfile = install_ssh(tmp_path, monkeypatch)
    plain = train(tmp_path / "plain", tokens, LaunchConfig(threads=1))
    launch = LaunchConfig(
        threads=1,
        launcher="deepspeed",
        engine="zero2",
        nodes=2,
        hostfile=str(hostfile),
        environment={"GLOO_SOCKET_IFNAME": "lo"},
    )
    spread = train(tmp_path / "spread", tokens, launch)
    assert spread.metrics["loss"] == pytest.approx(plain.metrics["loss"], abs=2e-6)
    output = (spread.logs / "output.log").read_text()
    assert "--node_rank=1" in output
    assert (tmp_path / "127.0.0.2" / "bessemer-cpu.lock").exists(), (
        "the other host has its own lock"
    )


@pytest.mark.soak
def test_a_training_that_diverges_says_so_and_names_its_samples(
    tmp_path: Path, tokens: Tokens
) -> None:
    with pytest.raises(JobFailed, match="loss or gradients were not finite") as caught:
        train(tmp_path, tokens, LaunchConfig(threads=1), rate=1e30)
    assert caught.value.ended.code == ExitCode.DIVERGED
    assert any("its samples were" in line for line in caught.value.ended.tail)


@pytest.mark.soak
def test_a_host_that_cannot_be_reached_ends_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hostfile = install_ssh(tmp_path, monkeypatch)
    (tmp_path / "bin" / "ssh").write_text("#!/bin/sh\necho Permission denied >&2\nexit 255\n")
    job = make_job(tmp_path)
    launch = {"launcher": "deepspeed", "engine": "zero1", "nodes": 2, "hostfile": str(hostfile)}
    with pytest.raises(JobFailed, match=r"the job's part on 127\.0\.0\.2 has failed") as caught:
        run(job, steps=100_000, launch=launch)
    assert "Permission denied" in caught.value.ended.tail
    assert processes_of(job.path) == []
