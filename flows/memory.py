"""What a training job will hold in memory, part by part, before it runs.

Counted from what autograd keeps and what the loss makes at once; model/transformer.py is the truth.
Letters as there: D width, H and K heads, E width of a head, F feed-forward, V vocabulary, N tokens.
"""

from dataclasses import dataclass
from typing import Literal

from conf.shape import ShapeConfig

LOGITS_AT_ONCE = 1 << 26
"""As in model/transformer.py: above it the head runs in chunks."""
LOGITS_IN_CACHE, LEAST_ROWS = 1 << 22, 512
"""As in model/head.py: so many, or so many rows, make a piece of the fused head on a CPU."""
EVALUATION_TOKENS = 16_384
"""Held-out tokens in one forward pass of pretraining, as in model/pretrain.py."""
CPU_PROCESS_BYTES = 350e6
"""A worker with torch loaded and a model of nothing, on Linux."""
CUDA_CONTEXT_BYTES = 600e6
"""Context and kernels of a process on a device."""
ALLOCATOR_SLACK = {"cpu": 0.36, "cuda": 0.12}
"""Memory that is taken again and again fits worse than memory that is taken once: measured on CPU over
three shapes, 37 to 50 % of the activations in fp32 and 27 to 40 % in bf16."""

Engine = Literal["plain", "ddp", "fsdp", "zero1", "zero2", "zero3"]
Offload = Literal["none", "optimizer", "parameters"]
Optimizer = Literal["adamw", "muon"]
Precision = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class Pass:
    """What goes through the model at once, on one rank."""

    rows: int
    row_tokens: int
    precision: Precision = "fp32"
    has_head: bool = True
    """Whether tokens pass through the vocabulary head."""
    is_masked: bool = False
    """Whether attention has a mask of its own, such as that of documents."""
    is_recomputed: bool = False
    """Whether blocks compute their activations again for the backward pass."""
    is_fused: bool = False
    """Whether the head makes its gradient in the forward pass, without keeping logits."""
    has_noise: bool = False

    @property
    def tokens(self) -> int:
        """N."""
        return self.rows * self.row_tokens


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at its peak."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    process: float
    """Python, torch, and what the allocator cannot use."""

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.process

    def named(self) -> dict[str, float]:
        """Each part by its name."""
        return dict(vars(self))

    def figures(self) -> dict[str, float]:
        """Total and parts, by names that carry the unit."""
        parts = {f"{name}_bytes": size for name, size in self.named().items()}
        return {"memory_bytes": self.total, **parts}


def training_memory(
    shape: ShapeConfig,
    vocabulary: int,
    work: Pass,
    *,
    engine: Engine = "plain",
    processes: int = 1,
    stages: int = 1,
    offload: Offload = "none",
    optimizer: Optimizer = "adamw",
    is_accumulated: bool = False,
    learning_share: float = 1.0,
    trained: int = 1,
    frozen: int = 0,
    evaluated_tokens: int = 0,
    is_cuda: bool = False,
) -> Memory:
    """Peak of a rank that trains `trained` models of the shape beside `frozen` ones.

    Weights, gradients and AdamW's two moments are float32: 16 bytes a parameter, of which an engine spreads
    a part over the ranks (Rajbhandari et al. 2020, section 3); Muon has one moment of the blocks' matrices. `is_accumulated` says that a step has
    several micro-batches, so that gradients are there when the next one starts; `learning_share` is
    that of the parameters that learn at all. Each of the `stages` of a pipeline holds its blocks, and as many
    micro-batches of them. What `offload` names is the host's; gradients leave with the parameters.
    """
    is_gathered = engine in ("fsdp", "zero3") or stages > 1
    copy = 4.0 * shape.parameters(vocabulary)
    outside = _outside_blocks(shape, vocabulary)
    # The first and the last stage also have a table.
    in_stage = (copy / 4 - outside) / stages + vocabulary * shape.dim
    whole = copy if stages == 1 else 4.0 * in_stage
    weights, gradients, moments = (
        whole / (processes if is_spread else 1)
        for is_spread in (
            engine in ("fsdp", "zero3"),
            engine in ("fsdp", "zero2", "zero3"),
            engine in ("fsdp", "zero1", "zero2", "zero3"),
        )
    )
    is_host_held = offload == "parameters"
    weights, gradients, moments = (
        0.0 if is_host_held else weights * trained,
        0.0 if is_host_held else learning_share * gradients * trained,
        0.0
        if offload != "none"
        else _moments(shape, vocabulary, optimizer) * learning_share * moments * trained,
    )
    table = 4.0 * vocabulary * shape.dim if learning_share == 1 else 0.0
    kept = kept_bytes(shape, vocabulary, work, is_cuda=is_cuda)
    # A step is fullest when its backward pass starts, or when it has come down to the embedding, whose
    # gradient is dense; looking at held-out text holds no activations, and more tokens at once.
    at_start = kept + _head_bytes(shape, vocabulary, work, is_cuda=is_cuda)
    at_start += gradients if is_accumulated else 0.0
    at_end = gradients + table
    looking = _forward_bytes(shape, vocabulary, evaluated_tokens) if evaluated_tokens else 0.0
    # Spread weights are put together for a look at held-out text, and for the artifact.
    looking += copy if is_gathered else 0.0
    above = max(at_start, at_end, looking)
    activations = above - min(gradients, above)
    return Memory(
        weights=weights + frozen * copy,
        gradients=gradients,
        optimizer=moments,
        activations=activations,
        process=(CUDA_CONTEXT_BYTES if is_cuda else CPU_PROCESS_BYTES)
        + ALLOCATOR_SLACK["cuda" if is_cuda else "cpu"] * activations,
    )


