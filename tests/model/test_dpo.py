"""The DPO worker: losses by hand, the reference computed once, what it learns, resume."""

from dataclasses import replace
from math import exp, log
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from conf.dpo import DpoConfig
from conf.launch import LaunchConfig
from model.dialogues import Pair
from model.dpo import Course, Loss, Scorer, dpo_batch, dpo_loss, step_loss, work
from model.engine import build_engine
from model.loop import GateClosed
from model.optimizer import UpdateRule
from model.ranks import Ranks
from model.soundness import repeated_share
from model.transformer import Transformer
from model.weights import load_model, load_tensors
from storage.jsonl import SPLITS, SplitWriter
from storage.preferences import read_preferences
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


def sigmoid(x: float) -> float:
    return 1 / (1 + exp(-x))


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


def test_the_other_losses_by_hand() -> None:
    # Log-ratios to the reference: chosen 1, rejected -2; beta 0.5.
    values = one(-1.0, -5.0, -2.0, -3.0)
    found = {
        loss: dpo_loss(*values, beta=0.5, loss=loss, gamma=0.25).item()
        for loss in ("ipo_sum", "apo_zero", "simpo", "orpo")
    }
    assert found["ipo_sum"] == pytest.approx((3 - 1) ** 2)
    assert found["apo_zero"] == pytest.approx(1 - sigmoid(0.5) + sigmoid(-1.0))
    # Of the policy alone: 0.5 * (-1 - -5) - 0.25;  odds e^-1 / (1 - e^-1) and e^-5 / (1 - e^-5).
    assert found["simpo"] == pytest.approx(log(1 + exp(-1.75)))
    odds = [exp(p) / (1 - exp(p)) for p in (-1.0, -5.0)]
    assert found["orpo"] == pytest.approx(0.5 * log(1 + odds[1] / odds[0]), rel=1e-5)


def test_kto_by_hand_on_two_pairs() -> None:
    # Log-ratios: pair 0 chosen 1, rejected -2; pair 1 chosen 0, rejected 1. Beta 0.5, divergence 0.4.
    values = [torch.tensor(v) for v in ([-1.0, -4.0], [-5.0, -1.0], [-2.0, -4.0], [-3.0, -2.0])]
    found = dpo_loss(*values, beta=0.5, loss="kto", divergence=torch.tensor(0.4)).tolist()
    first = (1 - sigmoid(0.5 * 0.6)) + (1 - sigmoid(0.5 * 2.4))
    second = (1 - sigmoid(0.5 * -0.4)) + (1 - sigmoid(0.5 * -0.6))
    assert found == pytest.approx([first / 2, second / 2])


def test_kto_measures_from_answers_to_other_prompts(world: Path, tmp_path: Path) -> None:
    """The divergence is the mean log-ratio of each prompt with the next one's chosen answer, not below 0."""
    rows = [Pair([5, 6], [7, 8], [9], 0.0, "a"), Pair([10], [11], [12, 13], 0.0, "b")]
    engine = build_engine(
        load_model(world / "policy"), LaunchConfig(threads=1), Ranks(), UpdateRule()
    )
    settings = changed(loss="kto", batch_rows=2, epochs=1)
    course = Course(rows, rows, Scorer(engine, settings, Ranks()), settings, tmp_path)
    job = make_job(tmp_path / "job", "dpo", settings, inputs(world))
    [before] = course.batches(job)(0)
    assert before["divergence"].item() == pytest.approx(0.0, abs=1e-5)
    reference = load_model(world / "policy")
    with torch.no_grad():
        engine.model.head_weight.mul_(1.5)
    moved = [
        answer_logprob(engine.model, *asked) - answer_logprob(reference, *asked)
        # The answer to the second prompt is cut to the room of the first pair, and the other way round.
        for asked in (([5, 6], [11]), ([10], [7, 8]))
    ]
    [after] = course.batches(job)(0)
    assert after["divergence"].item() == pytest.approx(max(0.0, sum(moved) / 2), abs=1e-4)
    assert sum(moved) != 0


