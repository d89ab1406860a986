"""A policy as a Hugging Face folder, and weights under its names. Worker: `python -m model.convert JOBFILE`."""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conf.contract import JobFile
from conf.export import ExportConfig
from conf.shape import ShapeConfig
from model.journal import Journal
from model.ranks import Ranks
from model.transformer import Transformer
from model.weights import load_model, load_tensors, save_tensors
from model.worker import run
from storage.checkpoint import CONFIG, TOKENIZER, WEIGHTS
from storage.tokenizer import CHAT_TEMPLATE, MODEL_FILE, SPECIAL_TOKENS, TokenizerMeta, read_meta

LARGEST_DIFFERENCE = {"fp32": 1e-5, "bf16": 0.25}
"""Between the logits of the policy and of what was written and read again."""
PROBE_ROWS, PROBE_TOKENS = 4, 64

OUTER = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
    "score_head.weight": "score.weight",
}
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
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


def main() -> None:
    """Entry of the worker."""
    run(work)


def work(job: JobFile, ranks: Ranks, journal: Journal) -> dict[str, Any]:
    """Write the job's policy as a Hugging Face folder and compare the logits of what was written."""
    settings = ExportConfig.model_validate(job.settings)
    policy = Path(job.inputs["policy"])
    model = load_model(policy, is_scalar=False)
    write_hf(job.files, model, policy / TOKENIZER, precision=settings.precision)
    difference = compare(model, read_hf(job.files))
    if not difference <= LARGEST_DIFFERENCE[settings.precision]:
        raise ValueError(
            f"logits of the written model differ by {difference} from the policy's, at most "
            f"{LARGEST_DIFFERENCE[settings.precision]} is rounding; do not use this export"
        )
    (job.files / "export.json").write_text(
        json.dumps({"target": settings.target, "precision": settings.precision}), "utf-8"
    )
    size = sum(path.stat().st_size for path in job.files.iterdir())
    return {"logit_difference": difference, "bytes": size, "target": settings.target}


def write_hf(files: Path, model: Transformer, tokenizer: Path, *, precision: str = "fp32") -> None:
    """Write weights, configuration and tokenizer so that transformers 4 and 5 load them alike."""
    files.mkdir(parents=True, exist_ok=True)
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    state = {name: weight.to(kind) for name, weight in to_hf(model.state_dict()).items()}
    save_tensors(files / WEIGHTS, state, metadata={"format": "pt"})
    meta = read_meta(tokenizer)
    _write(files / CONFIG, hf_config(model, meta, precision))
    _write(files / "generation_config.json", _generation_config(meta))
    _write(files / "tokenizer_config.json", _tokenizer_config(model.shape))
    (files / "chat_template.jinja").write_text(CHAT_TEMPLATE, "utf-8")
    shutil.copyfile(tokenizer / MODEL_FILE, files / MODEL_FILE)


def read_hf(files: Path) -> Transformer:
    """The Llama in a Hugging Face folder, fp32. Raises ValueError for what this model cannot be."""
    config = json.loads((files / CONFIG).read_text("utf-8"))
    if config["model_type"] not in ARCHITECTURES:
        raise ValueError(
            f"{files} holds a {config['model_type']}; models of type {', '.join(ARCHITECTURES)} can be "
            f"read"
        )
    theta = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]
    shape = ShapeConfig(
        dim=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_dim=config.get("head_dim") or 0,
        ffn=config["intermediate_size"],
        context=config["max_position_embeddings"],
        rope_theta=theta,
        norm_eps=config["rms_norm_eps"],
        is_tied=config["tie_word_embeddings"],
        has_qkv_bias=config["model_type"] == "qwen2",
        has_qk_norm=config["model_type"] == "qwen3",
    )
    model = Transformer(shape, config["vocab_size"])
    state = {name: w.float() for name, w in from_hf(load_tensors(files / WEIGHTS)).items()}
    model.load_state_dict(state)
    return model


@torch.no_grad()
def compare(one: Transformer, other: Transformer) -> float:
    """Largest difference between the logits of two models on the same random tokens."""
    generator = torch.Generator().manual_seed(0)
    tokens = min(PROBE_TOKENS, one.shape.context)
    ids = torch.randint(one.vocabulary, (PROBE_ROWS, tokens), generator=generator)
    logits = one.logits(one.hidden(ids)) - other.logits(other.hidden(ids))
    return float(logits.abs().max())


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
        "rope_theta": shape.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
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
    match shape.has_qkv_bias, shape.has_qk_norm:
        case False, False:
            return "llama"
        case True, False:
            return "qwen2"
        case False, True:
            return "qwen3"
        case _:
            raise ValueError(
                "no Hugging Face model has both a qkv bias and a qk norm; train a shape with one"
            )


def _generation_config(meta: TokenizerMeta) -> dict[str, Any]:
    return {
        "bos_token_id": None,
        "eos_token_id": [meta.special["im_end"], meta.special["eos"]],
        "pad_token_id": meta.special["pad"],
    }


def _tokenizer_config(shape: ShapeConfig) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": shape.context,
        "bos_token": None,
        "eos_token": SPECIAL_TOKENS["im_end"],
        "pad_token": SPECIAL_TOKENS["pad"],
        "additional_special_tokens": [SPECIAL_TOKENS["im_start"], SPECIAL_TOKENS["eos"]],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


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


if __name__ == "__main__":
    main()
