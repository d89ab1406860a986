"""Advantages and losses against their definitions: by hand, by double sums, by finite differences."""

import math

import pytest
import torch
from torch import Tensor

from conf.ppo import PpoConfig
from model.advantages import (
    generalised_advantages,
    group_advantages,
    kl_per_token,
    policy_loss,
    token_rewards,
    value_loss,
    whiten,
)
from model.lessons import token_entropies
from model.rollouts import Rollout, advantages_of


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_advantages_by_hand() -> None:
    # Two tokens, gamma 1, lambda 0.5, rewards 0 and 2, values 1 and 0.5:
    # token 1: 2 - 0.5 = 1.5;  token 0: (0 + 0.5 - 1) + 0.5 * 1.5 = 0.25
    advantages, returns = generalised_advantages(
        torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0, 0.5]]), gamma=1.0, lam=0.5
    )
    assert advantages.tolist() == [[0.25, 1.5]]
    assert returns.tolist() == [[1.25, 2.0]]


def test_the_score_is_paid_at_the_last_token_and_divergence_where_it_arises() -> None:
    kl = torch.tensor([[1.0, 2.0, 0.0], [4.0, 0.0, 0.0]])
    rewards = token_rewards(kl, torch.tensor([3.0, -1.0]), torch.tensor([1, 0]), kl_coef=0.5)
    assert rewards.tolist() == [[-0.5, 2.0, 0.0], [-3.0, 0.0, 0.0]]


def test_whitening_leaves_padding_out() -> None:
    values, mask = torch.tensor([[1.0, 3.0, 99.0]]), torch.tensor([[1.0, 1.0, 0.0]])
    # mean 2, unbiased variance 2
    white = whiten(values, mask)
    assert white.tolist()[0] == pytest.approx([-(0.5**0.5), 0.5**0.5, 0.0])


def test_policy_loss_by_hand() -> None:
    # ratios 1.5 and 0.5 at clip 0.2. Gain 1: min(1.5, 1.2) = 1.2; gain -1: max(0.5, 0.8) = 0.8.
    ratio = torch.tensor([[1.5, 0.5]]).log()
    loss, is_clipped = policy_loss(ratio, torch.zeros(1, 2), torch.tensor([[1.0, -1.0]]), clip=0.2)
    assert loss.tolist()[0] == pytest.approx([-1.2, 0.8])
    assert is_clipped.tolist() == [[1.0, 1.0]]


def test_value_loss_by_hand() -> None:
    # From 0 to 1 with clip 0.2 and return 2: the clipped prediction 0.2 errs more, 0.5 * 1.8^2.
    # Beyond the return the clipped one errs less, and the free one counts: 0.5 * 1^2.
    loss, is_clipped = value_loss(
        torch.tensor([1.0, 1.0]), torch.zeros(2), torch.tensor([2.0, 0.0]), clip=0.2
    )
    assert loss.tolist() == pytest.approx([0.5 * 1.8**2, 0.5])
    assert is_clipped.tolist() == [1.0, 0.0]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.99, 0.0)])
def test_advantages_are_the_double_sum_that_defines_them(gamma: float, lam: float) -> None:
    rewards, values = drawn(3, 7), drawn(3, 7, seed=1)
    rewards[1, 4:], values[1, 4:] = 0.0, 0.0  # a shorter answer
    following = torch.cat([values[:, 1:], torch.zeros(3, 1, dtype=torch.float64)], 1)
    surprise = rewards + gamma * following - values
    expected = torch.zeros_like(rewards)
    for token in range(7):
        for later in range(token, 7):  # Schulman et al. 2016, equation 16, term by term
            expected[:, token] += (gamma * lam) ** (later - token) * surprise[:, later]
    advantages, returns = generalised_advantages(rewards, values, gamma=gamma, lam=lam)
    torch.testing.assert_close(advantages, expected)
    torch.testing.assert_close(returns, expected + values)


def test_group_advantages_by_hand() -> None:
    # Prompt 1: answers 1 and 3, mean 2, deviation sqrt 2. Prompt 2: both 5.
    returns = torch.tensor([1.0, 3.0, 5.0, 5.0])
    grpo = group_advantages(returns, "grpo", 2)
    distance = 1 / (math.sqrt(2) + 1e-4)
    assert grpo.tolist() == pytest.approx([-distance, distance, 0.0, 0.0])
    # Against the other answer alone: 1 - 3 and 3 - 1.
    assert group_advantages(returns, "rloo", 2).tolist() == [-2.0, 2.0, 0.0, 0.0]
    # Of three, 0, 3 and 6, the others' means are 4.5, 3 and 1.5.
    three = group_advantages(torch.tensor([0.0, 3.0, 6.0]), "rloo", 3)
    assert three.tolist() == pytest.approx([-4.5, 0.0, 4.5])


