"""Attention a block of queries at a time: the definition's numbers and gradients, also compiled."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import model.attention as attention
from conf.shape import ShapeConfig
from model.attention import Attention, blockwise_attention, eager_attention, fused_attention
from model.transformer import Transformer


def drawn(tokens: int, heads: int, key_heads: int) -> list[torch.Tensor]:
    """Query, key, value and what comes from above, laid out as the model has them."""
    source = torch.Generator().manual_seed(tokens)
    sizes = [(2, tokens, count, 16) for count in (heads, key_heads, key_heads, heads)]
    return [
        torch.randn(size, generator=source, dtype=torch.float64).transpose(1, 2) for size in sizes
    ]


@pytest.mark.parametrize("tokens", [1, 2, 64, 65, 150])
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (6, 2)])
def test_it_is_the_definition_in_double_precision(tokens: int, heads: int, key_heads: int) -> None:
    *inputs, above = drawn(tokens, heads, key_heads)
    inputs = [x.requires_grad_() for x in inputs]
    found, wanted = (
        blockwise_attention(*inputs),
        eager_attention(inputs[0], inputs[1], inputs[2], None, is_causal=True),
    )
    # The definition takes its softmax in float32.
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    ours = torch.autograd.grad(found, inputs, above)
    theirs = torch.autograd.grad(wanted, inputs, above)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=3e-6)


def test_gradients_are_those_of_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "BLOCK_QUERIES", 2)
    source = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, 5, 3, generator=source, dtype=torch.float64, requires_grad=True)
        for heads in (4, 2, 2)
    )
    assert torch.autograd.gradcheck(blockwise_attention, (query, key, value))
    torch.library.opcheck(blockwise_attention, (query, key, value))


def test_in_bfloat16_it_is_as_near_the_truth_as_torchs_kernel() -> None:
    *exact, above = drawn(200, 6, 2)
    exact = [x.bfloat16().double().requires_grad_() for x in exact]
    half = [x.detach().bfloat16().requires_grad_() for x in exact]

    def errors(kernel: Any) -> list[float]:
        def both(inputs: list[torch.Tensor], way: Any) -> list[torch.Tensor]:
            mixed = way(*inputs)
            return [mixed, *torch.autograd.grad(mixed, inputs, above.to(mixed.dtype))]

        truth = both(exact, by_torch)
        found = both(half, kernel)
        return [
            ((one - other).norm() / other.norm()).item()
            for one, other in zip(found, truth, strict=True)
        ]

    def by_torch(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    ours, torchs = errors(blockwise_attention), errors(by_torch)
    assert all(one < 2 * other < 0.02 for one, other in zip(ours, torchs, strict=True))


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's compiler looks at it
def test_a_model_in_bfloat16_takes_it_and_learns_as_by_the_definition(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shape = ShapeConfig(dim=32, layers=2, heads=4, kv_heads=2, ffn=64, context=96)
    ids = torch.randint(0, 50, (2, 96), generator=torch.Generator().manual_seed(0))
    taken: list[int] = []

    def counted(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        taken.append(query.shape[2])
        return blockwise_attention(query, key, value)

    def learn(kind: Attention, *, is_compiled: bool = False) -> dict[str, torch.Tensor]:
        net = Transformer(shape, 50)
        net.attend_by(kind)
        if is_compiled:
            for block in net.blocks:
                block.compile(backend="aot_eager")
        with torch.autocast("cpu", torch.bfloat16):
            states = net.hidden(ids)
        assert states.dtype == torch.bfloat16
        states.float().square().sum().backward()
        return {
            name: value.grad for name, value in net.named_parameters() if value.grad is not None
        }

    compiled = learn("sdpa", is_compiled=True)
    wanted = learn("eager")
    monkeypatch.setattr("model.transformer.blockwise_attention", counted)
    ours = learn("sdpa")
    assert taken == [96] * 2
    for name, gradient in wanted.items():
        for found in (ours[name], compiled[name]):
            assert (found - gradient).norm() < 0.02 * gradient.norm(), name


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    ("dtype", "is_masked", "knows_groups"),
    [
        (torch.bfloat16, False, True),
        (torch.bfloat16, True, False),
        (torch.float32, False, False),
        (torch.float32, True, False),
    ],
)
@torch.no_grad()
def test_grouped_heads_reach_a_kernel_on_cuda_that_makes_no_scores(
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    dtype: torch.dtype,
    is_masked: bool,
    knows_groups: bool,
) -> None:
    told: list[tuple[int, bool]] = []

    def kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **how: Any) -> Any:
        told.append((key.shape[1], how["enable_gqa"]))
        return query

    monkeypatch.setattr(F, "scaled_dot_product_attention", kernel)
    # Tensors of a device that is not here, without content.
    with FakeTensorMode():
        query = torch.empty(2, 6, 8, 16, device=device, dtype=dtype)
        key = torch.empty(2, 2, 8, 16, device=device, dtype=dtype)
        allowed = torch.ones(1, 1, 8, 8, device=device, dtype=torch.bool) if is_masked else None
        fused_attention(query, key, key, allowed, is_causal=not is_masked)
    assert told == [(2, True) if knows_groups or device == "cpu" else (6, False)]
