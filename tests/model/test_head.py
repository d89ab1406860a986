"""The head's loss with its gradient, piece by piece: the numbers of cross-entropy, without its logits."""

import math

import pytest
import torch
import torch.nn.functional as F

import model.head as head
from model.head import label_loss


def drawn(*shape: int, seed: int) -> torch.Tensor:
    source = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=source, dtype=torch.float64)


def test_two_tokens_by_hand() -> None:
    # Logits of the one state are (1, 0): its label 0 costs log(1 + e^-1), label 1 costs log(1 + e).
    weight = torch.tensor([[1.0], [0.0]], requires_grad=True)
    loss = label_loss(weight, torch.ones(2, 1), torch.tensor([0, 1]))
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1)) + math.log(1 + math.e))
    loss.backward()
    # softmax - one-hot, summed over both labels: 2 p - 1 and 2 (1 - p) - 1 with p = 1 / (1 + e^-1).
    p = 1 / (1 + math.exp(-1))
    assert weight.grad is not None
    assert weight.grad.flatten().tolist() == pytest.approx([2 * p - 1, 1 - 2 * p])


@pytest.mark.parametrize("logits_at_once", [1, 50, 10**6])
def test_loss_and_both_gradients_are_those_of_cross_entropy(
    monkeypatch: pytest.MonkeyPatch, logits_at_once: int
) -> None:
    monkeypatch.setattr(head, "LOGITS_AT_ONCE", logits_at_once)
    labels = torch.arange(12).remainder(7).view(3, 4)
    labels[1, 2:] = -1
    found, wanted = (
        (
            drawn(3, 4, 5, seed=0).float().requires_grad_(),
            drawn(7, 5, seed=1).float().requires_grad_(),
        )
        for _ in range(2)
    )
    ours = label_loss(found[1], found[0], labels)
    truth = F.cross_entropy(
        (wanted[0] @ wanted[1].T).flatten(0, 1), labels.flatten(), ignore_index=-1, reduction="sum"
    )
    (ours * 0.25).backward()
    (truth * 0.25).backward()
    assert ours.item() == pytest.approx(truth.item(), rel=1e-6)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-6)


def test_in_bfloat16_it_stays_near_the_truth() -> None:
    states, weight = drawn(64, 32, seed=2).float(), (drawn(100, 32, seed=3) * 0.1).float()
    weight.requires_grad_()
    labels = torch.arange(64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = label_loss(weight, states, labels)
    loss.backward()
    assert loss.dtype == torch.float32
    truth = F.cross_entropy(states @ weight.detach().T, labels, reduction="sum")
    assert loss.item() == pytest.approx(truth.item(), rel=5e-3)
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


def test_without_gradients_none_is_computed() -> None:
    with torch.no_grad():
        loss = label_loss(drawn(9, 4, seed=4).float(), drawn(3, 4, seed=5).float(), torch.arange(3))
    assert not loss.requires_grad


def test_rows_without_a_label_cost_nothing() -> None:
    states = drawn(2, 4, seed=6).float().requires_grad_()
    loss = label_loss(drawn(9, 4, seed=4).float(), states, torch.tensor([-1, -1]))
    loss.backward()
    assert loss.item() == 0
    assert states.grad is not None
    assert not states.grad.any()