def test_kto_learns_the_same_of_pairs_and_of_their_answers_alone(world: Path) -> None:
    pairs = [Pair([5, 6], [7, 8], [9], 0.0, "a"), Pair([10], [11], [12, 13], 0.0, "b")]
    known = torch.tensor([[-9.0, -5.0], [-4.0, -11.0]])
    good = [row._replace(rejected=[]) for row in pairs]
    bad = [row._replace(chosen=[]) for row in pairs]
    apart = torch.tensor([[-9.0, 0.0], [-4.0, 0.0], [0.0, -5.0], [0.0, -11.0]])
    loss = step_loss(changed(loss="kto", beta=0.3))
    found: list[dict[str, torch.Tensor]] = []
    norms: list[torch.Tensor] = []
    for rows, reference in ((pairs, known), ([*good, *bad], apart)):
        model = load_model(world / "policy")
        batch = dpo_batch(rows, reference)
        batch = replace(batch, tensors={**batch.tensors, "divergence": torch.tensor(0.7)})
        found.append(loss(model, batch, batch.weights))
        found[-1]["loss"].backward()
        norms.append(model.embedding.weight.grad.norm())  # pyright: ignore[reportOptionalMemberAccess]
    for name in ("loss", "chosen_reward", "rejected_reward", "margin", "chosen_loss"):
        assert found[1][name].item() == pytest.approx(found[0][name].item(), rel=1e-5), name
    assert norms[1].item() == pytest.approx(norms[0].item(), rel=1e-5)
    # Of bad answers alone there is nothing to make likelier.
    batch = dpo_batch(bad, apart[2:])
    batch = replace(batch, tensors={**batch.tensors, "divergence": torch.tensor(0.7)})
    alone = loss(load_model(world / "policy"), batch, batch.weights)
    assert (alone["chosen_loss"].item(), alone["chosen_reward"].item()) == (0.0, 0.0)
    assert 0 < alone["loss"].item() < 1


def test_kto_learns_from_single_answers_and_others_leave_them_out(
    world: Path, tmp_path: Path
) -> None:
    alone = tmp_path / "preferences"
    with SplitWriter(alone) as singles:
        for split in SPLITS:
            for number, row in enumerate(read_preferences(world / "preferences", split)):
                row["rejected" if number % 2 else "chosen"] = None
                singles.write(split, row)
    given = {**inputs(world), "preferences": alone}
    job = make_job(tmp_path / "kto", "dpo", changed(loss="kto", rpo_alpha=0.0), given)
    figures = run_here(work, job)
    assert figures["train"]["left_out"] == 0
    assert figures["held_chosen_reward"] > 0 > figures["held_rejected_reward"]
    assert figures["accuracy"]["low"] > 0.5  # share of rewards with the sign of the label
    with pytest.raises(ValueError, match="no row is left to train on"):
        run_here(work, make_job(tmp_path / "dpo", "dpo", changed(), given))
    easy = changed(loss="kto", order="easy_first")
    with pytest.raises(ValueError, match="goes by both answers of a pair"):
        run_here(work, make_job(tmp_path / "easy", "dpo", easy, given))


def answer_logprob(model: Transformer, prompt: list[int], answer: list[int]) -> float:
    ids = torch.tensor([[*prompt, *answer]])
    with torch.no_grad():
        logprobs = model.logits(model.hidden(ids))[0].log_softmax(-1)
    return sum(logprobs[len(prompt) - 1 + n, token].item() for n, token in enumerate(answer))


@pytest.mark.parametrize("loss", get_args(Loss))
def test_gradients_of_every_loss_are_right(loss: Any) -> None:
    source = torch.Generator().manual_seed(0)
    values = [-torch.rand(5, dtype=torch.float64, generator=source) - 0.3 for _ in range(4)]
    values = [value.requires_grad_() for value in values]
    smoothing = 0.1 if loss in ("sigmoid", "robust", "simpo") else 0.0

    def found(*four: torch.Tensor) -> torch.Tensor:
        return dpo_loss(
            *four, beta=0.7, loss=loss, label_smoothing=smoothing, gamma=0.3,
            divergence=torch.tensor(0.2, dtype=torch.float64),
        )  # fmt: skip

    assert torch.autograd.gradcheck(found, values)


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


@pytest.mark.parametrize("loss", [loss for loss in get_args(Loss) if loss != "sigmoid"])
def test_every_loss_trains(loss: Any, world: Path, tmp_path: Path) -> None:
    job = make_job(tmp_path, "dpo", changed(loss=loss, max_steps=16), inputs(world))
    figures = run_here(work, job)
    assert figures["held_margin"] > 0.0


