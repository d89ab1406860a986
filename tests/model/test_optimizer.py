"""Learning rates as functions of the step, what decays, Muon, the loss scale."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from conf.shape import ShapeConfig
from model.engine import load_states
from model.optimizer import LossScale, UpdateRule, adamw, build_optimizers, learning_rate
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
    optimizer = adamw(Transformer(shape, 20).parameters(), UpdateRule(weight_decay=0.3))
    decayed, kept = optimizer.param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.3, 0.0)
    assert {p.dim() for p in decayed["params"]} == {2}
    assert {p.dim() for p in kept["params"]} == {1}


def test_one_update_by_hand() -> None:
    shape = ShapeConfig(dim=8, layers=1, heads=2, kv_heads=1, context=8)
    model = Transformer(shape, 20)
    optimizer = adamw(model.parameters(), UpdateRule(weight_decay=0.5))
    weight, before = model.embedding.weight, model.embedding.weight.detach().clone()
    weight.grad = torch.full_like(weight, 2.0)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    optimizer.step()
    # Decay first: w x (1 - 0.1 x 0.5); the first step of Adam is the sign of the gradient.
    torch.testing.assert_close(weight.detach(), before * 0.95 - 0.1)


def test_a_longer_cycle_ends_before_the_cosine_does() -> None:
    # A cycle of 1.25: at the end of the run 80 % of the half cosine is behind.
    rates = course("cosine", 1000, floor=0.0, cycle=1.25)
    assert rates[500] == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.4)))
    assert rates[-1] == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.999 / 1.25)))


def test_four_parts_with_their_levels() -> None:
    # 100 steps: 10 of warm-up, 20 of cosine from 1 to 0.3, 50 at 0.5, 20 straight to 0.1.
    rates = course(
        "cosine_stable_decay",
        100,
        warmup_steps=10,
        floor=0.1,
        stable_share=0.5,
        decay_share=0.2,
        cosine_level=0.3,
        stable_level=0.5,
    )
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[20] == pytest.approx(0.65)  # Half way down: the middle of 1 and 0.3.
    assert rates[30:80] == pytest.approx([0.5] * 50)
    assert rates[90] == pytest.approx(0.3)  # Half way from 0.5 to 0.1.


@pytest.mark.parametrize("fate", ["all finite", "every third overflows"])
def test_the_loss_scale_goes_the_way_of_torchs(fate: str) -> None:
    ours = LossScale(value=1024.0, interval=5)
    theirs = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=5)
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    for step in range(24):
        is_finite = fate == "all finite" or step % 3 != 2
        theirs.scale(weight.sum())  # It makes its state at the first use.
        weight.grad = torch.full((1,), 1.0 if is_finite else math.inf)
        theirs.step(optimizer)
        theirs.update()
        ours.note(is_finite=is_finite)
        assert ours.value == theirs.get_scale(), step


def test_a_loss_scale_survives_on_disk(tmp_path: Path) -> None:
    LossScale(value=2.0**-3, good_steps=17).save(tmp_path)
    found = LossScale()
    found.load(tmp_path)
    assert (found.value, found.good_steps) == (0.125, 17)


def test_muon_takes_the_matrices_of_the_blocks_alone() -> None:
    shape = ShapeConfig(dim=16, layers=2, heads=2, kv_heads=1, context=8, is_tied=False)
    model = Transformer(shape, 20)
    muon, rest = build_optimizers(
        model.named_parameters(), UpdateRule(optimizer="muon", weight_decay=0.3)
    )
    names = {id(p): name for name, p in model.named_parameters()}
    taken = [{names[id(p)] for g in o.param_groups for p in g["params"]} for o in (muon, rest)]
    assert taken[0] | taken[1] == set(names.values())
    assert taken[1] == {"embedding.weight", "head.weight"} | {
        name for name in names.values() if "norm" in name
    }


def test_one_muon_update_by_hand() -> None:
    shape = ShapeConfig(dim=16, layers=1, heads=2, kv_heads=2, context=8)
    model = Transformer(shape, 20)
    muon, _ = build_optimizers(
        model.named_parameters(), UpdateRule(optimizer="muon", weight_decay=0.5)
    )
    block: Any = model.blocks[0]
    weight, before = block.query.weight, block.query.weight.detach().clone()
    # A diagonal gradient stays diagonal through the iteration: each entry goes through the polynomial.
    entries = torch.linspace(0.2, 1.0, 16)
    weight.grad = entries.diag()
    for group in muon.param_groups:
        group["lr"] = 0.1
    muon.step()
    singular = entries / entries.norm()
    for _ in range(5):
        singular = 3.4445 * singular - 4.7750 * singular**3 + 2.0315 * singular**5
    # Decay first, then the step, scaled to the size of AdamW's: 0.2 sqrt(16).
    wanted = before * (1 - 0.1 * 0.5) - 0.1 * 0.2 * 4 * singular.diag()
    # The iteration runs in bfloat16, and its polynomial is steep: 8 % of the largest entry.
    torch.testing.assert_close(weight.detach(), wanted, rtol=0, atol=0.1 * 0.2 * 4 * 0.08)
    assert (weight.detach() - before).diag().abs().min() > 0.04


def test_a_loaded_state_lies_where_the_update_runs() -> None:
    # Also the count of steps: the fused update on an accelerator reads it there.
    with torch.device("meta"):
        model = nn.Linear(2, 1, bias=False)
    optimizer = adamw(model.parameters(), UpdateRule())
    saved = {"step": torch.tensor(3.0), "exp_avg": torch.zeros(1, 2)}
    load_states(model, [optimizer], {"weight": saved})
    assert [value.device.type for value in optimizer.state[model.weight].values()] == ["meta"] * 2
