"""The GGUF file: the package that llama.cpp's authors keep reads it, and so does transformers."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
import torch

from conf.shape import RopeScalingConfig, ShapeConfig
from conf.tokenizer import TokenizerConfig
from model.convert import compare
from model.gguf import architecture, read_gguf, write_gguf
from model.transformer import Transformer
from storage.sentencepiece_model import converted, parse
from storage.tokenizer import MODEL_FILE, SPECIAL_TOKENS, ChatTokenizer, write_tokenizer
from tasks.tokenizer_training import train
from tests.model.tiny import tiny_tokenizer
from tests.storage.test_sentencepiece_model import KINDS as PIECES
from tests.storage.test_sentencepiece_model import model_for

STRETCHED = RopeScalingConfig(factor=8, original_context=32)
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"rope_theta": 5e5},
    "llama, untied, wide heads": {"is_tied": False, "head_dim": 16, "norm_eps": 1e-6},
    "llama 3.1": {"rope_scaling": STRETCHED},
    "qwen2": {"has_qkv_bias": True},
    "qwen3": {"has_qk_norm": True, "is_tied": False},
    "smollm3": {"layers": 5, "no_rope_layers": (3,)},
}


def model(**fields: Any) -> Transformer:
    shape = ShapeConfig(dim=32, layers=2, heads=4, kv_heads=2, context=64)
    net = Transformer(shape.model_copy(update=fields), 400, seed=2)
    with torch.no_grad():
        for weight in net.parameters():
            if weight.dim() == 1:
                weight.add_(torch.linspace(-0.2, 0.2, len(weight)))
    return net


@pytest.fixture
def tokenizer(tmp_path: Path) -> ChatTokenizer:
    return tiny_tokenizer(tmp_path / "tokenizer")


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_model_comes_back_as_it_went(kind: str, tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    ours, path = model(**KINDS[kind]), tmp_path / "model.gguf"
    write_gguf(path, ours, tmp_path / "tokenizer")
    assert compare(ours, read_gguf(path, rope_scaling=ours.shape.rope_scaling)) == 0.0


def test_the_authors_package_reads_keys_vocabulary_and_tensors(
    tmp_path: Path, tokenizer: ChatTokenizer
) -> None:
    ours, path = model(has_qk_norm=True, rope_theta=5e5), tmp_path / "model.gguf"
    write_gguf(path, ours, tmp_path / "tokenizer")
    file = gguf.GGUFReader(path)
    assert file.get_field("general.architecture").contents() == "qwen3"
    assert file.get_field("qwen3.attention.head_count_kv").contents() == 2
    assert file.get_field("qwen3.rope.freq_base").contents() == 5e5
    assert file.get_field("tokenizer.ggml.eot_token_id").contents() == tokenizer.im_end
    spelled = file.get_field("tokenizer.ggml.tokens").contents()
    kinds = file.get_field("tokenizer.ggml.token_type").contents()
    assert spelled[:4] == ["<|pad|>", "<|eos|>", "<|im_start|>", "<|im_end|>"]
    assert kinds == [gguf.TokenType.CONTROL] * 4 + [gguf.TokenType.NORMAL] * 396
    tensors = {tensor.name: tensor for tensor in file.tensors}
    state = ours.state_dict()
    assert len(tensors) == len(state)
    for name, wanted in (
        ("token_embd.weight", "embedding.weight"),
        ("blk.1.attn_q.weight", "blocks.1.query.weight"),
        ("blk.0.ffn_down.weight", "blocks.0.ffn_out.weight"),
        ("blk.1.attn_k_norm.weight", "blocks.1.key_norm.weight"),
    ):
        assert np.array_equal(np.array(tensors[name].data), state[wanted].numpy()), name


# transformers does not read the factors of a stretched rotation, and knows no smollm3; llama.cpp does.
@pytest.mark.parametrize("kind", ["llama", "llama, untied, wide heads", "qwen2", "qwen3"])
def test_transformers_reads_the_file_to_the_same_logits(
    kind: str, tmp_path: Path, tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    # It asks for accelerate before it reads, and then needs nothing of it on one CPU.
    monkeypatch.setattr("transformers.modeling_utils.is_accelerate_available", lambda: True)
    # Of a qwen3 it reads no width of heads, and takes 128.
    ours = model(**KINDS[kind] | ({"head_dim": 128} if kind == "qwen3" else {}))
    write_gguf(tmp_path / "model.gguf", ours, tmp_path / "tokenizer")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32
    ).eval()
    ids = torch.randint(400, (3, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        difference = (ours.logits(ours.hidden(ids)) - theirs(ids).logits).abs().max().item()
    assert difference <= 1e-4


def test_bfloat16_halves_matrices_and_leaves_norms(
    tmp_path: Path, tokenizer: ChatTokenizer
) -> None:
    ours, path = model(), tmp_path / "model.gguf"
    write_gguf(path, ours, tmp_path / "tokenizer", precision="bf16")
    found = read_gguf(path).state_dict()
    for name, weight in ours.state_dict().items():
        kept = weight.to(torch.bfloat16).float() if weight.dim() > 1 else weight
        assert torch.equal(found[name], kept), name


def test_what_llama_cpp_does_not_compute_is_refused() -> None:
    refused = [
        ({"sliding_window": 9}, "sliding_window=9; export it with target=hf"),
        ({"no_rope_layers": (0,)}, r"leaves them out of \[0\]"),
        ({"has_qkv_bias": True, "has_qk_norm": True}, "more than one of"),
    ]
    for fields, message in refused:
        with pytest.raises(ValueError, match=message):
            architecture(model(**fields).shape)


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [("wordpiece", "a WordPiece .* with target=hf"), ("unigram", "a Unigram .* with target=hf")],
)
def test_a_trained_tokenizer_that_llama_cpp_does_not_know_is_refused(
    tmp_path: Path, algorithm: str, message: str
) -> None:
    config = TokenizerConfig.model_validate({"algorithm": algorithm, "vocabulary": 600})
    write_tokenizer(tmp_path, train(["The cat eats fish. 猫吃鱼。"] * 9, config), "other")
    with pytest.raises(ValueError, match=message):
        write_gguf(tmp_path / "model.gguf", model(), tmp_path)


def test_an_adopted_tokenizer_that_llama_cpp_does_not_know_is_refused(tmp_path: Path) -> None:
    taken = converted(parse(model_for(PIECES["bpe, bytes, plain"])))
    taken.add_special_tokens(list(SPECIAL_TOKENS.values()))
    write_tokenizer(tmp_path, taken, "other")
    with pytest.raises(ValueError, match=r"a BPE with decoder Sequence .* with target=hf"):
        write_gguf(tmp_path / "model.gguf", model(), tmp_path)


def test_added_tokens_that_text_gives_are_the_users(tmp_path: Path) -> None:
    tiny_tokenizer(tmp_path / "tiny")
    taken = tokenizers.Tokenizer.from_file(str(tmp_path / "tiny" / MODEL_FILE))
    taken.add_tokens(["<think>"])
    write_tokenizer(tmp_path / "t", taken, "gpt-2")
    write_gguf(tmp_path / "model.gguf", model(), tmp_path / "t")
    file = gguf.GGUFReader(tmp_path / "model.gguf")
    place = file.get_field("tokenizer.ggml.tokens").contents().index("<think>")
    kinds = file.get_field("tokenizer.ggml.token_type").contents()
    assert kinds[place] == gguf.TokenType.USER_DEFINED


def test_another_stretching_and_another_file_are_refused(
    tmp_path: Path, tokenizer: ChatTokenizer
) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, model(rope_scaling=STRETCHED), tmp_path / "tokenizer")
    with pytest.raises(ValueError, match="stretches its rotation otherwise"):
        read_gguf(path)
    path.write_bytes(b"{}  ")
    with pytest.raises(ValueError, match=r"starts with b'\{\}  '"):
        read_gguf(path)
