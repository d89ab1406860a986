"""The PPO worker: what a rollout holds, what is learnt, what is kept, and what ends it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from conf.contract import JobFile
from conf.launch import LaunchConfig
from conf.lora import LoraConfig
from conf.ppo import PpoConfig, RewardWeights
from conf.reward import RewardConfig
from conf.sft import SftConfig
from model import ppo, reward, sft
from model.loop import Diverged
from model.ppo import adapted_kl_coef, assert_first_ratio, noise_seed
from model.ranks import Ranks
from model.rollouts import Answering, Models, Prompt, kl_of
from model.weights import load_model, load_tensors
from storage.checkpoint import RewardScale
from storage.conversations import Conversation
from storage.tokenizer import ChatTokenizer
from tests.model.small_world import (
    function_file,
    make_job,
    metrics,
    run_here,
    start_worker,
    write_world,
)

SETTINGS = PpoConfig(
    iterations=6,
    rollout_rows=16,
    minibatch_rows=8,
    max_new_tokens=16,
    learning_rate=1e-3,
    value_learning_rate=5e-3,
    held_prompts=8,
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world with an SFT policy and a reward model, trained for a second each."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("world")
    write_world(folder)
    tuned = make_job(
        folder / "sft",
        "sft",
        SftConfig(epochs=20, batch_rows=16, learning_rate=1e-2, evaluate_every_steps=0),
        {name: folder / name for name in ("policy", "conversations")},
    )
    run_here(sft.work, tuned)
    judge = make_job(
        folder / "reward",
        "reward",
        RewardConfig(
            epochs=4, batch_rows=16, learning_rate=1e-2, scale_answers=32, max_new_tokens=16
        ),
        {"policy": tuned.files, "preferences": folder / "preferences"},
    )
    run_here(reward.work, judge)
    return folder


def inputs(world: Path) -> dict[str, Path]:
    return {
        "policy": world / "sft" / "files",
        "reward": world / "reward" / "files",
        "conversations": world / "conversations",
    }


def changed(**changes: Any) -> PpoConfig:
    return SETTINGS.model_copy(update=changes)


def test_the_coefficient_moves_towards_the_target_as_the_peers_do(shared_oracle: Path) -> None:
    numbers = json.loads((shared_oracle / "peers_expected.json").read_text("utf-8"))["adaptive_kl"]
    settings = PpoConfig(kl_target=numbers["target"], kl_horizon=numbers["horizon"])
    coefficient = numbers["init"]
    for kl, expected in zip(numbers["kls"], numbers["values"], strict=True):
        coefficient = adapted_kl_coef(settings, coefficient, kl, numbers["n_steps"])
        assert coefficient == pytest.approx(expected, rel=1e-9)
    assert adapted_kl_coef(PpoConfig(), 0.05, 100.0, 64) == 0.05


def test_old_log_probabilities_that_are_wrong_stop_the_job() -> None:
    assert_first_ratio(1e-5, PpoConfig())
    with pytest.raises(AssertionError, match="off 1 by"):
        assert_first_ratio(0.02, PpoConfig())


def test_noise_differs_by_seed_and_iteration() -> None:
    seeds = {noise_seed(seed, iteration) for seed in range(10) for iteration in range(100)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**63 for seed in seeds)


def answering_of(
    world: Path, settings: PpoConfig, micro_batch: int = 0
) -> tuple[Models, Answering]:
    files = inputs(world)
    models = Models(
        policy=load_model(files["policy"]),
        reference=load_model(files["policy"]),
        value=load_model(files["reward"]),
        reward=load_model(files["reward"]),
        scale=RewardScale.read(files["reward"]),
    )
    tokenizer = ChatTokenizer(files["policy"] / "tokenizer")
    return models, Answering(lambda: models, tokenizer, settings, Ranks(), micro_batch, {})


def prompts_of(answering: Answering, *texts: str) -> list[Prompt]:
    found: list[Prompt] = []
    for text in texts:
        asked = [{"role": "user", "content": text}]
        row: Conversation = {
            "id": text,
            "messages": [*asked, {"role": "assistant", "content": "?"}],
            "domain": "d",
            "source": "s",
            "language": "zh",
        }
        found.append(Prompt(answering.tokenizer.render(asked, for_generation=True).ids, row))
    return found


def test_a_rollout_says_what_full_forward_passes_say(world: Path) -> None:
    settings = changed(temperature=0.7)
    models, answering = answering_of(world, settings)
    prompts = prompts_of(answering, "猫吃什么？", "Tell me the food of the bear.", "狗的食物？")
    whole, _ = answering.at(prompts, 1)
    mean, std = models.scale.mean, models.scale.std
    assert models.reward
    assert models.value
    with torch.no_grad():
        # The policy is still its reference.
        torch.testing.assert_close(kl_of(whole), torch.zeros(3), rtol=0, atol=1e-4)
        for row, (prompt, answer) in enumerate(zip(prompts, whole.answer_ids, strict=True)):
            assert bool(whole.ended[row]) == (answer[-1] == answering.tokenizer.im_end)
            ids = torch.tensor([prompt.ids + answer])
            start, length = len(prompt.ids), len(answer)
            states = models.policy.hidden(ids)[0, start - 1 : -1]
            logprobs = (models.policy.logits(states) / 0.7).log_softmax(-1)
            expected = logprobs[range(length), answer]
            torch.testing.assert_close(whole.logprobs[row, :length], expected, rtol=1e-4, atol=1e-5)
            values = (models.value.score(models.value.hidden(ids)[0, start - 1 : -1]) - mean) / std
            torch.testing.assert_close(whole.values[row, :length], values, rtol=1e-4, atol=1e-5)
            assert not whole.values[row, length:].any()
            score = models.reward.score(models.reward.hidden(ids)[0, -1]).item()
            earned = min(max((score - mean) / std, -5.0), 5.0) - (0.0 if whole.ended[row] else 1.0)
            assert whole.scores[row].item() == pytest.approx(earned, abs=1e-4)
    apart, _ = answering_of(world, settings, micro_batch=1)[1].at(prompts, 1)
    assert apart.answer_ids == whole.answer_ids
    torch.testing.assert_close(apart.scores, whole.scores, rtol=1e-4, atol=1e-5)


def test_the_reward_rises(world: Path, tmp_path: Path) -> None:
    settings = changed(iterations=30, held_prompts=20)
    job = make_job(tmp_path, "ppo", settings, inputs(world))
    figures = run_here(ppo.work, job)
    before, after = figures["held_before"], figures["held_after"]
    assert before["reward"]["n"] == after["reward"]["n"] == 20
    assert before["kl"]["value"] == pytest.approx(0.0, abs=1e-4)
    assert after["reward"]["value"] > before["reward"]["value"] + 0.2
    lines = metrics(job)
    assert [line["step"] for line in lines] == list(range(1, 31))
    assert {
        "reward",
        "kl",
        "loss",
        "value_loss",
        "clip_fraction",
        "value_clip_fraction",
        "answer_tokens",
        "ended_share",
    } <= set(lines[0])


@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_answers_compared_with_each_other_raise_the_reward(
    world: Path, tmp_path: Path, method: str
) -> None:
    settings = changed(iterations=30, held_prompts=20, method=method, samples_per_prompt=4)
    if method == "grpo":
        settings = settings.model_copy(update={"kl_in": "loss", "kl_estimator": "k3"})
    figures = run_here(ppo.work, make_job(tmp_path, "ppo", settings, inputs(world)))
    before, after = figures["held_before"]["reward"], figures["held_after"]["reward"]
    assert after["value"] > before["value"] + 0.2
    assert "value_loss" not in figures


def function_job(folder: Path, settings: PpoConfig, files: dict[str, Path], **code: str) -> JobFile:
    """A job whose reward, or truth, is given by functions."""
    sources = {name: function_file(folder / f"{name}.py", body) for name, body in code.items()}
    return make_job(folder, "ppo", settings, files, sources=sources)


def without_reward(world: Path) -> dict[str, Path]:
    return {name: path for name, path in inputs(world).items() if name != "reward"}


def test_a_pretrained_policy_learns_what_a_function_rewards(world: Path, tmp_path: Path) -> None:
    files = {**without_reward(world), "policy": world / "policy"}
    settings = changed(iterations=24, kl_coef=0.0, unended_penalty=0.0, learning_rate=5e-3)
    job = function_job(tmp_path, settings, files, functions="sum(map(str.isascii, answer['text']))")
    figures = run_here(ppo.work, job)
    before, after = figures["held_before"], figures["held_after"]
    assert after["reward/functions"] > before["reward/functions"] + 2  # characters
    assert after["scored_share/functions"] == 1.0
    # The policy's first answers, before it learnt, are the scale: mean 0, deviation 1, here.
    first = metrics(job)[0]
    assert first["reward"] == pytest.approx(0.0, abs=1e-5)
    assert first["reward_std"] == pytest.approx(1.0, abs=0.3)  # but for what was clipped


def test_sources_of_the_reward_are_added_up(world: Path, tmp_path: Path) -> None:
    plain = make_job(tmp_path / "plain", "ppo", changed(iterations=1), inputs(world))
    run_here(ppo.work, plain)
    weights = RewardWeights(model=0.5, functions=2.0)
    settings = changed(iterations=1, weights=weights, score_clip=100.0, unended_penalty=0.0)
    job = function_job(tmp_path, settings, inputs(world), functions="float(len(answer['text']))")
    run_here(ppo.work, job)
    [line], [alone] = metrics(job), metrics(plain)
    # The function's scores have mean 0 by their own scale: half the model's score is left.
    assert line["reward"] == pytest.approx(0.5 * line["reward/model"], abs=1e-5)
    assert line["kl"] == alone["kl"]
    assert line["reward/functions"] > 0


def test_the_weights_with_the_best_truth_are_kept(world: Path, tmp_path: Path) -> None:
    # Rewarded for few characters, it ends up saying nothing; the truth is against that.
    settings = changed(
        iterations=40,
        kl_coef=0.0,
        unended_penalty=0.0,
        truth_every_iterations=2,
        truth_prompts=10,
        held_prompts=10,
        truth_patience=2,
    )
    code = {
        "functions": "-float(len(answer['text']))",
        "truth_functions": "float(len(answer['text']))",
    }
    job = function_job(tmp_path, settings, without_reward(world), **code)
    figures = run_here(ppo.work, job)
    looks = {line["step"]: line["held_truth"] for line in metrics(job) if "held_truth" in line}
    best = int(max(looks, key=lambda step: looks[step]))
    assert figures["kept_iteration"] == best
    assert figures["iterations"] == best + 2 * 2 < 40
    assert sorted(looks) == list(range(0, best + 5, 2))
    # What was rewarded rose while the truth fell; the policy answers as it did at its best.
    rewards = {line["step"]: line["held_reward"] for line in metrics(job) if "held_reward" in line}
    last = figures["iterations"]
    assert rewards[last] > rewards[best]
    assert looks[last] < looks[best]
    assert figures["held_after"]["truth"]["value"] == looks[best]
    assert figures["held_after"]["reward"]["value"] == rewards[best]


def test_with_lora_the_policy_is_its_own_reference(world: Path, tmp_path: Path) -> None:
    lora = LoraConfig(rank=4)
    settings = changed(iterations=15, held_prompts=20, lora=lora, learning_rate=3e-3)
    job = make_job(tmp_path, "ppo", settings, inputs(world))
    figures = run_here(ppo.work, job)
    assert figures["held_before"]["kl"]["value"] == pytest.approx(0.0, abs=1e-4)
    assert figures["held_after"]["kl"]["value"] > 0.05
    assert figures["held_after"]["reward"]["value"] > figures["held_before"]["reward"]["value"]
    # Merged: a plain policy, whose embedding has learnt nothing.
    before, after = (
        load_tensors(path / "model.safetensors") for path in (inputs(world)["policy"], job.files)
    )
    assert before.keys() == after.keys()
    assert torch.equal(before["embedding.weight"], after["embedding.weight"])
    assert not torch.equal(before["blocks.0.query.weight"], after["blocks.0.query.weight"])


def test_updates_end_where_the_policy_is_too_far(world: Path, tmp_path: Path) -> None:
    settings = changed(iterations=2, stop_kl=1e-6)
    job = make_job(tmp_path, "ppo", settings, inputs(world))
    run_here(ppo.work, job)
    # The first minibatch is answered by the policy itself, the second no longer.
    assert [line["updates"] for line in metrics(job)] == [1, 1]


def test_entropy_in_the_loss_keeps_answers_varied(world: Path, tmp_path: Path) -> None:
    entropy: list[float] = []
    for coefficient in (0.0, 0.3):
        settings = changed(iterations=6, entropy_coef=coefficient, kl_coef=0.0)
        job = make_job(tmp_path / str(coefficient), "ppo", settings, inputs(world))
        run_here(ppo.work, job)
        entropy.append(metrics(job)[-1]["entropy"])
    assert entropy[1] > entropy[0] + 0.1


def test_a_policy_that_never_can_be_updated_ends_the_job(world: Path, tmp_path: Path) -> None:
    # Its loss is not finite, while the value model learns on: five updates in a row, four an iteration.
    job = make_job(tmp_path, "ppo", changed(entropy_coef=1e39), inputs(world))
    with pytest.raises(Diverged, match=r"iteration 2: .* the last of 5 such updates in a row"):
        run_here(ppo.work, job)


def test_the_same_job_gives_the_same_bytes(world: Path, tmp_path: Path) -> None:
    settings = changed(iterations=2)
    jobs = [make_job(tmp_path / str(n), "ppo", settings, inputs(world)) for n in range(2)]
    for job in jobs:
        run_here(ppo.work, job)
    first, second = ((job.files / "model.safetensors").read_bytes() for job in jobs)
    assert first == second


def test_prompts_that_leave_no_room_are_a_clear_error(world: Path, tmp_path: Path) -> None:
    job = make_job(tmp_path, "ppo", changed(max_new_tokens=95), inputs(world))
    with pytest.raises(ValueError, match="leaves room for max_new_tokens=95"):
        run_here(ppo.work, job)


def test_minibatches_must_divide_the_rollout() -> None:
    with pytest.raises(ValueError, match="not a multiple of minibatch_rows=48"):
        PpoConfig(rollout_rows=64, minibatch_rows=48)


@pytest.mark.slow
def test_two_processes_learn_the_same(world: Path, tmp_path: Path) -> None:
    settings = changed(iterations=2)
    alone = make_job(tmp_path / "alone", "ppo", settings, inputs(world))
    run_here(ppo.work, alone)
    launch = LaunchConfig(engine="ddp", processes=2, threads=1, device="cpu")
    both = make_job(tmp_path / "both", "ppo", settings, inputs(world), launch)
    assert start_worker(both).wait() == 0, (both.logs / "output.log").read_text("utf-8")[-3000:]
    for one, two in zip(metrics(alone), metrics(both), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-5)
        assert two["value_loss"] == pytest.approx(one["value_loss"], rel=1e-4)
        assert two["reward"] == pytest.approx(one["reward"], abs=1e-5)
    found, expected = (load_tensors(job.files / "model.safetensors") for job in (both, alone))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4)
