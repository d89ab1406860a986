"""Weights under the names of Hugging Face's Llama, there and back."""

import re
from collections.abc import Mapping

from torch import Tensor

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


def to_hf(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names -> Hugging Face's. The rotation has the same layout, so no row is moved."""
    return {_to_hf_name(name): tensor for name, tensor in state.items()}


def from_hf(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face's names -> ours. Raises ValueError for a name that a Llama does not have."""
    return {_from_hf_name(name): tensor for name, tensor in state.items()}


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
