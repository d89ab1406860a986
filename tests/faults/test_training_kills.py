"""Pretraining through the store, with every process killed in the middle."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conf.launch import LaunchConfig
from conf.pretrain import PretrainConfig
from conf.settings import Settings
from conf.shape import ShapeConfig
from storage.artifact import Artifact
from storage.store import Store
from storage.tokens import Tokens
from tasks.pretrain import pretrain
from tasks.stage import Job, Outcome, execute, stage
from tests.model.small_jobs import finish, start, write_job
from tests.model.small_tokens import write_small_tokens
from tests.tasks.launching import processes_of, wait_for

ROOT = Path(__file__).resolve().parents[2]

SETTINGS = PretrainConfig(
    shape=ShapeConfig(dim=32, layers=2, heads=4, kv_heads=2, context=32, dropout=0.1),
    tokens=160 * 128,
    batch_tokens=128,
    learning_rate=3e-3,
    evaluate_every_steps=0,
    checkpoint_every_steps=10,
    launch=LaunchConfig(threads=1),
)


class SmallConfig(Settings):
    """Nothing to choose."""


@stage(version=1)
def small_tokens(job: Job, settings: SmallConfig) -> Tokens:
    """A small bilingual corpus as tokens."""
    write_small_tokens(job.files)
    return Tokens(job.path)


def build(root: Path) -> Outcome:
    """Both stages, as a flow runs them."""
    store = Store(root)
    inputs: dict[str, Artifact] = {}
    for mark, settings in ((small_tokens, SmallConfig()), (pretrain, SETTINGS)):
        spec = mark.spec  # type: ignore[attr-defined]
        outcome = execute(
            spec,
            node=spec.name,
            settings=settings,
            inputs=inputs,
            sources={},
            store=store,
            workers=1,
        )
        inputs = {"tokens": outcome.artifact}
    return outcome


FLOW = """
import sys
from pathlib import Path
from tests.faults.test_training_kills import build
build(Path(sys.argv[1]))
"""


def steps_of(attempt: Path) -> int:
    path = attempt / "logs" / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def run_and_kill_all(root: Path, step: int) -> Path:
    """Start a flow, wait until its job is some steps on, kill -9 every process of both."""
    flow = subprocess.Popen(
        [sys.executable, "-c", FLOW, str(root)], cwd=ROOT, start_new_session=True
    )
    wait_for(lambda: any(steps_of(path) > step for path in root.glob("attempts/*/*")), 60)
    attempt = next(path for path in root.glob("attempts/*/*") if steps_of(path) > step)
    os.killpg(flow.pid, signal.SIGKILL)
    for pid in processes_of(attempt):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            # Its own guardian or launcher has taken it along.
            continue
    flow.wait()
    wait_for(lambda: not processes_of(attempt))
    return attempt


# Short form: test_run_faults.py kills it once.
@pytest.mark.soak
def test_everything_killed_twice_gives_the_weights_of_an_unbroken_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BESSEMER_HOME", str(tmp_path))
    unbroken = build(tmp_path / "unbroken")
    killed = tmp_path / "killed"
    first = run_and_kill_all(killed, 30)
    assert run_and_kill_all(killed, steps_of(first) + 30) == first
    resumed = build(killed)
    assert resumed.status == "built"
    assert resumed.record.fingerprint == unbroken.record.fingerprint
    assert resumed.record.digest == unbroken.record.digest
    # No step twice and none left out, although each kill cost the steps since a checkpoint.
    for outcome in (unbroken, resumed):
        assert steps_of(outcome.artifact.path) == steps_of(unbroken.artifact.path) >= 160


# Almost all of the time of so small a model goes into its checkpoints.
BUSY = SETTINGS.model_copy(update={"checkpoint_every_steps": 1, "tokens": 80 * 128})
BESIDE = BUSY.launch.model_copy(update={"checkpoints_beside": "always"})


def kill_once(job: Path, source: random.Random, *, in_write: bool) -> None:
    """Start the worker, let it get a step further, and kill it: at a random moment, or while it writes a
    checkpoint."""
    attempt = job.parents[1]
    begun = steps_of(attempt)
    [worker] = start("model.pretrain", job)
    wait_for(lambda: steps_of(attempt) > begun)
    if in_write:
        while not list((attempt / "state" / "checkpoints").glob("draft_*")):
            assert worker.poll() is None, "it ended before it wrote"
    time.sleep(source.uniform(0, 0.002 if in_write else 0.02))
    worker.kill()
    worker.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("kills", [2, pytest.param(30, marks=pytest.mark.soak)])
def test_killed_at_random_moments_it_ends_with_the_same_bytes(tmp_path: Path, kills: int) -> None:
    tokens = write_small_tokens(tmp_path / "tokens")
    unbroken, broken = (
        write_job(
            tmp_path / name,
            "pretrain",
            BUSY.model_copy(update={"launch": launch}),
            {"tokens": tokens},
            launch,
        )
        for name, launch in (("unbroken", BUSY.launch), ("broken", BESIDE))
    )
    finish(start("model.pretrain", unbroken))
    seed = random.randrange(1 << 30)
    source = random.Random(seed)
    drafts = 0
    for number in range(kills):
        kill_once(broken, source, in_write=number % 2 == 0)
        drafts += bool(list((tmp_path / "broken/state/checkpoints").glob("draft_*")))
    assert not (tmp_path / "broken/logs/result.json").exists(), "it ended before its last death"
    finish(start("model.pretrain", broken))
    last = f"state/checkpoints/step_{80:09d}"
    for name in ("files/model.safetensors", f"{last}/optimizer/00000.safetensors"):
        whole, mended = (tmp_path / folder / name for folder in ("unbroken", "broken"))
        assert whole.read_bytes() == mended.read_bytes(), f"{name} after {kills} kills, seed {seed}"
    assert drafts >= kills // 4, "hardly a kill met a checkpoint that was being written"
