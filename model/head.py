"""Loss of the output head without its logits: cross-entropy and gradient together, piece by piece."""

from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

from model.linear import product, weight_gradient

LOGITS_AT_ONCE = 1 << 26
"""Logits (rows x vocabulary) that exist at a time."""
LOGITS_IN_CACHE = 1 << 22
"""So many are enough on a CPU, which has them from its cache then..."""
LEAST_ROWS = 512
"""... unless they are of fewer rows, whose sum of gradients would take longer than the products."""
SOFTMAX_ROWS = 128
"""Rows whose softmax a CPU takes together."""


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
    by_weight: Tensor | None = None
    rows = _rows_at_once(weight)
    for start in range(0, max(1, len(states)), rows):
        here = slice(start, start + rows)
        logits, label = product(states[here], weight), labels[here]
        if logits.is_cuda:
            softmax_loss = _compiled_softmax_loss() if is_compiled else _softmax_loss
            loss, by_logits = softmax_loss(logits, label)
        else:
            loss, by_logits = softmax_loss_in_place(logits, label), logits
        total += loss
        if by_state is not None:
            by_state[here] = product(by_logits, weight.t())
        if needs[1]:
            added = weight_gradient(by_logits, states[here]).float()
            by_weight = added if by_weight is None else by_weight.add_(added)
    return total, by_state, by_weight


def _rows_at_once(weight: Tensor) -> int:
    """Rows whose logits exist at a time. A CPU has them from its cache when they are few; so few that
    adding up the gradient of the weight is the most of it would not pay."""
    if weight.is_cuda:
        return max(1, LOGITS_AT_ONCE // len(weight))
    return min(
        max(1, LOGITS_AT_ONCE // len(weight)), max(LEAST_ROWS, LOGITS_IN_CACHE // len(weight))
    )


def softmax_loss_in_place(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed loss of logits (N, V), whose place their gradient takes; on a CPU, from its cache."""
    total = torch.zeros((), device=logits.device)
    for part, label in zip(logits.split(SOFTMAX_ROWS), labels.split(SOFTMAX_ROWS), strict=True):
        is_label, chosen = label >= 0, label.clamp(min=0)[:, None]
        logprobs = part.log_softmax(-1, dtype=torch.float32)
        total -= logprobs.gather(-1, chosen)[is_label].sum()
        by_logits = logprobs.exp_().scatter_add_(-1, chosen, logprobs.new_full(chosen.shape, -1.0))
        if not is_label.all():
            by_logits[~is_label] = 0.0
        part.copy_(by_logits)
    return total


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
