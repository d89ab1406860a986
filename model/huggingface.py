"""Hugging Face folders of the Llama family: what their configuration says, and their names of weights."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conf.shape import RopeScalingConfig, ShapeConfig
from model.transformer import Transformer
from model.weights import load_tensors
from storage.checkpoint import CONFIG
from storage.tokenizer import TokenizerMeta

OUTER = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
    "score_head.weight": "score.weight",
}
INNER = {
    "attention_norm": "input_layernorm",
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "attention_out": "self_attn.o_proj",
    "query_norm": "self_attn.q_norm",
    "key_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "ffn_out": "mlp.down_proj",
}
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
}
DEFAULT_THETA = {"smollm3": 2_000_000.0}
"""Rotary base of a type whose configuration names none; 10,000 for the others."""
TIED_BY_DEFAULT = ("smollm3",)
NEEDED = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size",
    "max_position_embeddings", "rms_norm_eps",
)  # fmt: skip
ONLY = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "quantization_config": (None,),
    "partial_rotary_factor": (1.0, None),
}
"""Keys of a configuration that this model has one meaning for -> what they may be."""
IGNORED_WEIGHTS = re.compile(r".*rotary_emb\.inv_freq")
"""Tables that old checkpoints hold beside their weights."""


def read_hf(folder: Path, *, context: int = 0) -> Transformer:
    """The model in a Hugging Face folder, fp32; `context` shortens the longest sequence, 0 leaves it.

    Raises ValueError that names what this model cannot be: another type, a bias, a scaling of positions.
    """
    config = json.loads((folder / CONFIG).read_text("utf-8"))
    shape = shape_of(config, where=str(folder / CONFIG))
    if context > shape.context:
        raise ValueError(
            f"context={context} is longer than the {shape.context} tokens of {folder}; give less, or 0"
        )
    if context:
        shape = shape.model_copy(update={"context": context})
    state = from_hf(_weights(folder))
    if shape.is_tied:
        # transformers writes a tied head in some versions, and never reads it.
        state.pop("head.weight", None)
    model = Transformer(shape, config["vocab_size"])
    try:
        model.load_state_dict({name: weight.float() for name, weight in state.items()})
    except RuntimeError as error:
        raise ValueError(
            f"the weights in {folder} are not those that its {CONFIG} describes ({error}); "
            f"save the model again with transformers"
        ) from error
    return model


def _weights(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(
            f"{folder} holds no *.safetensors; save the model with `save_pretrained`, which writes them"
        )
    found: dict[str, Tensor] = {}
    for path in files:
        found |= load_tensors(path)
    return found


def shape_of(config: Mapping[str, Any], *, where: str) -> ShapeConfig:
    """The shape that a `config.json` describes. Raises ValueError for what this model cannot be."""
    kind = str(config.get("model_type"))
    if kind not in ARCHITECTURES:
        raise ValueError(
            f"{where} is of type {kind}; models of type {', '.join(ARCHITECTURES)} can be read"
        )
    if missing := [key for key in NEEDED if key not in config]:
        raise ValueError(
            f"{where} lacks {', '.join(missing)}; save the model again with transformers, which "
            f"writes them"
        )
    for key, allowed in ONLY.items():
        if key in config and config[key] not in allowed:
            raise ValueError(
                f"{where} has {key}={config[key]!r}, which this model cannot be; only "
                f"{allowed[0]!r} can be read"
            )
    names = config.get("architectures") or [ARCHITECTURES[kind]]
    if names != [ARCHITECTURES[kind]]:
        raise ValueError(f"{where} is a {', '.join(names)}; {ARCHITECTURES[kind]} can be read")
    layers = int(config["num_hidden_layers"])
    window, full_layers = _window(kind, config, layers)
    theta, scaling = _rotary(kind, config, where)
    return ShapeConfig(
        dim=config["hidden_size"],
        layers=layers,
        heads=config["num_attention_heads"],
        kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
        head_dim=config.get("head_dim") or 0,
        ffn=config["intermediate_size"],
        context=config["max_position_embeddings"],
        rope_theta=theta,
        rope_scaling=scaling,
        no_rope_layers=_no_rope_layers(kind, config, layers),
        sliding_window=window,
        full_layers=full_layers,
        norm_eps=config["rms_norm_eps"],
        is_tied=config.get("tie_word_embeddings", kind in TIED_BY_DEFAULT),
        has_qkv_bias=kind == "qwen2",
        has_qk_norm=kind == "qwen3",
    )


def _rotary(
    kind: str, config: Mapping[str, Any], where: str
) -> tuple[float, RopeScalingConfig | None]:
    """Base and scaling; transformers 5 keeps both in `rope_parameters`, transformers 4 apart."""
    told: dict[str, Any] = {**(config.get("rope_scaling") or {})}
    told |= config.get("rope_parameters") or {}
    theta = told.get("rope_theta") or config.get("rope_theta") or DEFAULT_THETA.get(kind, 10_000.0)
    form = told.get("rope_type") or told.get("type") or "default"
    if told.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            f"{where} rotates a part of each head (partial_rotary_factor="
            f"{told['partial_rotary_factor']}), which this model cannot; only 1.0 can be read"
        )
    match form:
        case "default":
            return float(theta), None
        case "llama3":
            original = told.get("original_max_position_embeddings")
            return float(theta), RopeScalingConfig(
                factor=told["factor"],
                low_freq_factor=told["low_freq_factor"],
                high_freq_factor=told["high_freq_factor"],
                original_context=original or config["max_position_embeddings"],
            )
        case _:
            raise ValueError(
                f"{where} scales positions by {form!r}, which this model cannot; `default` and `llama3` "
                f"can be read"
            )


def _no_rope_layers(kind: str, config: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    if kind != "smollm3":
        return ()
    interval = config.get("no_rope_layer_interval", 4)
    # transformers writes 1 where a layer has positions.
    has_rope = config.get("no_rope_layers") or [
        int((layer + 1) % interval != 0) for layer in range(layers)
    ]
    return tuple(layer for layer in range(layers) if not has_rope[layer])


def _window(kind: str, config: Mapping[str, Any], layers: int) -> tuple[int, tuple[int, ...]]:
    """The sliding window and the layers without it, by the rules of each type."""
    window = int(config.get("sliding_window") or 0)
    if kind == "llama" or not window:
        return 0, ()
    if kind == "mistral":
        return window, ()
    if not config.get("use_sliding_window", False):
        return 0, ()
    kinds = config.get("layer_types") or _layer_types(kind, config, layers)
    full = tuple(layer for layer in range(layers) if kinds[layer] == "full_attention")
    return (0, ()) if len(full) == layers else (window, full)


def _layer_types(kind: str, config: Mapping[str, Any], layers: int) -> list[str]:
    """What transformers takes where the configuration does not tell."""
    if kind == "smollm3":
        windowed = set(_no_rope_layers(kind, config, layers))
    else:
        windowed = set(range(int(config.get("max_window_layers", 28)), layers))
    return ["sliding_attention" if n in windowed else "full_attention" for n in range(layers)]


def hf_config(model: Transformer, meta: TokenizerMeta, precision: str) -> dict[str, Any]:
    """`config.json`: transformers 4 reads `rope_theta`, transformers 5 `rope_parameters`."""
    shape = model.shape
    kind = _model_type(shape)
    dtype = {"fp32": "float32", "bf16": "bfloat16"}[precision]
    return {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "vocab_size": model.vocabulary,
        "hidden_size": shape.dim,
        "intermediate_size": shape.ffn_width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_width,
        "hidden_act": "silu",
        "max_position_embeddings": shape.context,
        "rms_norm_eps": shape.norm_eps,
        **_rotary_keys(shape),
        **_window_keys(kind, shape),
        "tie_word_embeddings": shape.is_tied,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": meta.special["eos"],
        "pad_token_id": meta.special["pad"],
        "torch_dtype": dtype,
        "dtype": dtype,
    }


def _model_type(shape: ShapeConfig) -> str:
    """The type that computes what the shape does. Raises ValueError where there is none."""
    has_odd_layers = bool(shape.no_rope_layers or shape.full_layers)
    match shape.has_qkv_bias, shape.has_qk_norm:
        case True, True:
            raise ValueError(
                "no Hugging Face model has both a qkv bias and a qk norm; train a shape with one"
            )
        case (True, False) | (False, True) if shape.no_rope_layers:
            raise ValueError(
                "no Hugging Face model has layers without positions and a qkv bias or a qk norm; "
                "train a shape with one of them"
            )
        case True, False:
            return "qwen2"
        case False, True:
            return "qwen3"
        case _:
            plain = "mistral" if shape.sliding_window else "llama"
            return "smollm3" if has_odd_layers else plain


def _rotary_keys(shape: ShapeConfig) -> dict[str, Any]:
    theta: dict[str, Any] = {"rope_theta": shape.rope_theta}
    if shape.rope_scaling is None:
        return {**theta, "rope_parameters": {"rope_type": "default", **theta}}
    scaling = {
        "rope_type": "llama3",
        "factor": shape.rope_scaling.factor,
        "low_freq_factor": shape.rope_scaling.low_freq_factor,
        "high_freq_factor": shape.rope_scaling.high_freq_factor,
        "original_max_position_embeddings": shape.rope_scaling.original_context,
    }
    return {**theta, "rope_scaling": scaling, "rope_parameters": {**scaling, **theta}}


def _window_keys(kind: str, shape: ShapeConfig) -> dict[str, Any]:
    if kind == "llama":
        return {}
    if kind == "mistral":
        return {"sliding_window": shape.sliding_window}
    windowed = set(shape.windowed_layers)
    keys: dict[str, Any] = {
        "use_sliding_window": bool(windowed),
        "sliding_window": shape.sliding_window or None,
        "layer_types": [
            "sliding_attention" if layer in windowed else "full_attention"
            for layer in range(shape.layers)
        ],
    }
    if kind == "smollm3":
        keys["no_rope_layers"] = [int(n not in shape.no_rope_layers) for n in range(shape.layers)]
    else:
        # All layers behind it have the window: what readers go by that do not know `layer_types`.
        keys["max_window_layers"] = min(windowed, default=shape.layers)
    return keys


def generation_config(meta: TokenizerMeta) -> dict[str, Any]:
    """`generation_config.json`: an answer ends with `<|im_end|>`, a document with `<|eos|>`."""
    return {
        "bos_token_id": None,
        "eos_token_id": [meta.special["im_end"], meta.special["eos"]],
        "pad_token_id": meta.special["pad"],
    }


def to_hf(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names -> Hugging Face's. The rotation has the same layout, so no row is moved."""
    return {_to_hf_name(name): tensor for name, tensor in state.items()}


