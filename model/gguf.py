"""A model as one GGUF file, the form of llama.cpp, and back.

Source: the GGUF specification, version 3, and llama.cpp's `convert_hf_to_gguf.py`.
"""

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from conf.shape import RopeScalingConfig, ShapeConfig
from model.transformer import Transformer, rope_frequencies
from storage.tokenizer import MODEL_FILE, chat_template, read_meta

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9
SCALARS = {UINT32: "<I", INT32: "<i", FLOAT32: "<f", BOOL: "<?"}
F32, BF16 = 0, 30
ALL_F32, MOSTLY_BF16 = 0, 32
"""`general.file_type`."""
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
"""`tokenizer.ggml.token_type`."""
OUTER = {
    "embedding.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "head.weight": "output.weight",
}
INNER = {
    "attention_norm": "attn_norm",
    "query": "attn_q",
    "key": "attn_k",
    "value": "attn_v",
    "attention_out": "attn_output",
    "query_norm": "attn_q_norm",
    "key_norm": "attn_k_norm",
    "ffn_norm": "ffn_norm",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "ffn_out": "ffn_down",
}
PRETOKENIZERS = ("gpt-2", "qwen2")
"""Ways of cutting text that llama.cpp has by that name."""
ROPE_FACTORS = "rope_freqs.weight"
SMOLLM3_STEP = 4
"""llama.cpp leaves positions out of every fourth layer of a `smollm3`, and of no other."""

Value = int | float | bool | str | list[int] | list[str]


@dataclass(frozen=True)
class Content:
    """What a file holds."""

    keys: dict[str, Any] = field(default_factory=dict[str, Any])
    tensors: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    """Float32."""


def write_gguf(path: Path, model: Transformer, tokenizer: Path, *, precision: str = "fp32") -> None:
    """Write weights, shape, vocabulary and chat template into one file.

    bf16 halves the matrices; norms and biases stay float32, as llama.cpp wants them. Raises ValueError
    for a shape or tokenizer that llama.cpp does not compute or read.
    """
    kind = architecture(model.shape)
    keys = {
        **_shape_keys(kind, model),
        "general.file_type": ALL_F32 if precision == "fp32" else MOSTLY_BF16,
        **_tokenizer_keys(tokenizer, model.vocabulary),
    }
    tensors = {
        _theirs(name): _interleaved(name, weight.detach().float().cpu(), kind, model.shape)
        for name, weight in model.state_dict().items()
    }
    if (factors := _rope_factors(model.shape)) is not None:
        tensors[ROPE_FACTORS] = factors
    with path.open("wb") as file:
        _write(file, keys, tensors, is_half=precision == "bf16")


def architecture(shape: ShapeConfig) -> str:
    """The architecture of llama.cpp that computes what the shape does; ValueError where none does."""
    every_fourth = tuple(range(SMOLLM3_STEP - 1, shape.layers, SMOLLM3_STEP))
    if shape.sliding_window:
        raise ValueError(
            f"llama.cpp would let all tokens of a row see each other, this model has "
            f"sliding_window={shape.sliding_window}; export it with target=hf"
        )
    if shape.no_rope_layers and shape.no_rope_layers != every_fourth:
        raise ValueError(
            f"llama.cpp leaves positions out of every fourth layer or of none, this model leaves them "
            f"out of {list(shape.no_rope_layers)}; export it with target=hf"
        )
    match shape.has_qkv_bias, shape.has_qk_norm, bool(shape.no_rope_layers):
        case False, False, False:
            return "llama"
        case True, False, False:
            return "qwen2"
        case False, True, False:
            return "qwen3"
        case False, False, True:
            return "smollm3"
        case _:
            raise ValueError(
                "llama.cpp has no architecture with more than one of qkv bias, qk norm and layers "
                "without positions; train a shape with one"
            )


def _shape_keys(kind: str, model: Transformer) -> dict[str, Value]:
    shape = model.shape
    return {
        "general.architecture": kind,
        "general.name": "bessemer",
        f"{kind}.vocab_size": model.vocabulary,
        f"{kind}.context_length": shape.context,
        f"{kind}.embedding_length": shape.dim,
        f"{kind}.block_count": shape.layers,
        f"{kind}.feed_forward_length": shape.ffn_width,
        f"{kind}.attention.head_count": shape.heads,
        f"{kind}.attention.head_count_kv": shape.kv_heads,
        f"{kind}.attention.key_length": shape.head_width,
        f"{kind}.attention.value_length": shape.head_width,
        f"{kind}.attention.layer_norm_rms_epsilon": shape.norm_eps,
        f"{kind}.rope.dimension_count": shape.head_width,
        f"{kind}.rope.freq_base": shape.rope_theta,
    }


