"""The DPO worker: losses by hand, the reference computed once, what it learns, resume."""

from math import exp, log
from pathlib import Path
from typing import Any

import pytest
import torch

from conf.dpo import DpoConfig
from model.dpo import GateClosed, dpo_loss, work
from model.weights import load_tensors
from tests.model.small_world import (
    kill_at,
    make_job,
    metrics,
    run_here,
    same_metrics,
    write_world,
)

SETTINGS = DpoConfig(
    epochs=4, batch_rows=8, learning_rate=3e-3, rpo_alpha=0.2, evaluate_every_steps=10
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("world")
    write_world(folder)
    return folder


def inputs(world: Path) -> dict[str, Path]:
    return {name: world / name for name in ("policy", "preferences")}


def changed(**changes: Any) -> DpoConfig:
    return SETTINGS.model_copy(update=changes)


def one(*values: float) -> list[torch.Tensor]:
    return [torch.tensor([value]) for value in values]


def test_one_pair_by_hand() -> None:
    # gain = (-1 - -2) - (-5 - -3) = 3;  loss = log(1 + e^-(0.5 * 3))
    loss = dpo_loss(*one(-1.0, -5.0, -2.0, -3.0), beta=0.5)
    assert loss.item() == pytest.approx(log(1 + exp(-1.5)))
    # hinge: 1 - 0.5 * 3 is below 0;  ipo: (3 - 1 / (2 * 0.5))^2
    assert dpo_loss(*one(-1.0, -5.0, -2.0, -3.0), beta=0.5, loss="hinge").item() == 0.0
    assert dpo_loss(*one(-1.0, -5.0, -2.0, -3.0), beta=0.5, loss="ipo").item() == pytest.approx(4.0)


def test_a_policy_that_is_its_reference_has_loss_log_2() -> None:
    assert dpo_loss(*one(-3.0, -9.0, -3.0, -9.0), beta=0.1).item() == pytest.approx(log(2))


def test_smoothing_mixes_in_the_other_order() -> None:
    right, wrong = log(1 + exp(-1.5)), log(1 + exp(1.5))
    loss = dpo_loss(*one(-1.0, -5.0, -2.0, -3.0), beta=0.5, label_smoothing=0.1)
    assert loss.item() == pytest.approx(0.9 * right + 0.1 * wrong)


def test_different_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="one is expected"):
        dpo_loss(torch.zeros(2), torch.zeros(2), torch.zeros(1), torch.zeros(2), beta=0.1)


def test_smoothing_without_a_meaning_is_refused() -> None:
    with pytest.raises(ValueError, match="no meaning for loss=ipo"):
        DpoConfig(loss="ipo", label_smoothing=0.1)


def test_it_prefers_the_better_answers_of_held_out_pairs(world: Path, tmp_path: Path) -> None:
    job = make_job(tmp_path, "dpo", SETTINGS, inputs(world))
    figures = run_here(work, job)
    lines = metrics(job)
    # Before the first step the policy is its reference: rewards are 0 but for rounding.
    assert lines[0]["held_margin"] == pytest.approx(0.0, abs=1e-4)
    assert lines[1]["chosen_reward"] == pytest.approx(0.0, abs=1e-4)
    assert lines[1]["loss"] - 0.2 * lines[1]["chosen_loss"] == pytest.approx(log(2), abs=1e-4)
    assert figures["accuracy"]["n"] == 20
    assert figures["accuracy"]["value"] >= 0.9
    assert figures["held_margin"] > 0.2
    assert figures["held_accuracy"] == figures["accuracy"]["value"]


def test_the_reference_is_computed_once(world: Path, tmp_path: Path) -> None:
    job = make_job(tmp_path, "dpo", changed(max_steps=2), inputs(world))
    run_here(work, job)
    path = job.state / "reference.safetensors"
    kept = load_tensors(path)["logprobs"]
    assert kept.shape == (36, 2)  # 2 steps of 8 pairs that are learnt from, and 20 held out
    written = path.stat().st_mtime_ns
    run_here(work, job)
    assert path.stat().st_mtime_ns == written


def test_a_policy_that_fell_apart_is_stopped_by_the_gate(world: Path, tmp_path: Path) -> None:
    settings = changed(rpo_alpha=0.0, on_gate="fail", gate_chosen_reward=100.0, max_steps=1)
    job = make_job(tmp_path, "dpo", settings, inputs(world))
    with pytest.raises(GateClosed, match="the policy fell apart"):
        run_here(work, job)


@pytest.mark.parametrize("loss", ["ipo", "hinge", "robust"])
def test_every_loss_trains(loss: Any, world: Path, tmp_path: Path) -> None:
    job = make_job(tmp_path, "dpo", changed(loss=loss, max_steps=20), inputs(world))
    figures = run_here(work, job)
    assert figures["held_margin"] > 0.0


# Short forms: SFT and the reward model, which learn in the same loop, are killed too.
@pytest.mark.soak
def test_killed_it_ends_with_the_same_bytes(world: Path, tmp_path: Path) -> None:
    settings = changed(checkpoint_every_steps=7, epochs=12)
    whole = make_job(tmp_path / "whole", "dpo", settings, inputs(world))
    run_here(work, whole)
    job = make_job(tmp_path / "killed", "dpo", settings, inputs(world))
    kill_at(job, 24)
    run_here(work, job)
    assert (job.files / "model.safetensors").read_bytes() == (
        whole.files / "model.safetensors"
    ).read_bytes()
    assert same_metrics(job) == same_metrics(whole)
