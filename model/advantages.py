"""From rewards to advantages, and the clipped losses of proximal policy optimisation.

Letters of tensor shapes: B rows, N answer tokens. Masks are float, 1 on tokens that count.
"""

from typing import Literal

import torch
from torch import Tensor

KlEstimator = Literal["k1", "k2", "k3"]

EPSILON = 1e-8
GROUP_EPSILON = 1e-4


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens that count; 0 without any."""
    return (values * mask).sum() / mask.sum().clamp(min=1)


def whiten(values: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
    """Scale what counts to variance 1 and, with `shift_mean`, mean 0; 0 elsewhere."""
    mean = masked_mean(values, mask)
    spread = ((values - mean).square() * mask).sum() / (mask.sum() - 1).clamp(min=1)
    white = (values - mean) * torch.rsqrt(spread + EPSILON)
    return (white if shift_mean else white + mean) * mask


def kl_per_token(logprobs: Tensor, reference: Tensor, estimator: KlEstimator) -> Tensor:
    """(B, N) estimate of the divergence from the reference at each sampled token, in nats.

    Source: Schulman 2020, "Approximating KL divergence": k1 is unbiased, k2 and k3 are never negative,
    and k3 is unbiased as well. In a loss the gradient of k2 is the one of the divergence.
    """
    log_ratio = reference - logprobs
    match estimator:
        case "k1":
            return -log_ratio
        case "k2":
            return log_ratio.square() / 2
        case "k3":
            return log_ratio.exp() - 1 - log_ratio


def token_rewards(kl: Tensor, scores: Tensor, score_at: Tensor, *, kl_coef: float) -> Tensor:
    """(B, N) reward of each token: minus `kl_coef` times its KL (B, N), and the score (B,) of the
    answer at its token number `score_at` (B,).

    Source: Ziegler et al. 2019, equation 2; the penalty is spread over the tokens that cause it.
    """
    rewards = -kl_coef * kl
    rewards[torch.arange(len(rewards), device=rewards.device), score_at] += scores
    return rewards


def generalised_advantages(
    rewards: Tensor, values: Tensor, *, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Advantages and returns, (B, N) each; rewards and values are 0 behind the end of an answer.

    Source: Schulman et al. 2016, equation 16.
    """
    advantages = torch.zeros_like(rewards)
    advantage = torch.zeros_like(rewards[:, 0])
    following = torch.zeros_like(rewards[:, 0])
    for token in reversed(range(rewards.shape[1])):
        surprise = rewards[:, token] + gamma * following - values[:, token]
        advantage = surprise + gamma * lam * advantage
        advantages[:, token] = advantage
        following = values[:, token]
    return advantages, advantages + values


def group_advantages(returns: Tensor, method: Literal["grpo", "rloo"], samples: int) -> Tensor:
    """(B,) advantage of each answer over the others to its prompt; `returns` (B,) hold `samples` answers to
    a prompt side by side.

    grpo: the distance to the group's mean in the group's deviations; 0 in a group of equal returns.
    rloo: the distance to the mean of the group's other answers.
    Source: Shao et al. 2024, section 4.1.2 (GRPO); Ahmadian et al. 2024, equation 8 (RLOO).
    """
    groups = returns.view(-1, samples)
    distance = groups - groups.mean(1, keepdim=True)
    if method == "grpo":
        return (distance / (groups.std(1, keepdim=True) + GROUP_EPSILON)).flatten()
    return (distance * (samples / (samples - 1))).flatten()


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, clip: float
) -> tuple[Tensor, Tensor]:
    """Loss of each token and whether clipping changed it, (B, N) each.

    Source: Schulman et al. 2017, equation 7.
    """
    ratio = (logprobs - old_logprobs).exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip, 1 + clip)
    return torch.maximum(plain, clipped), (clipped > plain).float()


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float
) -> tuple[Tensor, Tensor]:
    """Loss of each token, half the squared error, the larger of the free and the clipped prediction's, and
    whether clipping changed it, (B, N) each.

    Source: Schulman et al. 2016 and the reference implementation of PPO (baselines, ppo2).
    """
    plain = (values - returns).square()
    clipped = (old_values + (values - old_values).clamp(-clip, clip) - returns).square()
    return 0.5 * torch.maximum(plain, clipped), (clipped > plain).float()