def _rope_factors(shape: ShapeConfig) -> Tensor | None:
    """What llama.cpp divides the plain frequencies by, (E / 2,)."""
    if shape.rope_scaling is None:
        return None
    plain = rope_frequencies(shape.model_copy(update={"rope_scaling": None}))
    return (plain / rope_frequencies(shape)).float()


def _tokenizer_keys(tokenizer: Path, vocabulary: int) -> dict[str, Value]:
    meta = read_meta(tokenizer)
    content = json.loads((tokenizer / MODEL_FILE).read_text("utf-8"))
    form, decoder = content["model"]["type"], (content.get("decoder") or {}).get("type")
    if form != "BPE" or decoder != "ByteLevel" or meta.pretokenizer not in PRETOKENIZERS:
        raise ValueError(
            f"the tokenizer is a {form} with decoder {decoder} that cuts text as {meta.pretokenizer}; "
            f"byte-level BPE that cuts as {' or '.join(PRETOKENIZERS)} can be written as GGUF, others "
            f"with target=hf"
        )
    spelled: list[str] = [f"[unused{index}]" for index in range(vocabulary)]
    for token, index in content["model"]["vocab"].items():
        spelled[index] = token
    kinds = [NORMAL] * vocabulary
    for added in content["added_tokens"]:
        spelled[added["id"]] = added["content"]
        kinds[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    merges = [
        merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]
    ]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": meta.pretokenizer,
        "tokenizer.ggml.tokens": spelled,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": meta.special["eos"],
        "tokenizer.ggml.eot_token_id": meta.special["im_end"],
        "tokenizer.ggml.padding_token_id": meta.special["pad"],
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": chat_template(meta.system),
    }


def _theirs(name: str) -> str:
    if name in OUTER:
        return OUTER[name]
    _, layer, part, end = name.split(".")
    return f"blk.{layer}.{INNER[part]}.{end}"


