"""Rollout figures, losses and gradients of PPO equal TRL's and, where they agree, the peers'."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conf.ppo import PpoConfig
from model.advantages import (
    generalised_advantages,
    kl_per_token,
    masked_mean,
    policy_loss,
    token_rewards,
    value_loss,
    whiten,
)
from model.lessons import Lesson, policy_step_loss
from model.rollouts import Rollout, answer_logprobs, answer_values, apart
from model.transformer import AttentionMask, Transformer, token_logprobs
from storage.checkpoint import RewardScale
from tests.model.oracle import PAD, gradient_norms, oracle_arrays, oracle_model, oracle_numbers

RUNS = ("ppo_k1", "ppo_k3_white", "ppo_noeos")
CLOSE = {"rtol": 1e-5, "atol": 2e-5}


def states(model: Transformer, arrays: dict[str, Tensor], rows: Tensor) -> Tensor:
    """Hidden states at which each answer token is chosen, (B, N, D)."""
    queries, answers = arrays["queries"][rows], arrays["postprocessed_responses"][rows]
    ids = torch.cat([queries, answers], 1)
    padding = (queries != PAD).int().argmax(1)
    hidden = model.hidden(ids, mask=AttentionMask(padding=padding))
    return hidden[:, queries.shape[1] - 1 : -1]


def logprobs_of(
    model: Transformer, arrays: dict[str, Tensor], rows: Tensor, temperature: float
) -> Tensor:
    labels = arrays["responses"][rows].masked_fill(arrays["padding_mask"][rows], -1)
    hidden = states(model, arrays, rows)
    return token_logprobs(model.head_weight, hidden, labels, temperature)


@pytest.mark.parametrize("run", RUNS)
def test_rollout_figures(run: str, shared_oracle: Path) -> None:
    arrays = oracle_arrays(shared_oracle / "ppo.npz", run)
    arguments = oracle_numbers(shared_oracle / "ppo_expected.json")[run]["args"]
    temperature, everyone = arguments["temperature"], torch.arange(8)
    mask = (~arrays["padding_mask"]).float()
    with torch.no_grad():
        for name, key in (("policy", "logprobs"), ("ref", "ref_logprobs")):
            model = oracle_model(shared_oracle, name)
            found = logprobs_of(model, arrays, everyone, temperature)
            torch.testing.assert_close(found * mask, arrays[key] * mask, **CLOSE)
        critic = oracle_model(shared_oracle, "value")
        values = critic.score(states(critic, arrays, everyone))
        open_mask = ~arrays["padding_mask_p1"]
        torch.testing.assert_close(values * open_mask, arrays["values"], **CLOSE)


@pytest.mark.parametrize("run", RUNS)
def test_rewards_advantages_and_returns(run: str, shared_oracle: Path) -> None:
    arrays = oracle_arrays(shared_oracle / "ppo.npz", run)
    arguments = oracle_numbers(shared_oracle / "ppo_expected.json")[run]["args"]
    mask = (~arrays["padding_mask"]).float()
    kl = kl_per_token(arrays["logprobs"], arrays["ref_logprobs"], arguments["kl_estimator"])
    torch.testing.assert_close(kl, arrays["kl"], **CLOSE)
    # TRL's quirk, for parity alone: the score lies one place behind the last token, if there is one.
    after = (arrays["sequence_lengths"] + 1).clamp(max=23)
    rewards = token_rewards(kl, arrays["scores"], after, kl_coef=arguments["kl_coef"])
    if arguments["whiten_rewards"]:
        rewards = whiten(rewards, (~arrays["padding_mask_p1"]).float(), shift_mean=False)
    torch.testing.assert_close(rewards, arrays["rewards"], **CLOSE)
    advantages, returns = generalised_advantages(
        rewards, arrays["values"], gamma=arguments["gamma"], lam=arguments["lam"]
    )
    torch.testing.assert_close(returns, arrays["returns"], **CLOSE)
    torch.testing.assert_close(whiten(advantages, mask), arrays["advantages"], **CLOSE)


@pytest.mark.parametrize(("run", "step"), [*((run, 0) for run in RUNS), ("ppo_k1", 2)])
def test_losses_and_gradients(run: str, step: int, shared_oracle: Path) -> None:
    arrays = oracle_arrays(shared_oracle / "ppo.npz", run)
    expected = oracle_numbers(shared_oracle / "ppo_expected.json")[run]
    arguments, numbers = expected["args"], expected["steps"][step]
    rows = arrays[f"step{step}/micro_batch_inds"]
    suffix = "_step2" if step else ""
    policy = oracle_model(shared_oracle, f"policy{suffix}")
    critic = oracle_model(shared_oracle, f"value{suffix}")
    mask = (~arrays["padding_mask"][rows]).float()
    open_mask = (~arrays["padding_mask_p1"][rows]).float()

    new = logprobs_of(policy, arrays, rows, arguments["temperature"])
    torch.testing.assert_close(new * mask, arrays[f"step{step}/new_logprobs"] * mask, **CLOSE)
    old = arrays["logprobs"][rows] * mask
    each, _ = policy_loss(new, old, arrays["advantages"][rows], clip=arguments["cliprange"])
    loss = masked_mean(each, mask)
    loss.backward()
    # A whole batch with ratio 1 has an exact loss of 0; what is left is rounding.
    assert loss.item() == pytest.approx(numbers["pg_loss"], rel=1e-5, abs=1e-7)
    expect_norms(policy, numbers, "policy")

    values = critic.score(states(critic, arrays, rows)) * open_mask
    each, is_clipped = value_loss(
        values, arrays["values"][rows], arrays["returns"][rows], clip=arguments["cliprange_value"]
    )
    loss = masked_mean(each, open_mask)
    (arguments["vf_coef"] * loss).backward()
    assert loss.item() == pytest.approx(numbers["vf_loss"], rel=1e-5)
    share = masked_mean(is_clipped, open_mask).item()
    assert share == pytest.approx(numbers["vf_clipfrac"], rel=1e-5)
    expect_norms(critic, numbers, "value")


def rollout_of(arrays: dict[str, Tensor]) -> Rollout:
    """TRL's rollout as ours: prompts without padding, nothing behind the ends."""
    mask = (~arrays["padding_mask"]).float()
    known = {"logprobs": "logprobs", "reference": "ref_logprobs", "values": "values"}
    return Rollout(
        prompts=[[token for token in row if token != PAD] for row in arrays["queries"].tolist()],
        answers=arrays["responses"],
        mask=mask,
        scores=arrays["scores"],
        ended=torch.ones(len(mask)),
        **{ours: arrays[theirs] * mask for ours, theirs in known.items()},
    )


