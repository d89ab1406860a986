"""Loss of the output head without its logits: cross-entropy and gradient together, piece by piece."""

from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

LOGITS_AT_ONCE = 1 << 26
"""Logits (rows x vocabulary) that exist at a time."""


def label_loss(
    head_weight: Tensor, hidden: Tensor, labels: Tensor, *, is_compiled: bool = False
) -> Tensor:
    """Sum of the negative log-probabilities of labels (...), in nats, float32; labels < 0 count nothing.

    `hidden` (..., D) are the states, `head_weight` (V, D) the head. The gradient of each piece is taken
    in the forward pass, when its logits are there anyway: three matrix products instead of the four
    that computing the logits again would take, and no more memory than one piece. Both products run in
    the precision of the surrounding autocast; softmax and sums are float32.

    Source: the identity d loss / d logits = softmax - one-hot (Goodfellow et al. 2016, equation 6.22).
    """
    states = hidden.reshape(-1, hidden.shape[-1])
    total = _LabelLoss.apply(states, head_weight, labels.reshape(-1), is_compiled)
    return cast("Tensor", total)


class _LabelLoss(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, states: Tensor, head_weight: Tensor, labels: Tensor, is_compiled: bool
    ) -> Tensor:
        kind = states.device.type
        dtype = states.dtype
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        with torch.autocast(kind, enabled=False):
            total, by_state, by_weight = _pieces(
                states.to(dtype), head_weight.to(dtype), labels, ctx.needs_input_grad, is_compiled
            )
        ctx.save_for_backward(by_state, by_weight)
        ctx.dtypes = (states.dtype, head_weight.dtype)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        [gradient] = gradients
        by_state, by_weight = ctx.saved_tensors
        of_states, of_weight = ctx.dtypes
        return (
            None if by_state is None else (by_state * gradient).to(of_states),
            None if by_weight is None else (by_weight * gradient).to(of_weight),
            None,
            None,
        )


def _pieces(
    states: Tensor, weight: Tensor, labels: Tensor, needs: tuple[bool, ...], is_compiled: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss, and its gradients by states (N, D) and weight (V, D) where they are needed."""
    total = torch.zeros((), device=states.device)
    by_state = torch.empty_like(states) if needs[0] else None
    by_weight = torch.zeros_like(weight, dtype=torch.float32) if needs[1] else None
    rows = max(1, LOGITS_AT_ONCE // weight.shape[0])
    softmax_loss = _compiled_softmax_loss() if is_compiled else _softmax_loss
    for start in range(0, len(states), rows):
        here = slice(start, start + rows)
        loss, by_logits = softmax_loss(F.linear(states[here], weight), labels[here])
        total += loss
        if by_state is not None:
            torch.mm(by_logits, weight, out=by_state[here])
        if by_weight is not None:
            by_weight += by_logits.t() @ states[here]
    return total, by_state, by_weight


def _softmax_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Summed loss of logits (N, V), and its gradient (N, V) in their dtype."""
    wide = logits.float()
    is_label = labels >= 0
    chosen = labels.clamp(min=0)[:, None]
    normaliser = wide.logsumexp(-1, keepdim=True)  # (N, 1)
    losses = (normaliser - wide.gather(-1, chosen)).squeeze(-1)
    by_logits = (wide - normaliser).exp()
    by_logits = by_logits - (torch.arange(logits.shape[-1], device=logits.device) == chosen).float()
    by_logits = torch.where(is_label[:, None], by_logits, 0.0)
    return torch.where(is_label, losses, 0.0).sum(), by_logits.to(logits.dtype)


@cache
def _compiled_softmax_loss() -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    # The rows of the last piece are fewer; without this the whole would be compiled for each number.
    return torch.compile(_softmax_loss, dynamic=True)