def _interleaved(name: str, weight: Tensor, kind: str, shape: ShapeConfig) -> Tensor:
    """Rows of queries and keys in the order of llama.cpp's `llama`, which rotates neighbours rather
    than halves of a head; the qwens rotate as we do."""
    if kind not in ("llama", "smollm3") or not name.endswith((".query.weight", ".key.weight")):
        return weight
    heads = shape.heads if ".query." in name else shape.kv_heads
    return weight.view(heads, 2, shape.head_width // 2, -1).transpose(1, 2).reshape(weight.shape)


def _in_halves(name: str, weight: Tensor, kind: str, shape: ShapeConfig) -> Tensor:
    """What `_interleaved` undoes."""
    if kind not in ("llama", "smollm3") or not name.endswith((".query.weight", ".key.weight")):
        return weight
    heads = shape.heads if ".query." in name else shape.kv_heads
    return weight.view(heads, shape.head_width // 2, 2, -1).transpose(1, 2).reshape(weight.shape)


def _write(
    file: BinaryIO, keys: Mapping[str, Value], tensors: Mapping[str, Tensor], *, is_half: bool
) -> None:
    head = BytesIO()
    head.write(MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(keys)))
    for key, value in keys.items():
        _put_text(head, key)
        _put_value(head, value)
    offset, kinds = 0, {}
    for name, tensor in tensors.items():
        kinds[name] = BF16 if is_half and tensor.dim() > 1 else F32
        _put_text(head, name)
        dims = tuple(reversed(tensor.shape))
        head.write(struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kinds[name], offset))
        offset += _padded(tensor.numel() * (2 if kinds[name] == BF16 else 4))
    file.write(head.getvalue())
    _pad(file)
    for name, tensor in tensors.items():
        if kinds[name] == BF16:
            file.write(tensor.to(torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes())
        else:
            file.write(tensor.contiguous().numpy().tobytes())
        _pad(file)


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _pad(file: BinaryIO) -> None:
    file.write(b"\0" * (_padded(file.tell()) - file.tell()))


def _put_text(file: BinaryIO, text: str) -> None:
    content = text.encode("utf-8")
    file.write(struct.pack("<Q", len(content)) + content)


def _put_value(file: BinaryIO, value: Value) -> None:
    match value:
        case bool():
            file.write(struct.pack("<I?", BOOL, value))
        case int():
            file.write(struct.pack("<II", UINT32, value))
        case float():
            file.write(struct.pack("<If", FLOAT32, value))
        case str():
            file.write(struct.pack("<I", STRING))
            _put_text(file, value)
        case list():
            is_text = isinstance(value[0] if value else "", str)
            file.write(struct.pack("<IIQ", ARRAY, STRING if is_text else INT32, len(value)))
            for item in value:
                _put_text(file, item) if isinstance(item, str) else file.write(
                    struct.pack("<i", item)
                )


def read_gguf(path: Path, *, rope_scaling: RopeScalingConfig | None = None) -> Transformer:
    """The model in a file that `write_gguf` wrote, fp32.

    The file holds what a stretched rotation comes to, not the settings of it: `rope_scaling` gives them.
    Raises ValueError when they are not the ones that the file was made with.
    """
    content = read_content(path)
    shape, vocabulary = _shape_of(content)
    shape = shape.model_copy(update={"rope_scaling": rope_scaling})
    told, found = _rope_factors(shape), content.tensors.get(ROPE_FACTORS)
    if (told is None) != (found is None) or (
        told is not None and found is not None and not torch.equal(told, found)
    ):
        raise ValueError(
            f"{path} stretches its rotation otherwise than rope_scaling={rope_scaling}; give the settings "
            f"that it was written with"
        )
    model = Transformer(shape, vocabulary)
    kind = str(content.keys["general.architecture"])
    model.load_state_dict(
        {
            name: _in_halves(name, content.tensors[_theirs(name)], kind, shape)
            for name in model.state_dict()
        }
    )
    return model


def _shape_of(content: Content) -> tuple[ShapeConfig, int]:
    keys, kind = content.keys, str(content.keys["general.architecture"])

    def number(name: str) -> Any:
        return keys[f"{kind}.{name}"]

    layers = int(number("block_count"))
    shape = ShapeConfig(
        dim=number("embedding_length"),
        layers=layers,
        heads=number("attention.head_count"),
        kv_heads=number("attention.head_count_kv"),
        head_dim=number("attention.key_length"),
        ffn=number("feed_forward_length"),
        context=number("context_length"),
        rope_theta=number("rope.freq_base"),
        norm_eps=number("attention.layer_norm_rms_epsilon"),
        is_tied=OUTER["head.weight"] not in content.tensors,
        has_qkv_bias=kind == "qwen2",
        has_qk_norm=kind == "qwen3",
        no_rope_layers=tuple(range(SMOLLM3_STEP - 1, layers, SMOLLM3_STEP))
        if kind == "smollm3"
        else (),
    )
    return shape, int(number("vocab_size"))


def read_content(path: Path) -> Content:
    """Keys and tensors of a GGUF file of float32 and bfloat16. Raises ValueError for another file."""
    with path.open("rb") as file:
        magic = file.read(4)
        if magic != MAGIC:
            raise ValueError(f"{path} starts with {magic!r}, a GGUF file with {MAGIC!r}")
        _, tensor_count, key_count = struct.unpack("<IQQ", file.read(20))
        keys = {_text(file): _value(file) for _ in range(key_count)}
        entries = [_entry(file) for _ in range(tensor_count)]
        start = _padded(file.tell())
        tensors: dict[str, Tensor] = {}
        for name, dims, kind, offset in entries:
            file.seek(start + offset)
            count = int(np.prod(dims))
            if kind == BF16:
                stored = np.frombuffer(file.read(2 * count), "<i2").copy()
                tensor = torch.from_numpy(stored).view(torch.bfloat16).float()
            else:
                tensor = torch.from_numpy(np.frombuffer(file.read(4 * count), "<f4").copy())
            tensors[name] = tensor.view(*reversed(dims))
    return Content(keys, tensors)


def _entry(file: BinaryIO) -> tuple[str, tuple[int, ...], int, int]:
    name = _text(file)
    [count] = struct.unpack("<I", file.read(4))
    dims = struct.unpack(f"<{count}Q", file.read(8 * count))
    kind, offset = struct.unpack("<IQ", file.read(12))
    return name, dims, kind, offset


def _text(file: BinaryIO) -> str:
    [size] = struct.unpack("<Q", file.read(8))
    return file.read(size).decode("utf-8")


def _value(file: BinaryIO) -> Any:
    [kind] = struct.unpack("<I", file.read(4))
    if kind != ARRAY:
        return _plain(file, kind)
    item, count = struct.unpack("<IQ", file.read(12))
    return list(_plains(file, item, count))


def _plains(file: BinaryIO, kind: int, count: int) -> Iterator[Any]:
    for _ in range(count):
        yield _plain(file, kind)


def _plain(file: BinaryIO, kind: int) -> Any:
    if kind == STRING:
        return _text(file)
    layout = SCALARS[kind]
    [value] = struct.unpack(layout, file.read(struct.calcsize(layout)))
    return value
