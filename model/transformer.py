"""The whole model: a Llama-family decoder, its mask, its key-value cache and its output head.

Letters of tensor shapes: B rows, T new tokens, S tokens that are seen, D width, H query heads, K key
and value heads, E width of a head, V vocabulary.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init
from torch.utils.checkpoint import checkpoint

from conf.shape import RopeScalingConfig, ShapeConfig
from model.attention import (
    Attention,
    Documents,
    attention_one_by_one,
    blockwise_attention,
    eager_attention,
    flash_attention,
    fused_attention,
    one_token_attention,
)
from model.linear import Linear, linear
from model.noise import Noise
from model.packing import Packing

INIT_STD = 0.02
LOGITS_AT_ONCE = 1 << 26
"""Logits (rows x vocabulary) held at a time by `token_logprobs`; above it the head runs in chunks
whose logits are computed again in the backward pass."""
SOFTMAX_ROWS = 128
"""Rows of logits whose softmax a CPU takes together."""


@dataclass(frozen=True)
class AttentionMask:
    """Which tokens may see which, beyond causality; an empty mask is the fast causal path.

    Padding on the right needs no mask: no real token comes after it.
    """

    documents: Tensor | None = None
    """(B, T) integers: a token sees only tokens of its own row with the same number."""
    padding: Tensor | None = None
    """(B,) integers: so many tokens at the left of each row are padding, seen by no real token.
    Positions are counted from the first real token unless they are given."""
    prefix: Tensor | None = None
    """(B,) integers: so many tokens at the left of each row see one another, also forwards."""


class Cache:
    """Keys and values of the tokens seen so far, in memory allocated once; `length` of it is filled.

    With `lengths` the rows are filled each to its own length, `length` is the longest one's, and they are
    extended by one token at a time. Either way the first rows are extended, as many as there are keys.
    """

    def __init__(
        self,
        shape: ShapeConfig,
        rows: int,
        tokens: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        size = (rows, shape.kv_heads, tokens, shape.head_width)
        self.length = 0
        self.lengths: Tensor | None = None
        self.layers = [
            (
                torch.zeros(size, device=device, dtype=dtype),
                torch.zeros(size, device=device, dtype=dtype),
            )
            for _ in range(shape.layers)
        ]

    @property
    def room(self) -> int:
        """Tokens that fit in all."""
        return self.layers[0][0].shape[2]

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write (B, K, T, E) behind what is there; everything so far, (B, K, S, E) each."""
        end = self.length + keys.shape[2]
        all_keys, all_values = self.layers[layer]
        if self.lengths is not None:
            assert keys.shape[2] == 1, "rows of unequal lengths are extended token by token"
            rows = torch.arange(len(keys), device=keys.device)
            all_keys[rows, :, self.lengths] = keys[:, :, 0].to(all_keys.dtype)
            all_values[rows, :, self.lengths] = values[:, :, 0].to(all_values.dtype)
        else:
            all_keys[: len(keys), :, self.length : end] = keys
            all_values[: len(keys), :, self.length : end] = values
        return all_keys[: len(keys), :, :end], all_values[: len(keys), :, :end]

    def select(self, rows: Tensor) -> None:
        """Keep only those rows, in that order; a number may occur twice."""
        self.layers = [(keys[rows], values[rows]) for keys, values in self.layers]


