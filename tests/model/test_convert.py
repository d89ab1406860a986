"""The Hugging Face folder: transformers computes the same logits and encodes the same dialogue."""

import contextlib
import io
import json
from pathlib import Path

import pytest
import torch

from conf.export import ExportConfig
from conf.launch import LaunchConfig
from conf.shape import RopeScalingConfig, ShapeConfig
from flows.model_card import USE
from model.convert import checked, compare, write_hf
from model.gguf import read_gguf, write_gguf
from model.huggingface import from_hf, read_hf, to_hf
from model.transformer import Transformer
from model.weights import save_model
from storage.tokenizer import ChatTokenizer
from tests.model.small_jobs import finish, start, write_job
from tests.model.tiny import tiny_tokenizer

STRETCHED = RopeScalingConfig(factor=8, original_context=32)
KINDS = {
    "llama": {"rope_theta": 5e5},
    "llama untied, wide heads": {"is_tied": False, "head_dim": 16, "norm_eps": 1e-6},
    "qwen2": {"has_qkv_bias": True},
    "qwen3": {"has_qk_norm": True, "is_tied": False},
    "llama 3.1": {"rope_theta": 5e5, "rope_scaling": STRETCHED},
    "mistral": {"sliding_window": 9, "is_tied": False},
    "qwen2, window from layer 1": {"has_qkv_bias": True, "sliding_window": 9, "full_layers": (0,)},
    "qwen3, window, first and last full": {
        "has_qk_norm": True, "layers": 3, "sliding_window": 9, "full_layers": (0, 2),
    },
    "smollm3": {"layers": 4, "no_rope_layers": (3,), "rope_theta": 2e6},
    "smollm3, windows in any layer": {"layers": 3, "sliding_window": 9, "full_layers": (1,)},
}  # fmt: skip


def model(**fields: object) -> Transformer:
    shape = ShapeConfig(dim=32, layers=2, heads=4, kv_heads=2, context=64)
    net = Transformer(shape.model_copy(update=fields), 400, seed=2)
    with torch.no_grad():
        # Biases and norms start at 0 and 1, where a mistake in their place would not show.
        for name, weight in net.named_parameters():
            if weight.dim() == 1 and not name.startswith("score"):
                weight.add_(torch.linspace(-0.2, 0.2, len(weight)))
    return net


@pytest.fixture
def tokenizer(tmp_path: Path) -> ChatTokenizer:
    return tiny_tokenizer(tmp_path / "tokenizer")


@pytest.mark.parametrize("kind", list(KINDS))
def test_transformers_computes_the_same_logits(
    kind: str, tmp_path: Path, tokenizer: ChatTokenizer
) -> None:
    transformers = pytest.importorskip("transformers")
    ours = model(**KINDS[kind])
    write_hf(tmp_path / "hf", ours, tmp_path / "tokenizer")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    ids = torch.randint(400, (3, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        difference = (ours.logits(ours.hidden(ids)) - theirs(ids).logits).abs().max().item()
    assert difference <= 1e-4
    assert compare(ours, read_hf(tmp_path / "hf")) <= 1e-6


def test_both_spellings_of_the_rotary_base_are_written(
    tmp_path: Path, tokenizer: ChatTokenizer
) -> None:
    write_hf(tmp_path / "hf", model(rope_theta=5e5), tmp_path / "tokenizer")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 5e5


def test_transformers_renders_a_dialogue_to_the_same_ids(
    tmp_path: Path, tokenizer: ChatTokenizer
) -> None:
    transformers = pytest.importorskip("transformers")
    write_hf(tmp_path / "hf", model(), tmp_path / "tokenizer")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    dialogue = [
        {"role": "user", "content": "What does the cat eat? 猫吃什么？"},
        {"role": "assistant", "content": "It eats rice. 它吃米饭。"},
        {"role": "user", "content": "谢谢"},
    ]
    found = theirs.apply_chat_template(dialogue, add_generation_prompt=True, tokenize=False)
    ids = theirs(found, add_special_tokens=False)["input_ids"]
    assert ids == tokenizer.render(dialogue, for_generation=True).ids
    assert theirs.eos_token_id == tokenizer.im_end
    assert theirs.pad_token_id == tokenizer.pad


def test_the_code_of_the_model_card_answers(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    pytest.importorskip("transformers")
    write_hf(tmp_path / "hf", model(context=128), tmp_path / "tokenizer")
    code = USE.replace("FOLDER", str(tmp_path / "hf")).removeprefix("```python").removesuffix("```")
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        exec(code, {})
    assert told.getvalue().startswith("<|im_start|>user\n你好！<|im_end|>\n<|im_start|>assistant\n")


def test_names_go_there_and_back() -> None:
    for fields in KINDS.values():
        state = model(**fields).state_dict()
        assert from_hf(to_hf(state)).keys() == state.keys()
    with pytest.raises(ValueError, match="is no weight of a Llama"):
        from_hf({"transformer.wte.weight": torch.ones(1)})


def test_a_shape_that_no_architecture_has_is_refused(
    tmp_path: Path, tokenizer: ChatTokenizer
) -> None:
    odd = model(has_qkv_bias=True, has_qk_norm=True)
    with pytest.raises(ValueError, match="both a qkv bias and a qk norm"):
        write_hf(tmp_path / "hf", odd, tmp_path / "tokenizer")


@pytest.mark.parametrize(
    ("target", "precision", "wanted"),
    [
        (
            "hf",
            "fp32",
            {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"},
        ),
        ("gguf", "bf16", {"model.gguf"}),
    ],
)
def test_the_worker_checks_what_it_wrote(
    target: str, precision: str, wanted: set[str], tmp_path: Path, tokenizer: ChatTokenizer
) -> None:
    save_model(tmp_path / "policy", model(), role="policy", tokenizer=tmp_path / "tokenizer")
    settings = ExportConfig.model_validate({"target": target, "precision": precision})
    inputs = {"policy": tmp_path / "policy"}
    job = write_job(tmp_path / "attempt", "export", settings, inputs, LaunchConfig(threads=1))
    finish(start("model.convert", job))
    result = json.loads((tmp_path / "attempt" / "logs" / "result.json").read_text())
    assert result["logit_difference"] <= {"fp32": 1e-6, "bf16": 0.05}[precision]
    names = {path.name for path in (tmp_path / "attempt" / "files").iterdir()}
    assert names >= wanted


@pytest.mark.parametrize("target", ["hf", "gguf"])
@pytest.mark.parametrize("value", [0x41, 0xFF])
def test_a_few_wrong_bytes_in_what_was_written_are_refused(
    target: str, value: int, tmp_path: Path, tokenizer: ChatTokenizer
) -> None:
    ours, folder = model(), tmp_path / "out"
    write_hf(folder, ours, tmp_path / "tokenizer")
    path = folder / "model.safetensors"
    if target == "gguf":
        path = folder / "model.gguf"
        write_gguf(path, ours, tmp_path / "tokenizer")
    read = {"hf": lambda: read_hf(folder), "gguf": lambda: read_gguf(path)}[target]
    assert checked(ours, read(), "fp32") == 0
    content = bytearray(path.read_bytes())
    # Behind the header tensors follow one another, float32 both: 0x41414141 is 12.1, 0xffffffff no number.
    content[-400:-360] = bytes([value]) * 40
    path.write_bytes(content)
    with pytest.raises(ValueError, match="do not use this export"):
        checked(ours, read(), "fp32")
