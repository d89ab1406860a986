"""The reward worker: loss by hand, what it learns, the gate, the negative control, resume."""

from functools import partial
from math import exp, log
from pathlib import Path
from typing import Any

import pytest
import torch

from conf.contract import ExitCode
from conf.reward import RewardConfig
from model.dialogues import Pair
from model.loop import GateClosed
from model.reward import (
    last_token_scores,
    reward_batch,
    reward_loss,
    shuffled_labels,
    step_loss,
    wanted_scores,
    work,
)
from model.reward_figures import accuracy_figures, calibration, length_correlation
from model.transformer import Transformer
from model.weights import load_model
from storage.checkpoint import ModelCard, RewardScale
from tests.model.small_world import (
    SHAPE,
    kill_at,
    make_job,
    metrics,
    run_here,
    same_metrics,
    without_held_pairs,
    write_world,
)

SETTINGS = RewardConfig(
    epochs=6,
    batch_rows=8,
    learning_rate=1e-2,
    evaluate_every_steps=20,
    scale_answers=16,
    max_new_tokens=16,
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("world")
    write_world(folder)
    return folder


def inputs(world: Path) -> dict[str, Path]:
    return {name: world / name for name in ("policy", "preferences")}


def changed(**changes: Any) -> RewardConfig:
    return SETTINGS.model_copy(update=changes)


def test_one_pair_by_hand() -> None:
    # scores 2 and -1, margin 1: log(1 + e^-(2 - -1 - 1)) + 0.01 (2 - 1)^2
    loss = reward_loss(*(torch.tensor([v]) for v in (2.0, -1.0, 1.0)), centring=0.01)
    assert loss.item() == pytest.approx(log(1 + exp(-2)) + 0.01)


def test_the_gradient_of_the_loss_is_right() -> None:
    source = torch.Generator().manual_seed(0)
    values = [torch.randn(5, dtype=torch.float64, generator=source) for _ in range(3)]
    values = [value.requires_grad_() for value in values]
    assert torch.autograd.gradcheck(partial(reward_loss, centring=0.1), values)


def test_scores_of_different_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="one shape"):
        reward_loss(torch.zeros(2), torch.zeros(2), torch.zeros(1), centring=0)


def test_the_score_is_read_at_the_last_token_whatever_stands_beside_it() -> None:
    model = Transformer(SHAPE, 40, is_scalar=True, seed=2).requires_grad_(False)
    scores = last_token_scores(model, [[5, 6, 7, 8], [9, 10]])
    alone = model.score(model.hidden(torch.tensor([[9, 10]])))[0, -1]
    assert scores[1].item() == pytest.approx(alone.item(), abs=1e-6)


@pytest.mark.parametrize(
    ("loss", "places"),
    [
        ("last_token", [[3], [4]]),
        # Token 0 of the answers is the same; the chosen one ends first and keeps its last score.
        ("from_divergence", [[3, 3], [3, 4]]),
    ],
)
def test_which_scores_meet(loss: Any, places: list[list[int]]) -> None:
    pair = Pair([5, 6], [7, 8], [7, 9, 10], 0.0, "")
    model = Transformer(SHAPE, 40, is_scalar=True, seed=2).requires_grad_(False)
    batch = reward_batch([pair], loss)
    assert batch["compared"].tolist() == [[True] * len(places[0])]
    found = wanted_scores(model, batch.tensors)
    wanted = [
        model.score(model.hidden(torch.tensor([side])))[0, place].item()
        for side, some in zip(([5, 6, 7, 8], [5, 6, 7, 9, 10]), places, strict=True)
        for place in some
    ]
    assert found.tolist() == pytest.approx(wanted, abs=1e-5)


def test_the_loss_per_token_is_a_mean_of_each_pair_first() -> None:
    model = Transformer(SHAPE, 40, is_scalar=True, seed=2).requires_grad_(False)
    rows = [Pair([5], [7, 8], [9, 10, 11], 0.0, ""), Pair([5], [7], [8], 0.0, "")]
    settings = changed(loss="from_divergence", centring=0.0)
    batch = reward_batch(rows, settings.loss)
    found = step_loss(settings)(model, batch, batch.weights)
    c, r = wanted_scores(model, batch.tensors).chunk(2)
    gaps = (c - r).tolist()  # three of the first pair, one of the second
    each = [log(1 + exp(-gap)) for gap in gaps]
    assert found["loss"].item() == pytest.approx((sum(each[:3]) / 3 + each[3]) / 2, rel=1e-5)
    assert found["margin"].item() == pytest.approx((gaps[2] + gaps[3]) / 2, rel=1e-5)