class RMSNorm(nn.Module):
    """Root mean square norm with a learnt scale. Source: Zhang and Sennrich 2019, equation 4."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        normed = F.rms_norm(x.to(weight.dtype), weight.shape, weight, self.eps)
        # Once, and not by autocast for each product that reads it.
        kind = x.device.type
        is_mixed = torch.is_autocast_enabled(kind)
        return normed.to(torch.get_autocast_dtype(kind)) if is_mixed else normed


class Block(nn.Module):
    """Attention and SwiGLU, each behind a norm, each added to the residual stream."""

    def __init__(self, shape: ShapeConfig, layer: int) -> None:
        super().__init__()
        width, heads, kv_heads = shape.head_width, shape.heads, shape.kv_heads
        self.layer, self.head_width, self.dropout = layer, width, shape.dropout
        self.has_rope = layer not in shape.no_rope_layers
        self.is_windowed = layer in shape.windowed_layers
        self.window = shape.sliding_window if self.is_windowed else 0
        self.attention: Attention = "sdpa"
        self.attention_norm = RMSNorm(shape.dim, shape.norm_eps)
        self.query = _linear(shape.dim, heads * width, has_bias=shape.has_qkv_bias)
        self.key = _linear(shape.dim, kv_heads * width, has_bias=shape.has_qkv_bias)
        self.value = _linear(shape.dim, kv_heads * width, has_bias=shape.has_qkv_bias)
        self.query_norm = RMSNorm(width, shape.norm_eps) if shape.has_qk_norm else None
        self.key_norm = RMSNorm(width, shape.norm_eps) if shape.has_qk_norm else None
        self.attention_out = _linear(heads * width, shape.dim)
        self.ffn_norm = RMSNorm(shape.dim, shape.norm_eps)
        self.gate = _linear(shape.dim, shape.ffn_width)
        self.up = _linear(shape.dim, shape.ffn_width)
        self.ffn_out = _linear(shape.ffn_width, shape.dim)

    def forward(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor],
        allowed: Tensor | Documents | None,
        cache: Cache | None,
        noise: Noise | None,
        packing: Packing | None = None,
        is_last: bool = False,
    ) -> Tensor:
        mixed = self._attention(self.attention_norm(x), rotation, allowed, cache, packing)
        if packing is not None and is_last:
            x, mixed = packing.asked(x), packing.asked(mixed)
        branch = self.attention_out(mixed)
        if noise is not None and self.dropout:
            branch = noise.drop(branch, 2 * self.layer, self.dropout)
        x = x + branch
        y = self.ffn_norm(x)
        branch = self.ffn_out(F.silu(self.gate(y)) * self.up(y))
        if noise is not None and self.dropout:
            branch = noise.drop(branch, 2 * self.layer + 1, self.dropout)
        return x + branch

    def _attention(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor],
        allowed: Tensor | Documents | None,
        cache: Cache | None,
        packing: Packing | None,
    ) -> Tensor:
        query, key, value = self.query(x), self.key(x), self.value(x)
        if packing is not None:
            query, key, value = map(packing.apart, (query, key, value))
        rows, tokens, _ = query.shape
        by_head = (rows, tokens, -1, self.head_width)
        query = query.view(by_head).transpose(1, 2)  # (B, H, T, E)
        key = key.view(by_head).transpose(1, 2)  # (B, K, T, E)
        value = value.view(by_head).transpose(1, 2)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        if self.has_rope:
            query, key = _rotate(query, *rotation), _rotate(key, *rotation)
        if cache is not None:
            key, value = cache.extend(self.layer, key, value)
        # One new token sees all that is cached; several with nothing masked are a plain triangle.
        is_causal = allowed is None and tokens > 1
        if isinstance(allowed, Documents):
            if self.attention == "flash":
                mixed = flash_attention(query, key, value, allowed, self.window)
            else:
                mixed = attention_one_by_one(query, key, value, allowed)  # pyright: ignore[reportCallIssue]
        elif self.attention == "eager":
            mixed = eager_attention(query, key, value, allowed, is_causal=is_causal)
        elif cache is not None and cache.lengths is not None:
            assert allowed is not None, "rows of unequal lengths have a mask"
            mixed = one_token_attention(query, key, value, allowed)
        elif is_causal and query.device.type == "cpu" and query.dtype == torch.bfloat16:
            mixed = blockwise_attention(query, key.to(query.dtype), value.to(query.dtype))
        else:
            mixed = fused_attention(query, key, value, allowed, is_causal=is_causal)
        mixed = mixed.transpose(1, 2).reshape(rows, tokens, -1)
        return mixed if packing is None else packing.together(mixed)


class Transformer(nn.Module):
    """A decoder with a vocabulary head, or (`is_scalar`) one number per token: reward, value.

    Source: Touvron et al. 2023 (LLaMA), section 2.2; qk norm as in Qwen3, qkv bias as in Qwen2, sliding
    window as in Mistral 7B, layers without positions as in SmolLM3.
    """

    cosine: Tensor
    sine: Tensor

    def __init__(
        self, shape: ShapeConfig, vocabulary: int, *, is_scalar: bool = False, seed: int = 0
    ) -> None:
        super().__init__()
        self.shape, self.vocabulary, self.is_scalar = shape, vocabulary, is_scalar
        self.attention: Attention = "sdpa"
        # Not by skip_init, which draws normal numbers on no device, and for that imports torch's
        # compiler: a second of each worker's start.
        self.embedding = nn.Embedding.from_pretrained(
            torch.empty(vocabulary, shape.dim), freeze=False
        )
        self.blocks = nn.ModuleList(Block(shape, layer) for layer in range(shape.layers))
        self.norm = RMSNorm(shape.dim, shape.norm_eps)
        self.head = None if is_scalar or shape.is_tied else _linear(shape.dim, vocabulary)
        self.score_head = _linear(shape.dim, 1) if is_scalar else None
        cosine, sine = _rotations(shape)
        self.register_buffer("cosine", cosine, persistent=False)
        self.register_buffer("sine", sine, persistent=False)
        self.initialise(seed)

    def initialise(self, seed: int) -> None:
        """Draw every weight anew: normal(0, 0.02), residual projections 0.02 / sqrt(2 layers), norms 1.

        A scalar head is normal(0, 1 / sqrt(dim + 1)) (Stiennon et al. 2020, appendix C). The weights
        are a pure function of the seed and the shape, whatever the device.
        """
        generator = torch.Generator().manual_seed(seed)
        residual_std = INIT_STD / math.sqrt(2 * self.shape.layers)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name.endswith("norm.weight"):
                    parameter.fill_(1.0)
                elif name.endswith("bias"):
                    parameter.zero_()
                else:
                    std = INIT_STD
                    if name.endswith("_out.weight"):
                        std = residual_std
                    elif name.startswith("score_head"):
                        std = 1 / math.sqrt(self.shape.dim + 1)
                    parameter.copy_(
                        torch.empty(parameter.shape).normal_(0, std, generator=generator)
                    )

    @property
    def head_weight(self) -> Tensor:
        """(V, D): the output head, which is the embedding where they are tied."""
        assert not self.is_scalar, "a scalar model has no vocabulary head"
        return self.embedding.weight if self.head is None else self.head.weight

    def hidden(
        self,
        ids: Tensor,
        *,
        positions: Tensor | None = None,
        mask: AttentionMask | None = None,
        cache: Cache | None = None,
        noise: Noise | None = None,
        packing: Packing | None = None,
    ) -> Tensor:
        """States after the final norm, (B, T, D), of token ids (B, T); with a packing (1, W, D) of (1, T).

        `positions`, (T,) or (B, T), count from 0 by default, behind the cache and without left
        padding. With a cache the ids follow what it holds, and it is extended. `noise` turns the
        shape's dropout on. With a packing positions and mask are those of its sequences. Raises ValueError
        when a row is longer than the model's context.
        """
        past = 0 if cache is None else cache.length
        total = past + (ids if packing is None else packing.places).shape[1]
        lengths = None if cache is None else cache.lengths
        if positions is None:
            positions = _positions(past, total, mask, self.shape.context, ids.device)
            positions = positions if lengths is None else lengths[:, None]
        rotation = (self.cosine[positions], self.sine[positions])  # (T, E) or (B, T, E)
        if positions.dim() == 2:
            rotation = (rotation[0][:, None], rotation[1][:, None])
        window = self.shape.sliding_window
        if lengths is None:
            allowed = self._seen(mask, past, total, ids.device)
            near = self._seen(mask, past, total, ids.device, window) if window else allowed
        else:
            allowed = _allowed_to_last(lengths, total)
            near = _allowed_to_last(lengths, total, window) if window else allowed
        x = self.embedding(ids)
        for number, block in enumerate(cast("Iterable[Block]", self.blocks), 1):
            here = near if block.is_windowed else allowed
            x = block(x, rotation, here, cache, noise, packing, number == len(self.blocks))
        if cache is not None:
            cache.length = total
        return self.norm(x)

    def _seen(
        self,
        mask: AttentionMask | None,
        past: int,
        total: int,
        device: torch.device,
        window: int = 0,
    ) -> Tensor | Documents | None:
        """What `_allowed` says, or where it is documents alone, these without a mask."""
        if mask is not None and mask.documents is not None and mask.padding is mask.prefix is None:
            # FlashAttention takes 16 bits only: not where held-out text is looked at in float32.
            is_flash = self.attention == "flash" and torch.is_autocast_enabled(device.type)
            is_cpus = self.attention == "sdpa" and device.type == "cpu" and not 0 < window < total
            documents = Documents.of(mask.documents) if is_flash or is_cpus else None
            if documents is not None and (is_flash or documents.is_long):
                return documents
        return _allowed(mask, past, total, device, window)

    def attend_by(self, attention: Attention) -> None:
        """Compute attention by its definition (`eager`), by torch's fused kernels (`sdpa`), or where there
        are documents without a mask on CUDA (`flash`)."""
        self.attention = attention
        for block in cast("Iterable[Block]", self.blocks):
            block.attention = attention

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., V) of hidden states (..., D)."""
        return linear(hidden, self.head_weight)

    def score(self, hidden: Tensor) -> Tensor:
        """(...) float32: the scalar of each hidden state (..., D)."""
        assert self.score_head is not None, "a model with a vocabulary head has no scalar"
        return self.score_head(hidden).squeeze(-1).float()


