"""Models of other families cost on our held-out documents what transformers itself says they cost."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer as Words
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from conf.contract import JobFile
from conf.launch import LaunchConfig
from conf.outside import OutsideConfig
from conf.settings import SourceSpec
from conf.shape import ShapeConfig
from model.convert import write_hf
from model.documents import document_nats, own_reader
from model.journal import Journal
from model.outside import context_of, separator_of, work
from model.ranks import Ranks
from model.transformer import Transformer
from storage.source import HashCache, resolve
from storage.store import Store
from storage.tokens import TokenFiles, Tokens
from tasks.outside import outside
from tasks.stage import Job
from tests.model.small_tokens import documents, write_small_tokens

LAUNCH = LaunchConfig(threads=1, device="cpu")
END = "<|endoftext|>"
SIZE = {"vocab_size": 400, "initializer_range": 0.3}
CONFIGS = {
    "gpt_neox": transformers.GPTNeoXConfig(
        **SIZE, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=256,
    ),
    "gpt2": transformers.GPT2Config(**SIZE, n_embd=32, n_layer=2, n_head=4, n_positions=256),
    "bloom": transformers.BloomConfig(**SIZE, hidden_size=32, n_layer=2, n_head=4),
}  # fmt: skip


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_tokens(tmp_path_factory.mktemp("tokens"), documents(12))


def texts_of(tokens: Path) -> list[str]:
    files = TokenFiles(tokens)
    held = [ids for domain in files.domains for ids, _ in files.held_documents(domain)]
    return [files.tokenizer.decode(ids.tolist()) for ids in held]


def save_tokenizer(folder: Path, *, is_lower: bool = False) -> Any:
    """A byte-level BPE in the manner of GPT-2; its own end of text stands before and after."""
    words = Words(models.BPE())
    if is_lower:
        words.normalizer = normalizers.Lowercase()  # type: ignore[assignment]
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    words.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    words.train_from_iterator(["The fox sleeps. 狐狸在树荫下睡觉。"], trainer)
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token=END, eos_token=END
    )
    made.save_pretrained(folder)
    return made


def save_model(folder: Path, family: str) -> Any:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[family]).eval()
    model.save_pretrained(folder)
    return model


def settings(folder: Path, **fields: Any) -> OutsideConfig:
    return OutsideConfig(sources=(SourceSpec(path=str(folder)),), launch=LAUNCH, **fields)


def measured(root: Path, tokens: Path, folder: Path, **fields: Any) -> tuple[dict[str, Any], Any]:
    """What the worker says of the model, and the rows of the documents."""
    for name in ("files", "logs", "state"):
        (root / name).mkdir(parents=True, exist_ok=True)
    job = JobFile(
        stage="outside", node="outside", launch=LAUNCH, files=root / "files", logs=root / "logs",
        settings=settings(folder, **fields).model_dump(mode="json"), state=root / "state",
        inputs={"tokens": str(tokens)},
        sources={"sources": [str(path) for path in sorted(folder.iterdir())]},
    )  # fmt: skip
    told = work(job, Ranks(), Journal(job.logs))
    files = (root / "state").glob("documents-*.jsonl")
    lines = [line for path in files for line in path.read_text("utf-8").splitlines()]
    return told, [json.loads(line) for line in lines]


@pytest.mark.parametrize("family", CONFIGS)
def test_documents_cost_what_transformers_says(tmp_path: Path, tokens: Path, family: str) -> None:
    model, words = save_model(tmp_path / "hf", family), save_tokenizer(tmp_path / "hf")
    told, rows = measured(tmp_path, tokens, tmp_path / "hf", context=256)
    assert (told["family"], told["context"]) == (family, 256)
    assert told["parameters"] == sum(weight.numel() for weight in model.parameters())
    texts = texts_of(tokens)
    assert [row["bytes"] for row in rows] == [len(text.encode()) for text in texts]
    assert all(row["is_restored"] for row in rows)
    for row, text in zip(rows, texts, strict=True):
        ids = torch.tensor([[words.bos_token_id, *words(text)["input_ids"]]])
        with torch.inference_mode():
            loss = float(model(ids, labels=ids).loss)  # mean over all but the first
        assert row["tokens"] == ids.shape[1] - 1
        assert row["nats"] == pytest.approx(loss * row["tokens"], rel=1e-5)


def test_windows_are_those_of_our_own_models(tmp_path: Path, tokens: Path) -> None:
    files = TokenFiles(tokens)
    shape = ShapeConfig(dim=32, layers=1, heads=2, kv_heads=1, context=24)
    model = Transformer(shape, files.meta.vocabulary, seed=3)
    write_hf(tmp_path / "hf", model, tokens / "tokenizer")
    told, rows = measured(tmp_path, tokens, tmp_path / "hf", stride=0.4, batch=3)
    assert (told["family"], told["context"]) == ("llama", 24)
    ids = [files.tokenizer.encode(text) for text in texts_of(tokens)]
    assert max(map(len, ids)) > 2 * shape.context
    reader = own_reader(model, files.tokenizer.eos)
    with torch.inference_mode():
        ours = document_nats(reader, ids, stride=0.4, batch=5, report=lambda *_: None)
    assert [row["nats"] for row in rows] == pytest.approx(ours, rel=1e-5)


def test_a_tokenizer_that_changes_texts_is_told_and_special_spelling_is_text(
    tmp_path: Path,
) -> None:
    texts = [f"The {END} fox", "the fox", "狐狸"]
    held = {"web": {"train": ["x"], "held": texts}}
    tokens = write_small_tokens(tmp_path / "tokens", held)
    save_model(tmp_path / "hf", "gpt2")
    words = save_tokenizer(tmp_path / "hf", is_lower=True)
    _, rows = measured(tmp_path, tokens, tmp_path / "hf")
    assert [row["is_restored"] for row in rows] == [False, True, True]
    assert rows[0]["tokens"] > len(words.encode("The  fox")) + 5  # not one token


def test_what_is_no_likelihood_is_refused(tmp_path: Path, tokens: Path) -> None:
    config = transformers.BertConfig(
        **SIZE, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    transformers.BertLMHeadModel(config).save_pretrained(tmp_path / "hf")
    save_tokenizer(tmp_path / "hf")
    with pytest.raises(ValueError, match="sees the tokens that come after"):
        measured(tmp_path, tokens, tmp_path / "hf")


def test_the_end_of_a_text_comes_before_the_end_of_a_turn(tmp_path: Path) -> None:
    words = save_tokenizer(tmp_path)
    config = transformers.GPT2Config(**SIZE, bos_token_id=50256, eos_token_id=[7, 8])
    assert separator_of(words, config) == words.bos_token_id
    words.bos_token = None
    assert separator_of(words, config) == 7  # 50256 is no token of this tokenizer
    words.eos_token = None
    with pytest.raises(ValueError, match="name one in tokenizer_config"):
        separator_of(words, transformers.GPT2Config(bos_token_id=None, eos_token_id=None))


def test_what_cannot_be_measured_says_how_it_can(tmp_path: Path, tokens: Path) -> None:
    with pytest.raises(ValueError, match="sources names no folder"):
        OutsideConfig()
    with pytest.raises(ValueError, match=r"give outside\.context"):
        context_of(CONFIGS["bloom"], 0)
    with pytest.raises(ValueError, match="longer than the model's 256 positions"):
        context_of(CONFIGS["gpt2"], 300)
    save_model(tmp_path / "bare", "gpt2")
    (tmp_path / "bare" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="transformers cannot read"):
        measured(tmp_path, tokens, tmp_path / "bare")


def test_no_document_and_the_same_documents_twice(tmp_path: Path, tokens: Path) -> None:
    save_model(tmp_path / "hf", "gpt2")
    save_tokenizer(tmp_path / "hf")
    none = write_small_tokens(tmp_path / "none", {"web": {"train": ["x"], "held": []}})
    told, rows = measured(tmp_path / "empty", none, tmp_path / "hf")
    assert (told["documents"], rows) == (0, [])
    found = [measured(tmp_path / name, tokens, tmp_path / "hf", batch=3) for name in ("a", "b")]
    assert found[0] == found[1]


def test_the_stage_gives_figures(tmp_path: Path) -> None:
    save_model(tmp_path / "hf", "gpt2")
    save_tokenizer(tmp_path / "hf")
    tokens = Tokens(tmp_path / "tokens")
    write_small_tokens(tokens.files, {"web": {"train": ["x"], "held": ["狐狸睡觉。"]}})
    config = settings(tmp_path / "hf")
    source = resolve(config.sources, artifacts={}, base=tmp_path, ledger=None, hashes=HashCache())
    for folder in ("files", "logs", "state"):
        (tmp_path / "job" / folder).mkdir(parents=True)
    job = Job(
        node="gpt", stage="outside", path=tmp_path / "job", store=Store(tmp_path / "store"),
        sources={"sources": source},
    )  # fmt: skip
    figures = outside(job, tokens=tokens, settings=config).figures()
    assert job.metrics["family"] == "gpt2"
    assert figures["bits_per_byte/all"].n == 1
    nats = figures["nats_per_document/all"].value
    # Five signs of three bytes.
    assert figures["bits_per_byte/all"].value == pytest.approx(nats / math.log(2) / 15)
