"""Attention: its definition, one query a row, and packed documents each on its own.

Letters of tensor shapes: B rows, T new tokens, S tokens that are seen, H query heads, K key and value
heads, E width of a head.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Attention = Literal["sdpa", "eager", "flash"]
LEAST_TOKENS = 16
"""Tokens of a document, on average, from which calling a kernel for each is faster than one mask."""


@dataclass(frozen=True)
class Documents:
    """Packed rows (B, T) as one sequence of documents that do not see one another: no mask is made."""

    lengths: tuple[int, ...]
    """Tokens of each, row by row; no document goes on in the next row."""
    ends: Tensor
    """(P,) int32: 0, and behind each document so many tokens; then the last one again, up to a power of
    two, so that compiled code meets few sizes."""
    row_tokens: int

    @classmethod
    def of(cls, numbers: Tensor) -> "Documents | None":
        """By the numbers (B, T) of `AttentionMask`; none where one comes again behind another."""
        if bool((numbers[:, 1:] < numbers[:, :-1]).any()):
            return None
        is_first = torch.ones_like(numbers, dtype=torch.bool)
        is_first[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
        places: list[int] = [*is_first.flatten().nonzero().flatten().tolist(), numbers.numel()]
        padded = places + [places[-1]] * ((1 << (len(places) - 1).bit_length()) - len(places))
        ends = torch.tensor(padded, dtype=torch.int32, device=numbers.device)
        return cls(tuple(b - a for a, b in pairwise(places)), ends, numbers.shape[1])

    @property
    def is_long(self) -> bool:
        """Whether they are long enough to be taken one by one."""
        return sum(self.lengths) >= LEAST_TOKENS * len(self.lengths)


@torch.compiler.disable
def attention_one_by_one(query: Tensor, key: Tensor, value: Tensor, documents: Documents) -> Tensor:
    """Causal attention within documents, (B, H, T, E), by a call of torch's fused kernel for each.

    Its work grows with the squares of their lengths, that of a masked kernel with the square of T. In
    float32, which takes a CPU half the time of bfloat16 where documents are short.
    """
    lengths = list(documents.lengths)
    queries, keys, values = (_end_to_end(x).float().split(lengths) for x in (query, key, value))
    with torch.autocast(query.device.type, enabled=False):
        mixed = [
            F.scaled_dot_product_attention(
                one.transpose(0, 1)[None],
                its_keys.transpose(0, 1)[None],
                its_values.transpose(0, 1)[None],
                is_causal=True,
                enable_gqa=query.shape[1] != key.shape[1],
            )[0].transpose(0, 1)
            for one, its_keys, its_values in zip(queries, keys, values, strict=True)
        ]
    return _in_rows(torch.cat(mixed).to(query.dtype), query)


def flash_attention(
    query: Tensor, key: Tensor, value: Tensor, documents: Documents, window: int
) -> Tensor:
    """The same in one call of FlashAttention, on CUDA in 16 bits; with a window of so many tokens."""
    from torch.nn.attention.varlen import varlen_attn

    mixed = varlen_attn(
        _end_to_end(query),
        _end_to_end(key),
        _end_to_end(value),
        documents.ends,
        documents.ends,
        documents.row_tokens,
        documents.row_tokens,
        window_size=(window - 1 if window else -1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(mixed, Tensor), "no auxiliary output was asked for"
    return _in_rows(mixed, query)


def eager_attention(
    query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None, *, is_causal: bool
) -> Tensor:
    """Attention as it is defined, (B, H, T, E), of queries (B, H, T, E), keys and values (B, K, S, E).

    The softmax is float32. Source: Vaswani et al. 2017, equation 1; grouped heads: Ainslie et al. 2023.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = (query @ key.to(query.dtype).transpose(-2, -1)).float() / math.sqrt(query.shape[-1])
    if is_causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -math.inf)
    return scores.softmax(-1).to(query.dtype) @ value.to(query.dtype)


def one_token_attention(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor) -> Tensor:
    """`eager_attention` of one query a row, (B, H, 1, E), without a copy of grouped heads.

    On a CPU torch's fused kernel takes 1.1 times as long in float32 and five times in bfloat16.
    """
    rows, heads, _, width = query.shape
    grouped = query.view(rows, key.shape[1], -1, width)  # (B, K, H / K, E)
    scores = (grouped @ key.transpose(-2, -1)).float() / math.sqrt(width)
    shares = scores.masked_fill(~allowed, -math.inf).softmax(-1).to(value.dtype)
    return (shares @ value).view(rows, heads, 1, width)


def _end_to_end(x: Tensor) -> Tensor:
    """(B T, H, E) of (B, H, T, E)."""
    return x.transpose(1, 2).flatten(0, 1)


def _in_rows(x: Tensor, like: Tensor) -> Tensor:
    """(B, H, T, E), as `like`, of (B T, H, E)."""
    rows, _, tokens, _ = like.shape
    return x.view(rows, tokens, *x.shape[1:]).transpose(1, 2)
