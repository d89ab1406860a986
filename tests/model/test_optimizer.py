"""Learning rates as functions of the step, and what decays."""

import pytest
import torch

from conf.shape import ShapeConfig
from model.optimizer import UpdateRule, adamw, learning_rate
from model.transformer import Transformer


def course(schedule: str, steps: int, **fields: float) -> list[float]:
    return [
        learning_rate(step, schedule=schedule, peak=1.0, steps=steps, **fields)  # type: ignore[arg-type]
        for step in range(steps)
    ]


def test_warmup_rises_in_equal_parts_to_the_peak() -> None:
    assert course("constant", 6, warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_linear_falls_straight_to_the_floor() -> None:
    # After a warm-up of 1 step, 4 steps at 0, 1/4, 2/4, 3/4 of the way from 1 to 0.2.
    assert course("linear", 5, warmup_steps=1, floor=0.2) == pytest.approx([1, 1, 0.8, 0.6, 0.4])


def test_cosine_is_half_way_down_at_half_time() -> None:
    rates = course("cosine", 100, floor=0.1)
    # 0.1 + 0.9 x (1 + cos 0) / 2 = 1; at the middle 0.1 + 0.9 x 0.5 = 0.55.
    assert rates[0] == pytest.approx(1.0)
    assert rates[50] == pytest.approx(0.55)
    assert rates == sorted(rates, reverse=True)


def test_wsd_holds_the_peak_and_then_decays() -> None:
    rates = course("wsd", 10, floor=0.0, decay_share=0.4)
    assert rates == pytest.approx([1, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25])


def test_cosine_stable_decay_rests_between_peak_and_floor() -> None:
    rates = course("cosine_stable_decay", 100, floor=0.2, stable_share=0.5, decay_share=0.2)
    assert rates[0] == pytest.approx(1.0)
    assert rates[30:80] == pytest.approx([0.6] * 50)
    # Half of the last 20 steps is behind at step 90: half way from 0.6 to 0.2.
    assert rates[90] == pytest.approx(0.4)


def test_only_matrices_decay() -> None:
    shape = ShapeConfig(dim=16, layers=1, heads=2, kv_heads=1, context=8, has_qkv_bias=True)
    optimizer = adamw(Transformer(shape, 20), UpdateRule(weight_decay=0.3))
    decayed, kept = optimizer.param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.3, 0.0)
    assert {p.dim() for p in decayed["params"]} == {2}
    assert {p.dim() for p in kept["params"]} == {1}


def test_one_update_by_hand() -> None:
    shape = ShapeConfig(dim=8, layers=1, heads=2, kv_heads=1, context=8)
    model = Transformer(shape, 20)
    optimizer = adamw(model, UpdateRule(weight_decay=0.5))
    weight, before = model.embedding.weight, model.embedding.weight.detach().clone()
    weight.grad = torch.full_like(weight, 2.0)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    optimizer.step()
    # Decay first: w x (1 - 0.1 x 0.5); the first step of Adam is the sign of the gradient.
    torch.testing.assert_close(weight.detach(), before * 0.95 - 0.1)
