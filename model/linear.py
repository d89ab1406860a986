"""Matrix products of linear layers, on a CPU by the faster of torch's two libraries.

torch multiplies float32 matrices by MKL, which leaves half of an AMD processor's vector width unused;
oneDNN, which torch takes for bfloat16 and brings along, does not.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HAS_ONEDNN = (
    torch.backends.mkldnn.is_available()
    and torch.backends.cpu.get_cpu_capability() == "AVX512"
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)
"""Whether oneDNN is here, on a processor on which it is the faster one."""
SMALLEST = 1 << 25
"""Multiplications from which a product is worth oneDNN, which makes code for each new size (1 to 3 ms)."""


class Linear(nn.Linear):
    """torch's linear layer, with the products of `linear`."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return linear(input, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(..., N) of x (..., K), a weight (N, K) and a bias (N,): `torch.nn.functional.linear`."""
    if not _is_plain(x, weight) or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    found = cast("Tensor", Product.apply(x.reshape(-1, x.shape[-1]), weight))
    found = found.view(*x.shape[:-1], -1)
    return found if bias is None else found + bias


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x W', (M, N), of x (M, K) and W (N, K), both in any order in memory; not differentiable."""
    if _is_plain(x, weight):
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return x @ weight.t()


def weight_gradient(by_output: Tensor, x: Tensor) -> Tensor:
    """(N, K): gradient of a weight, of that of the output (M, N) and the input (M, K)."""
    # oneDNN copies the left side into rows: the narrower one is to be it. CUDA reads either way, and writes
    # the gradient as the weight lies.
    if by_output.shape[1] <= x.shape[1] or x.is_cuda:
        return product(by_output.t(), x.t())
    return product(x.t(), by_output.t()).t()


class Product(torch.autograd.Function):
    """`product` with its gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(x, weight)
        return product(x, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        [gradient] = gradients
        x, weight = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad
        return (
            product(gradient, weight.t()) if needs_x else None,
            weight_gradient(gradient, x) if needs_weight else None,
        )


def _is_plain(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN takes the product: float32 on a CPU, large, and not spread over ranks."""
    return (
        HAS_ONEDNN
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and type(weight) in (Tensor, nn.Parameter)
        and x.numel() * weight.shape[0] >= SMALLEST
    )
