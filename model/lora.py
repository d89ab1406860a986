"""Low-rank adaptation: what training adds to each matrix of the blocks is a product of two thin ones.

Source: Hu et al. 2022 (LoRA), section 4.1.
"""

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from conf.lora import LoraConfig
from model.linear import Linear, linear
from model.transformer import Transformer


class LoraLinear(nn.Module):
    """x W' + scale (x A') B', of which A (rank, in) and B (out, rank) learn and W does not.

    B starts at zero, so that an untrained model computes what it did.
    """

    def __init__(self, plain: nn.Linear, rank: int, scale: float, source: torch.Generator) -> None:
        super().__init__()
        width_out, width_in = plain.weight.shape
        self.weight, self.bias, self.scale = plain.weight, plain.bias, scale
        drawn = torch.empty(rank, width_in).normal_(0, width_in**-0.5, generator=source)
        self.narrow = nn.Parameter(drawn.to(plain.weight.device))
        self.widen = nn.Parameter(torch.zeros(width_out, rank, device=plain.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        whole = linear(x, self.weight, self.bias)
        return whole + linear(linear(x, self.narrow), self.widen) * self.scale

    def merged(self) -> Linear:
        """A plain layer that computes the same."""
        width_out, width_in = self.weight.shape
        plain = Linear(width_in, width_out, bias=False)
        added = self.scale * (self.widen.double() @ self.narrow.double())
        plain.weight = nn.Parameter((self.weight.double() + added).to(self.weight.dtype))
        plain.bias = self.bias
        return plain


def add_lora(model: Transformer, settings: LoraConfig, seed: int) -> None:
    """Freeze the model and give each matrix of its blocks a correction to learn; nothing at rank 0."""
    if not settings.rank:
        return
    source = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    for block in cast("Iterable[nn.Module]", model.blocks):
        for name, child in list(block.named_children()):
            if isinstance(child, nn.Linear):
                scale = settings.alpha / settings.rank
                setattr(block, name, LoraLinear(child, settings.rank, scale, source))


@contextmanager
def correction_off(model: Transformer) -> Generator[None]:
    """The model computes as before it learnt, until the block ends: it is its own reference."""
    layers = [module for module in model.modules() if isinstance(module, LoraLinear)]
    scales = [layer.scale for layer in layers]
    try:
        for layer in layers:
            layer.scale = 0.0
        yield
    finally:
        for layer, scale in zip(layers, scales, strict=True):
            layer.scale = scale


@torch.no_grad()
def merge_lora(model: Transformer) -> None:
    """Add every correction to its matrix; the model is plain again, and all of it can learn."""
    for block in cast("Iterable[nn.Module]", model.blocks):
        for name, child in list(block.named_children()):
            if isinstance(child, LoraLinear):
                setattr(block, name, child.merged())
    model.requires_grad_(True)
