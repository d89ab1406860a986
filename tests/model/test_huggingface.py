"""Models that transformers made and saved compute the same logits here; what cannot be is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from model.huggingface import read_hf, resized, shape_of

SIZE = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
MADE = {
    "Llama": {},
    "Llama, one key head, tied": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "Llama 3.1": {"rope_parameters": LLAMA3, "rms_norm_eps": 1e-5},
    "Mistral": {"sliding_window": 7, "head_dim": 16},
    "Mistral without a window": {"sliding_window": None},
    "Qwen2": {},
    "Qwen2 with a window": {
        "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2,
    },
    "Qwen3": {"head_dim": 16, "tie_word_embeddings": True},
    "SmolLM3": {},
    "SmolLM3 with a window": {
        "use_sliding_window": True, "sliding_window": 7, "no_rope_layers": [1, 0, 1, 0],
    },
}  # fmt: skip


def made(name: str, **fields: Any) -> Any:
    """A tiny model of transformers, every weight random, biases and norms too."""
    transformers = pytest.importorskip("transformers")
    kind = name.split()[0].rstrip(",")
    if transformers.__version__.startswith("4.") and "rope_parameters" in fields:
        fields = spelled_as_4(fields)
    config = getattr(transformers, f"{kind}Config")(**SIZE | fields)
    torch.manual_seed(3)
    theirs = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.normal_(0, 0.2)
            weight.add_(1.0 if weight.dim() == 1 else 0.0)
    return theirs


def spelled_as_4(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration of transformers 5 in the words of transformers 4."""
    theta, scaling = "rope_theta", dict(config["rope_parameters"])
    others = {name: value for name, value in config.items() if name != "rope_parameters"}
    return {**others, theta: scaling.pop(theta), "rope_scaling": scaling}


@torch.no_grad()
def difference(folder: Path, theirs: Any) -> float:
    ids = torch.randint(99, (3, 50), generator=torch.Generator().manual_seed(0))
    ours = read_hf(folder)
    return (ours.logits(ours.hidden(ids)) - theirs(ids).logits).abs().max().item()


@pytest.mark.parametrize("name", list(MADE))
def test_what_transformers_saved_computes_the_same_logits(name: str, tmp_path: Path) -> None:
    theirs = made(name, **MADE[name])
    theirs.save_pretrained(tmp_path)
    assert difference(tmp_path, theirs) <= 1e-4


def test_a_model_in_several_files_is_read_whole(tmp_path: Path) -> None:
    theirs = made("Qwen3")
    theirs.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert difference(tmp_path, theirs) <= 1e-4


def test_the_spelling_of_transformers_4_is_read(tmp_path: Path) -> None:
    theirs = made("Llama", rope_parameters=LLAMA3)
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    if "rope_parameters" in config:
        config = spelled_as_4(config)
    path.write_text(json.dumps(config))
    assert difference(tmp_path, theirs) <= 1e-4


REFUSED = {
    "a gpt2": ({"model_type": "gpt2"}, "of type gpt2; models of type llama"),
    "a bias in attention": ({"attention_bias": True}, "attention_bias=True"),
    "a bias in the feed-forward": ({"mlp_bias": True}, "mlp_bias=True"),
    "another activation": ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
    "yarn": ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "scales positions by 'yarn'"),
    "a classifier": ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForCausalLM can"),
    "4 bits": ({"quantization_config": {"bits": 4}}, "quantization_config="),
    "rotated in part": (
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        "a part of each head",
    ),
}


@pytest.mark.parametrize("what", list(REFUSED))
def test_what_this_model_cannot_be_is_refused_by_name(what: str) -> None:
    change, message = REFUSED[what]
    config = SIZE | {"model_type": "llama", "rms_norm_eps": 1e-5} | change
    with pytest.raises(ValueError, match=message):
        shape_of(config, where="config.json")


def test_a_configuration_that_does_not_say_enough_is_refused() -> None:
    with pytest.raises(ValueError, match="lacks hidden_size, rms_norm_eps; save the model again"):
        shape_of(
            {k: v for k, v in SIZE.items() if k != "hidden_size"} | {"model_type": "llama"},
            where="config.json",
        )


def test_weights_of_another_model_and_a_longer_context_are_refused(tmp_path: Path) -> None:
    theirs = made("Llama")
    theirs.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="context=65 is longer than the 64 tokens"):
        read_hf(tmp_path, context=65)
    assert read_hf(tmp_path, context=16).shape.context == 16
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 3}))
    with pytest.raises(ValueError, match=r"are not those that its config\.json describes"):
        read_hf(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no \*\.safetensors"):
        read_hf(tmp_path)


def test_new_rows_of_an_embedding_are_the_mean_of_the_old() -> None:
    # rows (1, 2), (3, 6): their mean is (2, 4)
    table = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
    assert resized(table, 4).tolist() == [[1, 2], [3, 6], [2, 4], [2, 4]]
    assert resized(table, 1).tolist() == [[1, 2]]
