"""Products by oneDNN and by torch's own kernels: the same numbers and gradients, whatever the layout."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import model.linear as products
from model.linear import Linear, linear, weight_gradient

needs_onednn = pytest.mark.skipif(
    not products.HAS_ONEDNN, reason="no processor on which oneDNN is the faster library"
)


def drawn(*shape: int, seed: int) -> torch.Tensor:
    source = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=source, dtype=torch.float64)


@needs_onednn
@pytest.mark.parametrize(("width", "wide"), [(24, 56), (56, 24)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_output_and_gradients_are_the_definitions_in_double_precision(
    monkeypatch: pytest.MonkeyPatch, width: int, wide: int, has_bias: bool
) -> None:
    monkeypatch.setattr(products, "SMALLEST", 0)
    truth = [drawn(3, 40, width, seed=0), drawn(wide, width, seed=1), drawn(wide, seed=2)]
    ours = [x.float().requires_grad_() for x in truth[: 2 + has_bias]]
    theirs = [x.requires_grad_() for x in truth[: 2 + has_bias]]
    back = drawn(3, 40, wide, seed=3)
    found, wanted = linear(*ours), F.linear(*theirs)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    found.backward(back.float())
    wanted.backward(back)
    for one, other in zip(ours, theirs, strict=True):
        assert one.grad is not None
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=1e-5, atol=1e-4)


@needs_onednn
def test_frozen_weights_and_inputs_get_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "SMALLEST", 0)
    for learning in (0, 1):
        both = [drawn(4, 8, seed=0).float(), drawn(6, 8, seed=1).float()]
        both[learning].requires_grad_()
        linear(*both).sum().backward()
        assert [x.grad is not None for x in both] == [learning == 0, learning == 1]


def test_small_products_halves_and_autocast_are_torchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("no product for oneDNN")

    monkeypatch.setattr(products.Product, "apply", refuse)
    layer, x = Linear(8, 6), torch.ones(4, 8)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    monkeypatch.setattr(products, "SMALLEST", 0)
    assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert Linear(8, 6)(x).dtype == torch.bfloat16


@pytest.mark.parametrize(("width", "wide"), [(24, 56), (56, 24)])
def test_on_cuda_a_gradient_lies_as_its_weight_does(width: int, wide: int) -> None:
    with FakeTensorMode():
        x, above = (torch.empty(8, size, device="cuda") for size in (width, wide))
        found = weight_gradient(above, x)
        assert (found.shape, found.is_contiguous()) == ((wide, width), True)