def from_hf(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face's names -> ours. Raises ValueError for a name that a Llama does not have."""
    return {
        _from_hf_name(name): tensor
        for name, tensor in state.items()
        if not IGNORED_WEIGHTS.fullmatch(name)
    }


def _to_hf_name(name: str) -> str:
    if name in OUTER:
        return OUTER[name]
    _, layer, part, kind = name.split(".")
    return f"model.layers.{layer}.{INNER[part]}.{kind}"


def _from_hf_name(name: str) -> str:
    for ours, theirs in OUTER.items():
        if name == theirs:
            return ours
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    for ours, theirs in INNER.items():
        if found and found[2] == theirs:
            return f"blocks.{found[1]}.{ours}.{found[3]}"
    raise ValueError(f"{name} is no weight of a Llama; export the model as LlamaForCausalLM")


def resized(weight: Tensor, rows: int) -> Tensor:
    """The table (V, D) with `rows` rows: cut, or with new rows that are the mean of the old ones.

    A mean row changes what a trained model says least; a random one may outshine all tokens.
    Source: Hewitt 2021, "Initializing new word embeddings for pretrained language models".
    """
    if rows <= len(weight):
        return weight[:rows].clone()
    mean = weight.double().mean(0, keepdim=True).to(weight.dtype)
    return torch.cat([weight, mean.expand(rows - len(weight), -1)])
