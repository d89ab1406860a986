"""The pretraining worker in real processes: engines agree, kill -9 and resume give the same bits."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from conf.contract import ExitCode
from conf.curriculum import CurriculumConfig
from conf.launch import LaunchConfig
from conf.pretrain import PhaseConfig, PretrainConfig
from conf.shape import ShapeConfig
from storage.checkpoint import ModelCard
from tests.model.small_jobs import ROOT, finish, start, write_job
from tests.model.small_tokens import documents, write_small_tokens

# Everything that could break a resume is on: dropout, two phases, accumulation, held-out looks, rows that
# grow, labels that come later, windows in the order of the model's own loss from step 9 on.
SETTINGS = PretrainConfig(
    shape=ShapeConfig(dim=32, layers=2, heads=4, kv_heads=2, context=32, dropout=0.1),
    tokens=30 * 256,
    batch_tokens=256,
    learning_rate=3e-3,
    phases=(
        PhaseConfig(tokens=0.6, mix={"en": 0.7, "zh": 0.3}),
        PhaseConfig(tokens=0.4, mix={"zh": 1.0}),
    ),
    curriculum=CurriculumConfig(
        competence="sqrt", perplexity_at=0.3, until=0.8, first_row_tokens=8, first_vocabulary=0.3
    ),
    evaluate_every_steps=10,
    checkpoint_every_steps=4,
)
LAUNCHES = {
    "plain": LaunchConfig(threads=1, micro_batch=3),
    "ddp": LaunchConfig(threads=1, micro_batch=3, engine="ddp", processes=2),
    "fsdp": LaunchConfig(threads=1, micro_batch=3, engine="fsdp", processes=2),
    "zero1": LaunchConfig(threads=1, micro_batch=3, engine="zero1", processes=2),
    "zero2": LaunchConfig(threads=1, micro_batch=3, engine="zero2", processes=2),
    "zero3": LaunchConfig(threads=1, micro_batch=3, engine="zero3", processes=2),
}


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_tokens(tmp_path_factory.mktemp("tokens"))


def begin(attempt: Path, tokens: Path, engine: str, settings: PretrainConfig = SETTINGS) -> Any:
    launch = LAUNCHES[engine]
    job = write_job(attempt, "pretrain", settings, {"tokens": tokens}, launch)
    return start("model.pretrain", job, processes=launch.processes)


def metrics(attempt: Path) -> list[dict[str, float]]:
    path = attempt / "logs" / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def losses(attempt: Path) -> list[float]:
    return [line["loss"] for line in metrics(attempt) if "loss" in line]


def wait_for_step(attempt: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while len(metrics(attempt)) <= step:
        assert time.monotonic() < deadline, "the job does not move"
        time.sleep(0.002)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, tokens: Path) -> Callable[[str], Path]:
    """One finished attempt of an engine, made when it is first asked for."""

    @cache
    def attempt(engine: str) -> Path:
        folder = tmp_path_factory.mktemp(engine)
        finish(begin(folder, tokens, engine))
        return folder

    return attempt


@pytest.mark.slow
@pytest.mark.parametrize(
    "engine",
    [
        "plain",
        # Short form for these: test_engines.py, where dying is an exception.
        *(pytest.param(name, marks=pytest.mark.soak) for name in LAUNCHES if name != "plain"),
    ],
)
def test_killed_anywhere_and_run_again_gives_the_same_bits(
    unbroken: Callable[[str], Path], tmp_path: Path, tokens: Path, engine: str
) -> None:
    attempt, other = tmp_path / "attempt", tmp_path / "other"
    ranks = begin(attempt, tokens, engine)
    wait_for_step(attempt, random.randint(1, 25))
    for rank in ranks:
        rank.send_signal(signal.SIGKILL)
    finish(ranks, code=-signal.SIGKILL)
    shutil.copytree(attempt, other)
    finish(begin(attempt, tokens, engine))
    one, two = (path / "files" / "model.safetensors" for path in (unbroken(engine), attempt))
    assert one.read_bytes() == two.read_bytes()
    assert [line["step"] for line in metrics(attempt)] == list(range(31))
    # A checkpoint has one form: the plain engine goes on from what any of them wrote.
    finish(begin(other, tokens, "plain"))
    assert losses(other) == pytest.approx(losses(unbroken("plain")), abs=2e-6)


@pytest.mark.slow
def test_a_request_to_stop_saves_and_asks_to_be_started_again(
    unbroken: Callable[[str], Path], tmp_path: Path, tokens: Path
) -> None:
    ranks = begin(tmp_path, tokens, "plain")
    wait_for_step(tmp_path, 5)
    ranks[0].send_signal(signal.SIGTERM)
    output = finish(ranks, code=ExitCode.REQUEUE)
    assert "which was saved; run again" in output
    finish(begin(tmp_path, tokens, "plain"))
    assert losses(tmp_path) == losses(unbroken("plain"))


@pytest.mark.slow
def test_it_learns_and_says_what_it_did(unbroken: Callable[[str], Path]) -> None:
    attempt = unbroken("plain")
    result = json.loads((attempt / "logs" / "result.json").read_text())
    held = [line["held_loss/en"] for line in metrics(attempt) if "held_loss/en" in line]
    assert held[-1] < held[0] - 1
    # 30 steps of 8 rows: 60 % of them hold 0.7 en, 0.3 zh; the others zh alone.
    assert result["steps"] == 30
    assert result["tokens"] == 30 * 256
    assert result["parameters"] == SETTINGS.shape.parameters(
        ModelCard.read(attempt / "files").vocabulary
    )
    assert result["held_loss/en"] == held[-1]
    assert "product of 1024 x 1024 matrices" in result["peak_source"]
    told = {
        "lr",
        "gradient_norm",
        "tokens_per_second",
        "mfu",
        "data_wait_share",
        "peak_memory_bytes",
    }
    assert all(told <= line.keys() for line in metrics(attempt) if line["step"])
    assert (attempt / "files" / "tokenizer" / "tokenizer.json").is_file()
    assert load_file(attempt / "files" / "model.safetensors")[
        "embedding.weight"
    ].dtype.is_floating_point


def test_a_worker_imports_nothing_of_the_orchestration() -> None:
    program = (
        "import sys, model.pretrain, model.convert\n"
        "heavy = {'pyarrow', 'polars', 'prefect', 'mlflow', 'xxhash', 'transformers', 'deepspeed'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert ended.stdout.strip() == "[]"


def test_a_learning_rate_that_explodes_ends_as_diverged(tmp_path: Path, tokens: Path) -> None:
    wild = {"learning_rate": 1e38, "schedule": "constant", "warmup": 0.0, "evaluate_every_steps": 0}
    ranks = begin(tmp_path, tokens, "plain", SETTINGS.model_copy(update=wild))
    output = finish(ranks, code=ExitCode.DIVERGED)
    assert "of 5 such steps in a row; its samples were" in output
    assert not (tmp_path / "logs" / "result.json").exists()


def test_empty_data_is_refused_in_words(tmp_path: Path) -> None:
    empty = {domain: {"train": [], "held": []} for domain in ("en", "zh")}
    tokens = write_small_tokens(tmp_path / "tokens", empty)
    output = finish(begin(tmp_path / "attempt", tokens, "plain"), code=1)
    assert "no domain has the 32 training tokens of one row" in output


def test_one_document_without_held_out_text_trains(tmp_path: Path) -> None:
    text = documents(1)["zh"]["train"] * 3
    tokens = write_small_tokens(tmp_path / "tokens", {"zh": {"train": text, "held": []}})
    settings = SETTINGS.model_copy(update={"phases": (), "tokens": 512})
    finish(begin(tmp_path / "attempt", tokens, "plain", settings))
    assert not any("held_loss/zh" in line for line in metrics(tmp_path / "attempt"))


def test_a_policy_can_be_continued_and_a_foreign_shape_is_refused(
    tmp_path: Path, tokens: Path
) -> None:
    from model.pretrain import build_model
    from model.transformer import Transformer
    from model.weights import save_model
    from storage.tokens import TokenFiles

    files = TokenFiles(tokens)
    first = Transformer(SETTINGS.shape, files.meta.vocabulary, seed=77)
    save_model(tmp_path, first, role="policy", tokenizer=tokens / "tokenizer")
    continued = build_model(SETTINGS, files, str(tmp_path))
    assert continued.embedding.weight.equal(first.embedding.weight)
    other = SETTINGS.model_copy(update={"shape": ShapeConfig(dim=64, layers=2, context=32)})
    with pytest.raises(ValueError, match="give the settings the policy's shape"):
        build_model(other, files, str(tmp_path))