def token_logprobs(
    head_weight: Tensor, hidden: Tensor, labels: Tensor, temperature: float = 1.0
) -> Tensor:
    """Log-probability of each label, (...) float32, of hidden states (..., D); 0 where a label is < 0.

    Only states with a label pass through the head (V, D), in chunks when their logits would not fit
    `LOGITS_AT_ONCE`. `temperature` divides the logits.
    """
    wanted = labels >= 0
    is_all = bool(wanted.all())
    states = hidden.reshape(-1, hidden.shape[-1]) if is_all else hidden[wanted]  # (N, D)
    chosen = labels.reshape(-1) if is_all else labels[wanted]  # (N,)
    rows = max(1, LOGITS_AT_ONCE // head_weight.shape[0])
    if len(chosen) <= rows:
        found = _chunk_logprobs(head_weight, states, chosen, temperature)
    else:
        parts = [
            checkpoint(_chunk_logprobs, head_weight, part, label, temperature, use_reentrant=False)
            for part, label in zip(states.split(rows), chosen.split(rows), strict=True)
        ]
        found = torch.cat(cast("list[Tensor]", parts))
    if is_all:
        return found.view(labels.shape)
    return torch.zeros(labels.shape, device=found.device).masked_scatter(wanted, found)


def _chunk_logprobs(
    head_weight: Tensor, states: Tensor, labels: Tensor, temperature: float
) -> Tensor:
    logits = linear(states, head_weight).float()
    if temperature != 1.0:
        logits = logits / temperature
    # In parts that fit a CPU's cache; an accelerator has more of a few large kernels.
    rows = max(1, len(labels)) if logits.is_cuda else SOFTMAX_ROWS
    parts = zip(logits.split(rows), labels.split(rows), strict=True)
    return -torch.cat([F.cross_entropy(part, label, reduction="none") for part, label in parts])


def _linear(width_in: int, width_out: int, *, has_bias: bool = False) -> Linear:
    return cast("Linear", skip_init(Linear, width_in, width_out, bias=has_bias))


def rope_frequencies(shape: ShapeConfig) -> Tensor:
    """Radians per position of each rotated pair, (E / 2,) float64.

    Source: Su et al. 2021, section 3.2.2.
    """
    half = shape.head_width // 2
    frequency = shape.rope_theta ** -(torch.arange(half, dtype=torch.float64) / half)
    return frequency if shape.rope_scaling is None else _stretched(frequency, shape.rope_scaling)


def _rotations(shape: ShapeConfig) -> tuple[Tensor, Tensor]:
    """Cosine and signed sine of every position, (context, E). Source: Su et al. 2021, equation 34."""
    positions = torch.arange(shape.context, dtype=torch.float64)
    angle = torch.outer(positions, rope_frequencies(shape))
    cosine, sine = angle.cos().float(), angle.sin().float()
    return torch.cat([cosine, cosine], -1), torch.cat([-sine, sine], -1)


def _stretched(frequency: Tensor, scaling: RopeScalingConfig) -> Tensor:
    """Frequencies for a longer context: slow ones are divided by the factor, fast ones are kept.

    Source: Llama 3.1's reference code, `apply_scaling`.
    """
    turns = scaling.original_context * frequency / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0, 1)
    return kept * frequency + (1 - kept) * frequency / scaling.factor


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate pairs (i, i + E/2) of (B, heads, T, E): the layout of Hugging Face's Llama."""
    return (x * cosine + x.roll(x.shape[-1] // 2, -1) * sine).to(x.dtype)


def _positions(
    past: int, total: int, mask: AttentionMask | None, context: int, device: torch.device
) -> Tensor:
    padding = None if mask is None else mask.padding
    if total > context and (padding is None or total - int(padding.min()) > context):
        raise ValueError(
            f"a row of {total} tokens is longer than the model's context of {context}; shorten it or "
            f"train a shape with a longer context"
        )
    positions = torch.arange(past, total, device=device)
    return positions if padding is None else (positions - padding[:, None]).clamp(min=0)


def _allowed(
    mask: AttentionMask | None, past: int, total: int, device: torch.device, window: int = 0
) -> Tensor | None:
    """(1 or B, 1, T, S) booleans, or none where plain causal attention says the same.

    With a window a token sees so many places, its own among them; 0 for all.
    """
    is_plain = mask is None or (
        mask.documents is None and mask.padding is None and mask.prefix is None
    )
    is_near = 0 < window < total
    if is_plain and not is_near and (past == 0 or total - past == 1):
        return None
    seen = torch.arange(total, device=device)
    new = seen[past:, None]  # (T, 1)
    allowed = (seen <= new)[None]  # (1, T, S)
    if is_near:
        allowed = allowed & (seen > new - window)
    if mask is not None and mask.prefix is not None:
        assert past == 0, "a prefix is read at once, not through a cache"
        end = mask.prefix[:, None, None]
        allowed = allowed | ((seen < end) & (new < end))
    if mask is not None and mask.padding is not None:
        # A padding token sees itself, so that no row of the softmax is empty.
        allowed = allowed & ((seen >= mask.padding[:, None, None]) | (seen == new))
    if mask is not None and mask.documents is not None:
        assert past == 0, "packed rows are read at once, not through a cache"
        allowed = allowed & (mask.documents[:, :, None] == mask.documents[:, None, :])
    return allowed[:, None]


def _allowed_to_last(lengths: Tensor, total: int, window: int = 0) -> Tensor:
    """(B, 1, 1, S) booleans: what the one new token of each row sees, which stands at its length."""
    seen = torch.arange(total, device=lengths.device)
    allowed = seen <= lengths[:, None]
    if window:
        allowed = allowed & (seen > lengths[:, None] - window)
    return allowed[:, None, None]