def test_calibration_by_hand() -> None:
    # Confidences 1 / (1 + 1/3) = 0.75 (twice, once wrong) and 0.9 (right): bins 2 and 4 of five.
    scores = [(log(3), 0.0), (0.0, log(3)), (log(9), 0.0)]
    found = calibration(scores)
    assert found["confidence"] == pytest.approx(0.8)
    assert [b["n"] for b in found["bins"]] == [2, 1]
    assert found["error"] == pytest.approx((2 * abs(0.75 - 0.5) + abs(0.9 - 1.0)) / 3)
    assert calibration([]) == {}


def test_length_is_told_apart_from_quality() -> None:
    held = [Pair([1], [2] * n, [2] * 2, 0.0, "") for n in (1, 2, 3)]
    scores = [(float(n), 2.0) for n in (1, 2, 3)]
    assert length_correlation(scores, held) == pytest.approx(1.0)
    figures = accuracy_figures(scores, held)
    assert {name: figures[name]["value"] for name in figures if name != "held"} == {
        "chosen longer": 1.0, "chosen shorter": 0.0, "same length": 0.0,
    }  # fmt: skip
    assert length_correlation([(1.0, 2.0)], held[:1]) == 0.0


@pytest.mark.parametrize("changes", [{"start": "random"}, {"loss": "from_divergence"}])
def test_other_starts_and_losses_learn_too(
    changes: dict[str, Any], world: Path, tmp_path: Path
) -> None:
    job = make_job(tmp_path, "reward", changed(epochs=4, **changes), inputs(world))
    figures = run_here(work, job)
    assert figures["accuracy"]["held"]["value"] >= 0.8


def test_it_learns_to_rank_and_says_how_well(world: Path, tmp_path: Path) -> None:
    job = make_job(tmp_path, "reward", SETTINGS, inputs(world))
    figures = run_here(work, job)
    held = figures["accuracy"]["held"]
    assert held["n"] == 20
    assert held["value"] >= 0.9
    assert held["low"] < held["value"] <= held["high"]
    groups = {"margin 0.5", "margin 1.5", "chosen longer", "chosen shorter"}
    assert set(figures["accuracy"]) == {"held", *groups}
    by_margin = [f["n"] for name, f in figures["accuracy"].items() if name.startswith("margin")]
    assert sum(by_margin) == 20
    scale = RewardScale.read(job.files)
    assert (scale.mean, scale.std) == (figures["scale"]["mean"], figures["scale"]["std"])
    assert figures["scale"]["n"] == 16
    assert ModelCard.read(job.files).role == "reward"
    assert load_model(job.files).is_scalar
    assert [line["step"] for line in metrics(job) if "held_accuracy" in line] == [0, 20, 40, 57]


@pytest.mark.parametrize("loss", ["last_token", "from_divergence"])
def test_micro_batches_change_nothing_but_rounding(loss: str, world: Path, tmp_path: Path) -> None:
    losses: list[list[float]] = []
    for size in (0, 3):
        settings = changed(loss=loss, max_steps=3, learning_rate=1e-3, scale_answers=2)
        job = make_job(tmp_path / str(size), "reward", settings, inputs(world))
        launch = job.launch.model_copy(update={"micro_batch": size})
        run_here(work, job.model_copy(update={"launch": launch}))
        losses.append([line["loss"] for line in metrics(job) if "loss" in line])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_shuffled_labels_teach_nothing(world: Path, tmp_path: Path) -> None:
    rows = [Pair([1], [number], [5000 + number], 0.0, str(number)) for number in range(1000)]
    swapped = sum(row.chosen[0] >= 5000 for row in shuffled_labels(rows, 5))
    assert 430 <= swapped <= 570  # 500 expected, more than 4 standard deviations
    assert shuffled_labels(rows, 5) == shuffled_labels(rows, 5)
    job = make_job(tmp_path, "reward", changed(shuffle_labels=True, epochs=1), inputs(world))
    accuracy = run_here(work, job)["accuracy"]
    # Held-out labels shuffled by other coins: right by chance, whatever was learnt.
    assert accuracy["held_shuffled"]["n"] == accuracy["held"]["n"] == 20
    assert accuracy["held_shuffled"]["low"] <= 0.5 <= accuracy["held_shuffled"]["high"]


