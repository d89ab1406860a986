"""Attention: its definition, one query a row, packed documents each on its own, blocks of queries.

Letters of tensor shapes: B rows, T new tokens, S tokens that are seen, H query heads, K key and value
heads, E width of a head.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Attention = Literal["sdpa", "eager", "flash"]
LEAST_TOKENS = 16
"""Tokens of a document, on average, from which calling a kernel for each is faster than one mask."""


BLOCK_QUERIES = 64
"""Queries whose scores exist at a time in `blockwise_attention`; a CPU has them from its cache."""


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


def fused_attention(
    query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None, *, is_causal: bool
) -> Tensor:
    """`eager_attention` by torch's fused kernels."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.to(query.dtype), value.to(query.dtype)
    if groups > 1 and query.is_cuda and (allowed is not None or query.dtype == torch.float32):
        # FlashAttention takes neither masks nor float32; the kernel that does knows no groups, and without
        # it all scores would exist at once.
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=allowed,
        is_causal=is_causal,
        enable_gqa=query.shape[1] != key.shape[1],
    )


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


@torch.library.custom_op("bessemer::blockwise_attention", mutates_args=())
def blockwise_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention (B, H, T, E) of queries (B, H, T, E), keys and values (B, K, T, E); for bfloat16.

    Products and softmax are oneDNN's, a block of queries at a time; the backward pass computes the
    softmax again. On a CPU torch's fused kernel takes twice as long in bfloat16. An operator of its own,
    so that compiled code calls it and does not unroll it. Source: Dao et al. 2022 (FlashAttention),
    section 3.1, with whole rows of scores.
    """
    mixed = torch.empty_like(query)
    into, values = _by_key_head(mixed, key), value.flatten(0, 1)
    for block in _blocks(query, key):
        found = block.shares @ values[:, : block.end]
        into[..., block.places, :] = found.view(into[..., block.places, :].shape)
    return mixed


@torch.library.custom_op("bessemer::blockwise_attention_gradients", mutates_args=())
def _blockwise_gradients(
    by_mixed: Tensor, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """By query, key and value; what blocks add to the latter two is summed in float32 at least."""
    by_query = torch.empty_like(query)
    into, above = _by_key_head(by_query, key), _by_key_head(by_mixed, key)
    keys, values = key.flatten(0, 1), value.flatten(0, 1)
    by_key = torch.zeros_like(keys, dtype=torch.promote_types(key.dtype, torch.float32))
    by_value = torch.zeros_like(by_key)
    for block in _blocks(query, key):
        shares, seen = block.shares, slice(block.end)
        by_block = above[..., block.places, :].reshape(block.queries.shape)
        by_shares = by_block @ values[:, seen].transpose(1, 2)
        by_scores = torch.ops.aten._softmax_backward_data(by_shares, shares, -1, shares.dtype)
        by_value[:, seen] += shares.transpose(1, 2) @ by_block
        by_key[:, seen] += by_scores.transpose(1, 2) @ block.queries
        found = by_scores @ keys[:, seen]
        into[..., block.places, :] = found.view(into[..., block.places, :].shape)
    scale = query.shape[-1] ** -0.5
    by_key = by_key.mul_(scale).to(key.dtype).view(key.shape)
    return by_query.mul_(scale), by_key, by_value.to(value.dtype).view(value.shape)


@blockwise_attention.register_fake
def _(query: Tensor, _key: Tensor, _value: Tensor) -> Tensor:
    return torch.empty_like(query)


@_blockwise_gradients.register_fake
def _(_by_mixed: Tensor, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    return torch.empty_like(query), key.new_empty(key.shape), value.new_empty(value.shape)


def _keep_inputs(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, by_mixed: Tensor) -> tuple[Tensor, ...]:
    return _blockwise_gradients(by_mixed, *ctx.saved_tensors)


blockwise_attention.register_autograd(_backward, setup_context=_keep_inputs)


@dataclass(frozen=True)
class _Block:
    """Some queries and what they take from all tokens up to them; heads of a group are rows."""

    places: slice
    end: int
    queries: Tensor
    """(B K, rows, E)"""
    shares: Tensor
    """(B K, rows, end): softmax of the scores."""


def _blocks(query: Tensor, key: Tensor) -> Iterator[_Block]:
    grouped = _by_key_head(query, key)
    groups, tokens, width = grouped.shape[2:]
    keys, nothing = key.flatten(0, 1).transpose(1, 2), query.new_empty(())
    later = query.new_full((BLOCK_QUERIES, BLOCK_QUERIES), -math.inf).triu_(1)
    for start in range(0, tokens, BLOCK_QUERIES):
        end = min(tokens, start + BLOCK_QUERIES)
        places, size = slice(start, end), end - start
        queries = grouped[..., places, :].reshape(-1, groups * size, width)
        scores = torch.baddbmm(nothing, queries, keys[..., :end], beta=0, alpha=width**-0.5)
        scores.view(-1, size, end)[..., places] += later[:size, :size]
        yield _Block(places, end, queries, scores.softmax(-1))


def _by_key_head(x: Tensor, key: Tensor) -> Tensor:
    """(B, K, H / K, T, E) of (B, H, T, E), the same memory."""
    return x.unflatten(1, (key.shape[1], -1))


def _end_to_end(x: Tensor) -> Tensor:
    """(B T, H, E) of (B, H, T, E)."""
    return x.transpose(1, 2).flatten(0, 1)


def _in_rows(x: Tensor, like: Tensor) -> Tensor:
    """(B, H, T, E), as `like`, of (B T, H, E)."""
    rows, _, tokens, _ = like.shape
    return x.view(rows, tokens, *x.shape[1:]).transpose(1, 2)
