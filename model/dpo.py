"""Direct preference optimisation: raise chosen over rejected answers, held by a fixed reference."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from model.transformer import Transformer, token_logprobs

Loss = Literal["sigmoid", "ipo", "hinge", "robust"]


def answer_logprobs(model: Transformer, ids: Tensor, labels: Tensor) -> Tensor:
    """(B,) float32: log-probability of the labelled tokens of each row (B, T), summed, in nats."""
    return token_logprobs(model.head_weight, model.hidden(ids), labels).sum(-1)


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float,
    loss: Loss = "sigmoid",
    label_smoothing: float = 0.0,
) -> Tensor:
    """(B,) loss of each pair; log 2 (sigmoid) when the policy equals the reference.

    Each argument is (B,) float32: the log-probability of one whole answer, summed over its tokens;
    for `ipo` the mean over its tokens. `beta` is the pull to the reference, per nat.
    `label_smoothing` is the share of pairs taken to be labelled the wrong way round.

    Source: Rafailov et al. 2023, equation 7 (sigmoid); Mitchell 2023 (its smoothing); Azar et al.
    2023, equation 17 (ipo); Zhao et al. 2023 (hinge); Chowdhury et al. 2024, equation 12 (robust).
    Raises ValueError if the four shapes differ; broadcasting here would train on wrong pairs.
    """
    shapes = {
        x.shape for x in (policy_chosen, policy_rejected, reference_chosen, reference_rejected)
    }
    if len(shapes) != 1:
        raise ValueError(f"log-probabilities of a batch have shapes {shapes}; one is expected")
    gain = (policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)
    right, wrong = -F.logsigmoid(beta * gain), -F.logsigmoid(-beta * gain)
    match loss:
        case "sigmoid":
            return (1 - label_smoothing) * right + label_smoothing * wrong
        case "robust":
            weighted = (1 - label_smoothing) * right - label_smoothing * wrong
            return weighted / (1 - 2 * label_smoothing)
        case "hinge":
            return F.relu(1 - beta * gain)
        case "ipo":
            return (gain - 1 / (2 * beta)).square()
