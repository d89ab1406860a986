"""The reward model: one number for a whole answer, learnt from which of two answers is better."""

import torch
import torch.nn.functional as F
from torch import Tensor

from model.transformer import Transformer


def last_token_scores(model: Transformer, ids: Tensor, lengths: Tensor) -> Tensor:
    """(B,) float32: the score of each row, read at its last real token; ids (B, T) right padded."""
    hidden = model.hidden(ids)
    rows = torch.arange(len(ids), device=ids.device)
    return model.score(hidden[rows, lengths - 1])


def reward_loss(chosen: Tensor, rejected: Tensor, margin: Tensor, *, centring: float) -> Tensor:
    """(B,) loss of each pair from the scores of its answers, (B,) each.

    -log sigmoid(chosen - rejected - margin), and `centring` times (chosen + rejected) squared, which
    keeps the scores near zero without changing their order.
    Source: Touvron et al. 2023 (Llama 2), equation 2; Eisenstein et al. 2023, section 2 (centring).
    """
    if not chosen.shape == rejected.shape == margin.shape:
        raise ValueError(
            f"scores {tuple(chosen.shape)}, {tuple(rejected.shape)} and margins "
            f"{tuple(margin.shape)} must have one shape"
        )
    ranking = -F.logsigmoid(chosen - rejected - margin)
    return ranking + centring * (chosen + rejected).square()