@pytest.mark.parametrize("run", RUNS)
def test_rows_without_padding_give_the_same(run: str, shared_oracle: Path) -> None:
    arrays = oracle_arrays(shared_oracle / "ppo.npz", run)
    expected = oracle_numbers(shared_oracle / "ppo_expected.json")[run]
    arguments, numbers = expected["args"], expected["steps"][0]
    rollout = rollout_of(arrays)
    mask, everyone = rollout.mask, range(len(rollout.prompts))
    packed, labels = rollout.packed(everyone), rollout.answers[rollout.mask > 0]
    temperature = arguments["temperature"]
    with torch.no_grad():
        for name, wanted in (("policy", rollout.logprobs), ("ref", rollout.reference)):
            found = answer_logprobs(oracle_model(shared_oracle, name), packed, labels, temperature)
            torch.testing.assert_close(apart(found, mask), wanted, **CLOSE)
        critic = oracle_model(shared_oracle, "value")
        values = answer_values(critic, packed, RewardScale(mean=0.0, std=1.0))
        torch.testing.assert_close(apart(values, mask), rollout.values, **CLOSE)
    settings = PpoConfig(temperature=temperature, ratio_clip=arguments["cliprange"])
    batch = Lesson(rollout, arrays["advantages"] * mask, arrays["returns"], 0.0).batch(
        arrays["step0/micro_batch_inds"].tolist()
    )
    policy = oracle_model(shared_oracle, "policy")
    figures = policy_step_loss(settings, 0.0)(policy, batch, batch.weights)
    figures["loss"].backward()
    assert figures["loss"].item() == pytest.approx(numbers["pg_loss"], rel=1e-5, abs=1e-7)
    expect_norms(policy, numbers, "policy")