@pytest.mark.parametrize("is_met", [True, False])
def test_a_gate_that_fails_ends_the_stage(is_met: bool, world: Path, tmp_path: Path) -> None:
    settings = changed(on_gate="fail", gate_accuracy=0.0 if is_met else 1.0, max_steps=1)
    job = make_job(tmp_path, "reward", settings, inputs(world))
    if is_met:
        run_here(work, job)
        assert (job.files / "reward.json").exists()
        return
    with pytest.raises(GateClosed, match="accuracy on 20 held-out pairs"):
        run_here(work, job)
    assert not (job.files / "model.safetensors").exists()
    assert GateClosed.code == ExitCode.GATE


def test_what_it_would_lack_at_the_end_is_told_before_it_trains(
    world: Path, tmp_path: Path
) -> None:
    whole = make_job(
        tmp_path / "long", "reward", changed(max_new_tokens=SHAPE.context), inputs(world)
    )
    with pytest.raises(ValueError, match="0 prompts leave room for an answer"):
        run_here(work, whole)
    blind = {**inputs(world), "preferences": without_held_pairs(world, tmp_path)}
    gated = make_job(tmp_path / "blind", "reward", changed(on_gate="fail"), blind)
    with pytest.raises(ValueError, match="on_gate=fail looks at held-out pairs, and there is none"):
        run_here(work, gated)
    assert metrics(whole) == metrics(gated) == []


def test_keep_best_keeps_the_weights_of_the_best_look(world: Path, tmp_path: Path) -> None:
    settings = changed(on_gate="keep_best", evaluate_every_steps=5, learning_rate=5e-2)
    job = make_job(tmp_path, "reward", settings, inputs(world))
    figures = run_here(work, job)
    looks = {
        line["step"]: line["held_accuracy"] for line in metrics(job) if "held_accuracy" in line
    }
    best = max(looks.values())
    first = min(step for step, accuracy in looks.items() if accuracy == best)
    assert figures["kept_step"] == first
    assert figures["accuracy"]["held"]["value"] == best


@pytest.mark.slow
def test_killed_with_keep_best_it_ends_with_the_same_bytes(world: Path, tmp_path: Path) -> None:
    settings = changed(
        on_gate="keep_best", evaluate_every_steps=10, checkpoint_every_steps=7, epochs=12
    )
    whole = make_job(tmp_path / "whole", "reward", settings, inputs(world))
    run_here(work, whole)
    job = make_job(tmp_path / "killed", "reward", settings, inputs(world))
    kill_at(job, 26)
    run_here(work, job)
    for name in ("model.safetensors", "reward.json", "config.json"):
        assert (job.files / name).read_bytes() == (whole.files / name).read_bytes()
    assert same_metrics(job) == same_metrics(whole)


def test_each_of_several_domains_has_its_accuracy() -> None:
    held = [Pair([1], [2], [3], 0.0, "", domain) for domain in ("zh", "en", "zh")]
    told = accuracy_figures([(1.0, 0.0), (0.0, 1.0), (0.0, 1.0)], held)
    found = {name: (told[name]["value"], told[name]["n"]) for name in told if "domain" in name}
    assert found == {"domain en": (0.0, 1), "domain zh": (0.5, 2)}
    assert not [name for name in accuracy_figures([(1.0, 0.0)], held[:1]) if "domain" in name]


def test_margins_of_many_values_are_told_in_quarters() -> None:
    held = [Pair([1], [2], [3], float(margin), "") for margin in range(40)]
    # Right where the margin is 10 or more.
    scores = [(1.0, 0.0 if pair.margin >= 10 else 2.0) for pair in held]
    figures = accuracy_figures(scores, held)
    assert figures["held"]["value"] == 0.75
    assert [figures[name]["value"] for name in list(figures)[1:5]] == [0.0, 1.0, 1.0, 1.0]
    assert list(figures)[1] == "margin 0 to 9"
