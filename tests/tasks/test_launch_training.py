"""A real torch job under the launchers: the stage's result does not depend on who starts the ranks."""

from pathlib import Path
from typing import Any

import pytest

from conf.launch import LaunchConfig
from conf.pretrain import PretrainConfig
from conf.shape import ShapeConfig
from storage.store import Store
from storage.tokens import Tokens
from tasks.pretrain import pretrain
from tasks.stage import Job
from tests.model.small_tokens import write_small_tokens
from tests.tasks.launching import processes_of


def train(root: Path, tokens: Tokens, launch: LaunchConfig) -> Job:
    """The stage's function on small data, 12 steps."""
    job = Job(node="pretrain", stage="pretrain", path=root / "attempt", store=Store(root))
    settings = PretrainConfig(
        shape=ShapeConfig(dim=32, layers=2, heads=4, kv_heads=2, context=32),
        tokens=12 * 128,
        batch_tokens=128,
        learning_rate=3e-3,
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
        ("deepspeed", "zero2", "deepspeed.launcher"),
        pytest.param("deepspeed", "zero1", "deepspeed.launcher", marks=pytest.mark.soak),
        pytest.param("deepspeed", "zero3", "deepspeed.launcher", marks=pytest.mark.soak),
        pytest.param("torchrun", "fsdp", "engine fsdp", marks=pytest.mark.soak),
    ],
)
def test_engines_under_their_launchers_give_the_plain_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launcher: Any, engine: Any, sign: str
) -> None:
    monkeypatch.setenv("BESSEMER_HOME", str(tmp_path))
    write_small_tokens(tmp_path / "tokens" / "files")
    tokens = Tokens(tmp_path / "tokens")
    plain = train(tmp_path / "plain", tokens, LaunchConfig(threads=1))
    spread_launch = LaunchConfig(threads=1, launcher=launcher, engine=engine, processes=2)
    spread = train(tmp_path / engine, tokens, spread_launch)
    assert spread.metrics["loss"] == pytest.approx(plain.metrics["loss"], abs=2e-6)
    assert sign in (spread.logs / "output.log").read_text()
    assert (spread.files / "model.safetensors").stat().st_size == (
        plain.files / "model.safetensors"
    ).stat().st_size
