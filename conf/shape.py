"""The shape of a model: everything that decides its parameters and how they are read."""

from typing import Annotated

from pydantic import Field, model_validator

from conf.settings import Settings

Layer = Annotated[int, Field(ge=0)]
LARGEST_EMBEDDING_SHARE = 0.5
"""Above it, most of what is trained is a table that a token reads one row of."""


class RopeScalingConfig(Settings):
    """How rotary frequencies were stretched for a longer context (Llama 3.1)."""

    factor: Annotated[float, Field(ge=1)]
    """Frequencies that turn less than `low_freq_factor` times in the original context are divided
    by it."""
    low_freq_factor: Annotated[float, Field(gt=0)] = 1.0
    """Turns in the original context below which a frequency is divided by the whole factor."""
    high_freq_factor: Annotated[float, Field(gt=0)] = 4.0
    """Turns from which a frequency stays as it is; in between the division fades in."""
    original_context: Annotated[int, Field(ge=1)] = 8192
    """Context in tokens that the model had before."""

    @model_validator(mode="after")
    def _low_is_below_high(self) -> "RopeScalingConfig":
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor={self.low_freq_factor:g} is not below "
                f"high_freq_factor={self.high_freq_factor:g}; Llama 3.1 has 1 and 4"
            )
        return self


class ShapeConfig(Settings):
    """A Llama-family decoder."""

    dim: Annotated[int, Field(ge=8)] = 128
    """Width of the residual stream."""
    layers: Annotated[int, Field(ge=1)] = 3
    """Number of blocks."""
    heads: Annotated[int, Field(ge=1)] = 4
    """Query heads."""
    kv_heads: Annotated[int, Field(ge=1)] = 2
    """Key and value heads; heads is a multiple of it (grouped-query attention)."""
    head_dim: Annotated[int, Field(ge=0)] = 0
    """Width of a head; 0 for dim / heads. Even."""
    ffn: Annotated[int, Field(ge=0)] = 0
    """Width of the SwiGLU layer; 0 for 8/3 dim rounded up to `multiple_of`."""
    multiple_of: Annotated[int, Field(ge=1)] = 8
    """Rounding of `ffn` where it is not given."""
    context: Annotated[int, Field(ge=8)] = 256
    """Longest sequence in tokens."""
    rope_theta: Annotated[float, Field(gt=0)] = 10_000.0
    """Base of the rotary position embedding."""
    rope_scaling: RopeScalingConfig | None = None
    """Stretching of the rotary frequencies; none where the model was trained at its context."""
    no_rope_layers: tuple[Layer, ...] = ()
    """Layers, from 0, that are told no positions (SmolLM3: every fourth)."""
    sliding_window: Annotated[int, Field(ge=0)] = 0
    """A token sees so many tokens, itself among them; 0 for all before it (Mistral 7B: 4096)."""
    full_layers: tuple[Layer, ...] = ()
    """Layers, from 0, that see all tokens in spite of `sliding_window`."""
    norm_eps: Annotated[float, Field(gt=0)] = 1e-5
    """Epsilon of RMSNorm."""
    is_tied: bool = True
    """Whether the output head shares the embedding's weights."""
    has_qkv_bias: bool = False
    """Whether the query, key and value projections have a bias (Qwen2)."""
    has_qk_norm: bool = False
    """Whether queries and keys are normalised per head (Qwen3)."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout of the residual branches in pretraining."""

    @model_validator(mode="after")
    def _heads_divide(self) -> "ShapeConfig":
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} is not a multiple of kv_heads={self.kv_heads}")
        if not self.head_dim and self.dim % self.heads:
            raise ValueError(f"dim={self.dim} is not a multiple of heads={self.heads}")
        if self.head_width % 2:
            raise ValueError(f"head_dim={self.head_width} must be even for rotary positions")
        return self

    @model_validator(mode="after")
    def _named_layers_exist(self) -> "ShapeConfig":
        for name, named in (
            ("no_rope_layers", self.no_rope_layers),
            ("full_layers", self.full_layers),
        ):
            if beyond := [layer for layer in named if layer >= self.layers]:
                raise ValueError(
                    f"{name} names layer {beyond[0]}, the last of {self.layers} layers is "
                    f"{self.layers - 1}; layers count from 0"
                )
        if self.full_layers and not self.sliding_window:
            raise ValueError(
                "full_layers are exceptions from sliding_window, which is 0; give both or neither"
            )
        return self

    @property
    def head_width(self) -> int:
        """Width of one head."""
        return self.head_dim or self.dim // self.heads

    @property
    def ffn_width(self) -> int:
        """Width of the SwiGLU layer."""
        if self.ffn:
            return self.ffn
        return -(-(8 * self.dim // 3) // self.multiple_of) * self.multiple_of

    @property
    def windowed_layers(self) -> tuple[int, ...]:
        """Layers, from 0, in which a token sees `sliding_window` tokens alone."""
        if not self.sliding_window:
            return ()
        return tuple(layer for layer in range(self.layers) if layer not in self.full_layers)

    def embedding_share(self, vocabulary: int) -> float:
        """Share of the parameters that are embeddings, those of an untied output head among them."""
        tables = vocabulary * self.dim * (1 if self.is_tied else 2)
        return tables / self.parameters(vocabulary)

    def parameters(self, vocabulary: int) -> int:
        """Number of parameters with a vocabulary of that size."""
        head = self.head_width
        attention = self.dim * head * (2 * self.heads + 2 * self.kv_heads)
        bias = head * (self.heads + 2 * self.kv_heads) if self.has_qkv_bias else 0
        norms = 2 * self.dim + (2 * head if self.has_qk_norm else 0)
        block = attention + bias + norms + 3 * self.dim * self.ffn_width
        embeddings = vocabulary * self.dim * (1 if self.is_tied else 2)
        return embeddings + self.layers * block + self.dim

    def training_flops(self, vocabulary: int, row_tokens: int) -> float:
        """Floating-point operations of training on one token of a row, forward and backward.

        6 for each weight that a token is multiplied with (the head counts, looking up an embedding does
        not), and 12 x layers x heads x head width x row_tokens for attention, without credit for its
        causal half. Recomputed activations do not count. Source: Chowdhery et al. 2022 (PaLM), appendix B.
        """
        looked_up = vocabulary * self.dim * (0 if self.is_tied else 1)
        weights = self.parameters(vocabulary) - looked_up
        return 6 * weights + 12 * self.layers * self.heads * self.head_width * row_tokens


def embedding_warning(share: float) -> str:
    """For a model most of which is a table."""
    return (
        f"{share:.0%} of the parameters are embeddings: take a smaller vocabulary, shape.is_tied=true, "
        f"or a wider and deeper shape"
    )
