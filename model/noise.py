"""Dropout that a seed and a place decide."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Noise:
    """Dropout whose noise is a pure function of what it is for, on any device and split of the batch."""

    seed: int
    rows: Tensor
    """(B,) int64: number of each row among all that training sees."""

    def drop(self, x: Tensor, site: int, rate: float) -> Tensor:
        """Set a share `rate` of x (B, T, D) to zero and scale the rest by 1 / (1 - rate)."""
        _, tokens, width = x.shape
        key = _mix32(_mix32(self.rows * 0x9E3779B1 + self.seed) + site)
        place = torch.arange(tokens * width, device=x.device).view(1, tokens, width)
        bits = _mix32(key[:, None, None] + place * 0x9E3779B1)
        keep = bits >= int(rate * 2**32)
        return torch.where(keep, x / (1.0 - rate), 0.0)


def _mix32(x: Tensor) -> Tensor:
    """A good 32-bit integer hash, in int64 tensors. Source: Wellons 2018, lowbias32."""
    x = x & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)