def test_micro_batches_change_nothing_but_rounding(world: Path, tmp_path: Path) -> None:
    losses: list[list[float]] = []
    for size in (0, 3):
        settings = changed(loss="kto", max_steps=4)
        job = make_job(tmp_path / str(size), "dpo", settings, inputs(world))
        launch = job.launch.model_copy(update={"micro_batch": size})
        run_here(work, job.model_copy(update={"launch": launch}))
        losses.append([line["loss"] for line in metrics(job) if "loss" in line])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_policy_that_falls_apart_ends_the_training_and_an_earlier_one_is_kept(
    world: Path, tmp_path: Path
) -> None:
    # Held-out chosen answers lose more than a nat on the way; the gate allows a tenth of one.
    settings = changed(
        rpo_alpha=0.0, learning_rate=3e-2, on_gate="keep_best", gate_chosen_reward=-0.01,
        evaluate_every_steps=2,
    )  # fmt: skip
    job = make_job(tmp_path, "dpo", settings, inputs(world))
    figures = run_here(work, job)
    looks = [line for line in metrics(job) if "held_chosen_reward" in line]
    closed = [line for line in looks if line["held_chosen_reward"] < -0.01]
    assert [line["step"] for line in closed] == [figures["steps"]]
    assert figures["steps"] < 38  # 4 epochs of 76 pairs, 8 a step
    best = max(looks[:-1], key=lambda line: line["held_accuracy"])
    assert figures["kept_step"] == best["step"]
    assert figures["accuracy"]["value"] == best["held_accuracy"]
    # What the result says is of the weights that were kept, not of those that fell apart.
    told = ("held_accuracy", "held_margin", "held_chosen_reward", "held_rejected_reward")
    assert {name: figures[name] for name in told} == {name: best[name] for name in told}


def test_answers_are_looked_at_on_the_way(world: Path, tmp_path: Path) -> None:
    settings = changed(gate_answers=6, max_new_tokens=12, max_steps=2, on_gate="fail")
    job = make_job(tmp_path, "dpo", settings, inputs(world))
    with pytest.raises(GateClosed, match="of sampled answers were sound"):
        run_here(work, job)  # a policy that was never trained does not end its answers
    first = metrics(job)[0]
    assert first["held_sound_share"] <= first["held_ended_share"] < 0.5
    assert 0 < first["held_answer_tokens"] <= 12


def test_a_gate_that_could_see_nothing_is_refused(world: Path, tmp_path: Path) -> None:
    blind = {**inputs(world), "preferences": without_held_pairs(world, tmp_path)}
    job = make_job(tmp_path / "blind", "dpo", changed(on_gate="keep_best"), blind)
    with pytest.raises(ValueError, match="on_gate=keep_best looks at held-out pairs"):
        run_here(work, job)
    settings = changed(gate_answers=6, max_new_tokens=SHAPE.context)
    job = make_job(tmp_path / "long", "dpo", settings, inputs(world))
    with pytest.raises(ValueError, match="no held-out prompt leaves room for an answer"):
        run_here(work, job)


def test_an_answer_that_says_the_same_over_and_over_repeats_itself() -> None:
    # Runs of four in 1 2 1 2 1 2 1: 1212, 2121, 1212, 2121: two of four were there before.
    assert repeated_share([1, 2, 1, 2, 1, 2, 1]) == 0.5
    assert repeated_share([1, 2, 3, 4, 5, 6]) == 0.0
    assert repeated_share([1, 1]) == 0.0


def test_easy_pairs_come_first(world: Path, tmp_path: Path) -> None:
    rows = [
        Pair([5], [token] * (1 + token % 3), [30 + token], 0.0, str(token))
        for token in range(6, 16)
    ]
    engine = build_engine(
        load_model(world / "policy"), LaunchConfig(threads=1), Ranks(), UpdateRule()
    )
    settings = changed(order="easy_first", batch_rows=2, epochs=2)
    course = Course(rows, [], Scorer(engine, settings, Ranks()), settings, tmp_path)
    gaps = [
        answer_logprob(engine.model, row.prompt, row.chosen) / len(row.chosen)
        - answer_logprob(engine.model, row.prompt, row.rejected)
        for row in rows
    ]
    seen = [row for step in range(5) for row in course.order.rows_at(step)]
    assert seen == sorted(range(10), key=lambda row: -gaps[row])


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
