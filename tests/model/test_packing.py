"""Rows in one row: states and gradients are those of each sequence by itself."""

import random

import pytest
import torch
from torch import Tensor

from conf.shape import ShapeConfig
from model.packing import Packing, Sequenced, common_length, pack
from model.transformer import AttentionMask, Transformer

SHAPES = {
    "plain": ShapeConfig(dim=32, layers=2, heads=4, kv_heads=2, context=24),
    "windowed": ShapeConfig(
        dim=32, layers=3, heads=4, kv_heads=2, context=24, sliding_window=5, has_qk_norm=True
    ),
}


def rows_of(seed: int) -> list[Sequenced]:
    """Six sequences; the second three begin like the first three, one of them through and through."""
    dice = random.Random(seed)

    def drawn(count: int) -> list[int]:
        return [dice.randrange(50) for _ in range(count)]

    firsts = [drawn(n) for n in (7, 20, 1)]
    seconds = [[*firsts[0][:4], *drawn(9)], firsts[1][:15], drawn(6)]
    return [
        Sequenced(ids, sorted(dice.sample(range(len(ids)), (len(ids) + 1) // 2)))
        for ids in (*firsts, *seconds)
    ]


def model_of(shape: str) -> Transformer:
    return Transformer(SHAPES[shape], 50, seed=3).double()


def gradients(model: Transformer) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("is_paired", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_states_and_gradients_are_those_of_each_alone(
    shape: str, is_paired: bool, attention: str
) -> None:
    rows = rows_of(1)
    packed, alone = model_of(shape), model_of(shape)
    packed.attend_by(attention)  # pyright: ignore[reportArgumentType]
    tensors = pack(rows, is_paired=is_paired)
    total = sum(len(row.ids) for row in rows)
    # 4 and 15 tokens are shared, and by chance none of the third pair.
    assert tensors["ids"].shape == (1, total - 19 * is_paired)
    found = packed.hidden(tensors["ids"], packing=Packing.of(tensors))[0]
    wanted = torch.cat([alone.hidden(torch.tensor([row.ids]))[0, list(row.wanted)] for row in rows])
    # Attention by its definition has a softmax in float32.
    rounding = {"sdpa": 1e-11, "eager": 1e-5}[attention]
    torch.testing.assert_close(found, wanted, rtol=100 * rounding, atol=rounding)
    weights = torch.randn(found.shape, dtype=torch.float64)
    for states in (found, wanted):
        (states * weights).sum().backward()
    for ours, theirs in zip(gradients(packed), gradients(alone), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=100 * rounding, atol=10 * rounding)


def test_a_prefix_is_read_both_ways_and_nothing_behind_it() -> None:
    model = model_of("plain").requires_grad_(False)
    tensors = pack(
        [Sequenced(list(range(10)), range(10)), Sequenced(list(range(20, 26)), range(6))]
    )
    mask = AttentionMask(prefix=torch.tensor([4, 0]))

    def states(ids: Tensor) -> Tensor:
        return model.hidden(ids, mask=mask, packing=Packing.of(tensors))[0]

    before = states(tensors["ids"])
    for place, seen_by in ((3, range(10)), (6, range(6, 10)), (12, range(12, 16))):
        changed = tensors["ids"].clone()
        changed[0, place] = 40
        differs = (states(changed) - before).abs().max(-1).values > 1e-9
        assert differs.nonzero()[:, 0].tolist() == list(seen_by)
    plain = model.hidden(tensors["ids"], packing=Packing.of(tensors))[0]
    assert (plain[0] - before[0]).abs().max() > 1e-6  # token 0 sees token 3 now
    torch.testing.assert_close(plain[10:], before[10:])


def test_common_beginnings() -> None:
    assert common_length([1, 2, 3], [1, 2, 4, 5]) == 2
    assert common_length([1], [1, 2]) == 1
    assert common_length([], [1]) == 0