def expect_norms(model: Transformer, numbers: dict[str, Any], which: str) -> None:
    total, each = gradient_norms(model)
    assert total == pytest.approx(numbers["grad_norm_total"][which], rel=1e-5)
    for name, norm in numbers["grad_norm_per_param"][which].items():
        assert each[name] == pytest.approx(norm, rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("peer", ["verl", "openrlhf"])
def test_peers_agree_on_kl_rewards_and_returns(peer: str, shared_oracle: Path) -> None:
    """Both put the score on the last token, as we do."""
    given = oracle_arrays(shared_oracle / "peers.npz", "")
    numbers = oracle_numbers(shared_oracle / "peers_expected.json")
    mask = given["mask"].float()
    for estimator in ("k1", "k2", "k3"):
        kl = kl_per_token(given["logprobs"], given["ref_logprobs"], estimator) * mask
        torch.testing.assert_close(kl, given[f"{peer}/{estimator}"] * mask, **CLOSE)
    kl = kl_per_token(given["logprobs"], given["ref_logprobs"], "k1") * mask
    limit = numbers["reward_clip"] if peer == "openrlhf" else float("inf")
    scores = given["scores"].clamp(-limit, limit)
    last = mask.sum(1).long() - 1
    rewards = token_rewards(kl, scores, last, kl_coef=numbers["kl_coef"])
    torch.testing.assert_close(rewards, given[f"{peer}/token_rewards"] * mask, **CLOSE)
    advantages, returns = generalised_advantages(
        rewards, given["values"] * mask, gamma=numbers["gamma"], lam=numbers["lam"]
    )
    torch.testing.assert_close(returns * mask, given[f"{peer}/returns"] * mask, **CLOSE)
    if peer == "verl":
        white = whiten(advantages, mask)
        torch.testing.assert_close(white, given["verl/advantages_whitened"] * mask, **CLOSE)
    else:
        torch.testing.assert_close(advantages * mask, given["openrlhf/advantages"] * mask, **CLOSE)


def test_deepspeed_chat_agrees_with_the_score_one_place_behind(shared_oracle: Path) -> None:
    given = oracle_arrays(shared_oracle / "peers.npz", "")
    numbers = oracle_numbers(shared_oracle / "peers_expected.json")
    mask = given["mask"].float()
    after = mask.sum(1).long().clamp(max=mask.shape[1] - 1)
    kl = kl_per_token(given["logprobs"], given["ref_logprobs"], "k1")
    scores = given["scores"].clamp(-numbers["reward_clip"], numbers["reward_clip"])
    rewards = token_rewards(kl, scores, after, kl_coef=numbers["kl_coef"])
    torch.testing.assert_close(rewards * mask, given["dschat/token_rewards"] * mask, **CLOSE)
    seen = (torch.arange(mask.shape[1]) <= after[:, None]).float()
    advantages, returns = generalised_advantages(
        given["dschat/token_rewards"] * seen,
        given["values"] * seen,
        gamma=numbers["gamma"],
        lam=numbers["lam"],
    )
    torch.testing.assert_close(advantages, given["dschat/advantages"], **CLOSE)
    torch.testing.assert_close(returns, given["dschat/returns"], **CLOSE)
    each, _ = policy_loss(
        given["new_logprobs"], given["logprobs"], advantages, clip=numbers["cliprange"]
    )
    assert masked_mean(each, mask).item() == pytest.approx(numbers["dschat/actor_loss"], rel=1e-5)
    each, _ = value_loss(
        given["new_values"], given["values"], returns, clip=numbers["cliprange_value"]
    )
    assert masked_mean(each, mask).item() == pytest.approx(numbers["dschat/critic_loss"], rel=1e-5)


def test_verl_agrees_on_both_losses(shared_oracle: Path) -> None:
    given = oracle_arrays(shared_oracle / "peers.npz", "")
    numbers = oracle_numbers(shared_oracle / "peers_expected.json")
    mask = given["mask"].float()
    each, is_clipped = policy_loss(
        given["new_logprobs"],
        given["logprobs"],
        given["verl/advantages_whitened"],
        clip=numbers["cliprange"],
    )
    assert masked_mean(each, mask).item() == pytest.approx(numbers["verl/policy_loss"], rel=1e-5)
    assert masked_mean(is_clipped, mask).item() == pytest.approx(numbers["verl/clipfrac"], rel=1e-5)
    each, is_clipped = value_loss(
        given["new_values"],
        given["values"],
        given["verl/returns"],
        clip=numbers["cliprange_value"],
    )
    assert masked_mean(each, mask).item() == pytest.approx(numbers["verl/value_loss"], rel=1e-5)
    share = masked_mean(is_clipped, mask).item()
    assert share == pytest.approx(numbers["verl/vf_clipfrac"], rel=1e-5)
    kl = kl_per_token(given["logprobs"], given["new_logprobs"], "k1")
    assert masked_mean(kl, mask).item() == pytest.approx(numbers["verl/ppo_kl"], rel=1e-5)