@pytest.mark.parametrize(("method", "kl_in"), [("rloo", "reward"), ("grpo", "loss")])
def test_two_answers_to_a_prompt_by_hand(method: str, kl_in: str) -> None:
    rollout = Rollout(
        prompts=[[4], [4]],
        answers=torch.tensor([[5, 3], [3, 0]]),
        mask=torch.tensor([[1.0, 1.0], [1.0, 0.0]]),
        logprobs=torch.tensor([[-1.0, -2.0], [-0.5, 0.0]]),
        reference=torch.tensor([[-1.5, -2.5], [-1.5, 0.0]]),
        values=torch.zeros(2, 2),
        scores=torch.tensor([2.0, 1.0]),
        ended=torch.ones(2),
    )
    settings = PpoConfig.model_validate(
        {"method": method, "samples_per_prompt": 2, "kl_in": kl_in, "kl_estimator": "k2"}
    )
    advantages, returns = advantages_of(rollout, settings, 0.4)
    if kl_in == "reward":
        # Log ratios of 0.5, 0.5 and 1 cost 0.4 / 2 times their squares: 0.1 and 0.2 an answer. Each is
        # compared with the other: 1.9 - 0.8.
        assert returns[:, 0].tolist() == pytest.approx([1.9, 0.8])
        expected = 1.1
    else:
        # Half a unit from the mean, in deviations of sqrt(1 / 2).
        assert returns[:, 0].tolist() == [2.0, 1.0]
        expected = 0.5 / (math.sqrt(0.5) + 1e-4)
    assert advantages.flatten().tolist() == pytest.approx([expected, expected, -expected, 0.0])
    assert returns[1, 1] == 0


def test_estimators_of_divergence_by_hand() -> None:
    here, there = torch.tensor([-1.0]), torch.tensor([-1.5])  # the policy is likelier by half a nat
    assert kl_per_token(here, there, "k1").item() == pytest.approx(0.5)
    assert kl_per_token(here, there, "k2").item() == pytest.approx(0.125)
    assert kl_per_token(here, there, "k3").item() == pytest.approx(math.exp(-0.5) - 1 + 0.5)


def test_k2_in_a_loss_has_the_gradient_of_the_divergence() -> None:
    logits, reference = drawn(1, 5).requires_grad_(), drawn(1, 5, seed=1).log_softmax(-1)
    logprobs = logits.log_softmax(-1)
    exact = (logprobs.exp() * (logprobs - reference)).sum()
    [wanted] = torch.autograd.grad(exact, logits, retain_graph=True)
    # The mean over what is sampled, each token as often as it is likely.
    sampled = (logprobs.exp().detach() * kl_per_token(logprobs, reference, "k2")).sum()
    [found] = torch.autograd.grad(sampled, logits)
    torch.testing.assert_close(found, wanted)


def test_gradients_are_finite_differences_in_float64() -> None:
    new, old, advantages = drawn(4, 5).requires_grad_(), drawn(4, 5, seed=1), drawn(4, 5, seed=2)

    def of_policy(x: Tensor) -> Tensor:
        return policy_loss(x, old, advantages, clip=0.2)[0]

    def of_value(x: Tensor) -> Tensor:
        return value_loss(x, old, advantages, clip=0.2)[0]

    def of_divergence(x: Tensor) -> Tensor:
        return kl_per_token(x, old, "k2") + kl_per_token(x, old, "k3")

    for loss in (of_policy, of_value, of_divergence):
        assert torch.autograd.gradcheck(loss, (new,))


def test_entropy_is_that_of_the_distribution_sampled_from() -> None:
    head, states = drawn(4, 3).float(), drawn(2, 3, seed=1).float()
    shares = (states @ head.T / 0.7).softmax(-1)
    expected = [-sum(p * math.log(p) for p in row) for row in shares.tolist()]
    assert token_entropies(head, states, 0.7).tolist() == pytest.approx(expected, rel=1e-5)
    # Equal logits: the logarithm of the vocabulary.
    flat = token_entropies(torch.zeros(4, 3), states, 1.0)
    assert flat.tolist() == pytest.approx([math.log(4)] * 2)
