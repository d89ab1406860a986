"""The worker of SFT: it learns answers, holds rows out, and resumes bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch

from conf.sft import SftConfig
from model.dialogues import Dialogue
from model.sft import sft_batch, step_loss, work
from model.transformer import Transformer
from model.weights import load_model
from tests.model.small_world import (
    SHAPE,
    kill_at,
    make_job,
    metrics,
    run_here,
    same_metrics,
    write_world,
)

SETTINGS = SftConfig(epochs=40, batch_rows=8, learning_rate=1e-2, evaluate_every_steps=60)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("world")
    write_world(folder)
    return folder


def inputs(world: Path) -> dict[str, Path]:
    return {name: world / name for name in ("policy", "conversations")}


def test_answers_are_learnt_and_held_out_rows_are_not_seen(world: Path, tmp_path: Path) -> None:
    job = make_job(tmp_path, "sft", SETTINGS, inputs(world))
    figures = run_here(work, job)
    # 24 facts x 4, 5 facts held out: 76 to learn from, 40 epochs of 9.5 steps.
    assert figures["train"] == {"rows": 76, "shortened": 0, "left_out": 0}
    assert (figures["steps"], figures["epochs"], figures["held_rows"]) == (380, 40.0, 20)
    lines = metrics(job)
    assert lines[0]["step"] == 0
    assert lines[0]["held_loss"] == pytest.approx(6.0, abs=0.3)  # near log of the vocabulary
    assert figures["loss"] < 0.6
    assert set(figures) >= {"held_loss", "held_loss/en", "held_loss/zh", "held_tokens"}
    assert load_model(job.files).vocabulary == load_model(world / "policy").vocabulary


def test_rows_without_an_answer_to_learn_give_no_loss_and_no_gradient() -> None:
    model = Transformer(SHAPE, 40, seed=1)
    batch = sft_batch([Dialogue([5, 6, 7], [False] * 3, "a", "")] * 2)
    loss = step_loss(SftConfig())(model, batch, {"tokens": 0.0})["loss"]
    assert loss.item() == 0.0
    loss.backward()
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("prompt_attention", ["causal", "both_ways"])
def test_the_gradient_of_the_loss_is_right(prompt_attention: Any) -> None:
    model = Transformer(
        SHAPE.model_copy(update={"dim": 8, "layers": 1, "ffn": 8}), 12, seed=1
    ).double()
    rows = [
        Dialogue([5, 6, 7, 8], [False, False, True, True], "a", ""),
        Dialogue([9, 4], [False, True], "b", ""),
    ]
    batch = sft_batch(rows)
    loss = step_loss(SftConfig(prompt_attention=prompt_attention))
    loss(model, batch, batch.weights)["loss"].backward()
    source = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        assert parameter.grad is not None
        way = torch.randn(parameter.shape, dtype=torch.float64, generator=source)
        slope = float((way * parameter.grad).sum())
        values: list[float] = []
        for step in (1e-3, -1e-3):
            with torch.no_grad():
                parameter.add_(step * way)
                values.append(loss(model, batch, batch.weights)["loss"].item())
                parameter.sub_(step * way)
        # Log-probabilities are float32 by design, which sets how fine the difference can be.
        assert slope == pytest.approx((values[0] - values[1]) / 2e-3, rel=3e-2, abs=2e-3)


def test_other_ways_to_learn_run(world: Path, tmp_path: Path) -> None:
    for number, changes in enumerate((
        {"learn_from": "last_answer"}, {"learn_from": "each_answer_alone"},
        {"prompt_attention": "both_ways"}, {"withheld_share": 0.3},
    )):  # fmt: skip
        settings = SETTINGS.model_copy(update={"max_steps": 30, **changes})
        job = make_job(tmp_path / str(number), "sft", settings, inputs(world))
        figures = run_here(work, job)
        losses = [line["loss"] for line in metrics(job) if "loss" in line]
        assert losses[-1] < 0.7 * losses[0]
        # 24 facts four times; conversations here have one answer each, five facts are held out.
        assert (figures["train"]["rows"] < 76) == ("withheld_share" in changes)


def test_the_same_job_gives_the_same_bytes(world: Path, tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"max_steps": 5})
    jobs = [make_job(tmp_path / str(n), "sft", settings, inputs(world)) for n in range(2)]
    for job in jobs:
        run_here(work, job)
    first, second = ((job.files / "model.safetensors").read_bytes() for job in jobs)
    assert first == second


def test_micro_batches_change_nothing_but_rounding(world: Path, tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"max_steps": 5})
    losses: list[list[float]] = []
    for size in (0, 3):
        job = make_job(tmp_path / str(size), "sft", settings, inputs(world))
        launch = job.launch.model_copy(update={"micro_batch": size})
        run_here(work, job.model_copy(update={"launch": launch}))
        losses.append([line["loss"] for line in metrics(job) if "loss" in line])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.slow
def test_killed_twice_it_ends_with_the_same_bytes(world: Path, tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"checkpoint_every_steps": 8, "max_steps": 120})
    whole = make_job(tmp_path / "whole", "sft", settings, inputs(world))
    run_here(work, whole)
    job = make_job(tmp_path / "killed", "sft", settings, inputs(world))
    for lines in (7, 40):
        kill_at(job, lines)
    run_here(work, job)
    assert (job.files / "model.safetensors").read_bytes() == (
        whole.files / "model.safetensors"
    ).read_bytes()
    assert same_metrics(job) == same_metrics(whole)


def test_no_conversation_that_fits_is_a_clear_error(world: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for split in ("train", "held"):
        (tmp_path / "empty" / f"{split}.jsonl").write_text("", "utf-8")
    settings = SftConfig()
    job = make_job(
        tmp_path, "sft", settings, {**inputs(world), "conversations": tmp_path / "empty"}
    )
    with pytest.raises(ValueError, match="no row is left to train on"):
        run_here(work, job)


def test_no_held_out_rows_and_one_conversation_work(world: Path, tmp_path: Path) -> None:
    folder = tmp_path / "one"
    folder.mkdir()
    first = (world / "conversations" / "train.jsonl").read_text("utf-8").splitlines()[0]
    (folder / "train.jsonl").write_text(first + "\n", "utf-8")
    (folder / "held.jsonl").write_text("", "utf-8")
    job = make_job(
        tmp_path, "sft", SftConfig(max_steps=2), {**inputs(world), "conversations": folder}
    )
    figures = run_here(work, job)
    assert figures["held_rows"] == 0
    assert "held_loss" not in figures