def kept_bytes(shape: ShapeConfig, vocabulary: int, work: Pass, *, is_cuda: bool = False) -> float:
    """What autograd keeps between the forward and the backward pass, the logits of the head aside."""
    tokens, width = work.tokens, shape.dim
    half = 4 if work.precision == "fp32" else 2
    per_block = _block_bytes(shape, work)
    if work.is_recomputed:
        # Of every block its input, and one block in full while it is computed again.
        blocks = shape.layers * tokens * 4 * width + per_block
    else:
        blocks = shape.layers * per_block
    rotations = 2 * 4 * work.row_tokens * shape.head_width
    windowed = len(shape.windowed_layers) if shape.sliding_window < work.row_tokens else 0
    # The fused kernel keeps a mask of numbers for each layer: of documents one per row, of a window one.
    masked = shape.layers if work.is_masked and is_cuda else windowed
    mask = masked * (work.rows if work.is_masked else 1) * work.row_tokens**2 * half
    # Without a mask of numbers a CPU takes documents one by one, and in bf16 a block of queries at a time.
    apart = shape.layers - masked
    here = min(apart, 1) if work.is_recomputed else apart
    if work.is_masked:
        blocks += here * _apart_bytes(shape, work)
    elif work.precision == "bf16" and not is_cuda:
        query = shape.heads * shape.head_width if shape.has_qk_norm else 0
        blocks -= here * work.tokens * (4 * shape.heads + 2 * query)
    casts = 0.0
    if half == 2:
        in_blocks = shape.parameters(vocabulary) - _outside_blocks(shape, vocabulary)
        casts = 2.0 * (in_blocks + (vocabulary * width if work.has_head else 0))
    last_norm = tokens * (2 * 4 * width + 4 + (half if work.has_head else 4) * width)
    return blocks + rotations + mask + casts + last_norm


def _moments(shape: ShapeConfig, vocabulary: int, optimizer: Optimizer) -> float:
    """Numbers that the optimizer holds for a parameter, on average."""
    if optimizer == "adamw":
        return 2.0
    attention = 2 * shape.dim * (shape.heads + shape.kv_heads) * shape.head_width
    matrices = shape.layers * (attention + 3 * shape.dim * shape.ffn_width)
    return 2.0 - matrices / shape.parameters(vocabulary)


def _block_bytes(shape: ShapeConfig, work: Pass) -> float:
    """Kept of one block: each norm keeps its input and the normed input; each product its input."""
    width, wide = shape.dim, shape.ffn_width
    query, key = shape.heads * shape.head_width, shape.kv_heads * shape.head_width
    norms = 2 * (2 * 4 * width + 4)
    attended = 2 * query + 2 * key
    if work.precision == "fp32":
        floats = 2 * width + attended + 4 * wide
        others = 4 * floats
    else:
        # Each norm casts what it gives, once.
        others = 2 * (2 * width + attended + 4 * wide)
    if shape.has_qk_norm:
        # These norms keep the same, and what is mixed has to be laid out anew.
        half = 4 if work.precision == "fp32" else 2
        others += 8 * (query + key) + half * query + 4 * (shape.heads + shape.kv_heads)
    noise = 2 * width if work.has_noise else 0
    return work.tokens * (norms + others + 4 * shape.heads + noise)


def _apart_bytes(shape: ShapeConfig, work: Pass) -> float:
    """Kept of a block in addition where a CPU takes documents one by one: what is mixed by each, in
    float32, in which attention also has its inputs then."""
    query, key = shape.heads * shape.head_width, shape.kv_heads * shape.head_width
    half = 4 if work.precision == "fp32" else 2
    laid_out = half * query if shape.has_qk_norm else 0
    return work.tokens * (4 * query + (4 - half) * (query + 2 * key) - laid_out)


def _head_bytes(shape: ShapeConfig, vocabulary: int, work: Pass, *, is_cuda: bool) -> float:
    """Of the head when its gradient is made: log-softmax, and two gradients of the same size."""
    if not work.has_head:
        return 0.0
    rows = min(work.tokens, LOGITS_AT_ONCE // vocabulary)
    if work.is_fused and not is_cuda:
        # The gradient takes the place of the logits; that of the weight is there and added to.
        rows = min(rows, max(LEAST_ROWS, LOGITS_IN_CACHE // vocabulary))
        return 4.0 * vocabulary * (rows + 2 * shape.dim)
    return (2.5 if work.is_fused else 3.0) * 4.0 * rows * vocabulary


def _forward_bytes(shape: ShapeConfig, vocabulary: int, tokens: int) -> float:
    """Of a forward pass that keeps nothing: the widest point of a block, or the head."""
    in_block = 4.0 * tokens * (3 * shape.ffn_width + 2 * shape.dim)
    rows = min(tokens, LOGITS_AT_ONCE // vocabulary)
    in_head = 4.0 * (tokens * shape.dim + 2 * rows * vocabulary)
    return max(in_block, in_head)


def _outside_blocks(shape: ShapeConfig, vocabulary: int) -> int:
    return vocabulary * shape.dim * (1 if shape.is_tied else 2) + shape.dim
