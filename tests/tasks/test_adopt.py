"""A model that transformers saved becomes a policy, and goes out again with the same logits."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from conf.adopt import AdoptConfig
from conf.contract import JobFile
from conf.launch import LaunchConfig
from conf.settings import SourceSpec
from model.adopt import change_of, folder_of, ids_of, with_vocabulary, work
from model.convert import write_hf
from model.journal import Journal
from model.ranks import Ranks
from model.weights import load_model
from storage.artifact import Artifact
from storage.checkpoint import Policy
from storage.identity import fingerprint
from storage.record import Record
from storage.source import HashCache, resolve
from storage.store import Store
from storage.tokenizer import MODEL_FILE, Tokenizer
from tasks.stage import execute, stages
from tests.model.test_huggingface import made
from tests.model.tiny import tiny_tokenizer

LAUNCH = LaunchConfig(threads=1, device="cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Qwen3 with 350 token ids, and the first 350 tokens of a tokenizer of 369."""
    tiny_tokenizer(tmp_path / "tokenizer")
    made("Qwen3", vocab_size=350, tie_word_embeddings=False).save_pretrained(tmp_path / "qwen")
    content = json.loads((tmp_path / "tokenizer" / MODEL_FILE).read_text("utf-8"))
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {token: id_ for token, id_ in vocabulary.items() if id_ < 350}
    (tmp_path / "qwen" / MODEL_FILE).write_text(json.dumps(content), "utf-8")
    return tmp_path


def settings(**fields: Any) -> AdoptConfig:
    return AdoptConfig(sources=(SourceSpec(path="qwen"),), launch=LAUNCH, **fields)


def job(folder: Path, config: AdoptConfig) -> JobFile:
    for name in ("files", "logs", "state"):
        (folder / "attempt" / name).mkdir(parents=True, exist_ok=True)
    return JobFile(
        stage="adopt",
        node="adopt",
        settings=config.model_dump(mode="json"),
        inputs={"tokenizer": str(folder / "tokenizer")},
        sources={"sources": [str(path) for path in sorted((folder / "qwen").iterdir())]},
        files=folder / "attempt" / "files",
        logs=folder / "attempt" / "logs",
        state=folder / "attempt" / "state",
        launch=LAUNCH,
    )


def adopt_here(folder: Path, config: AdoptConfig) -> dict[str, Any]:
    this = job(folder, config)
    return work(this, Ranks(), Journal(this.logs))


@torch.no_grad()
def test_it_goes_in_resized_and_out_again_with_the_logits_of_transformers(folder: Path) -> None:
    figures = adopt_here(folder, settings())
    assert (figures["vocabulary_before"], figures["vocabulary"]) == (350, 369)
    ours = load_model(folder / "attempt" / "files")
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder / "qwen")
    ids = torch.randint(350, (2, 40), generator=torch.Generator().manual_seed(0))
    wanted = theirs(ids).logits
    assert (ours.logits(ours.hidden(ids))[..., :350] - wanted).abs().max() <= 1e-4
    # The nineteen new rows are the mean of the others, in the head as in the embedding.
    for weight in (ours.embedding.weight, ours.head_weight):
        torch.testing.assert_close(weight[350:], weight[:350].mean(0).expand(19, -1))
    write_hf(folder / "out", ours, folder / "tokenizer")
    again = transformers.AutoModelForCausalLM.from_pretrained(folder / "out")
    assert (again(ids).logits[..., :350] - wanted).abs().max() <= 1e-4


def test_a_tokenizer_with_other_ids_is_refused(folder: Path) -> None:
    path = folder / "qwen" / MODEL_FILE
    content = json.loads(path.read_text("utf-8"))
    vocabulary = content["model"]["vocab"]
    first, second = [token for token, id_ in vocabulary.items() if id_ in (300, 301)]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(content), "utf-8")
    with pytest.raises(ValueError, match=r"2 tokens of .* have other ids"):
        adopt_here(folder, settings())


def test_the_context_can_be_shortened_and_not_made_longer(folder: Path) -> None:
    assert adopt_here(folder, settings(context=32))["context"] == 32
    with pytest.raises(ValueError, match="context=128 is longer than the 64 tokens"):
        adopt_here(folder, settings(context=128))


def test_no_folder_and_two_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sources names no folder"):
        AdoptConfig()
    with pytest.raises(ValueError, match=r"hold none config\.json"):
        folder_of([tmp_path / "model.safetensors"])
    with pytest.raises(ValueError, match="name the folder of one model"):
        folder_of([tmp_path / "a" / "config.json", tmp_path / "b" / "config.json"])


def test_an_adapter_that_is_not_merged_is_refused(folder: Path) -> None:
    (folder / "qwen" / "adapter_config.json").write_text('{"peft_type": "LORA"}', "utf-8")
    with pytest.raises(ValueError, match="holds an adapter that is not merged"):
        folder_of(sorted((folder / "qwen").iterdir()))


def test_rows_that_no_token_has_are_cut(folder: Path) -> None:
    adopt_here(folder, settings())
    model = load_model(folder / "attempt" / "files")
    fewer = with_vocabulary(model, 340)
    assert fewer.vocabulary == 340
    assert change_of(model, fewer) == 0.0


def test_ids_of_a_unigram_model_are_its_places(tmp_path: Path) -> None:
    content = {
        "model": {"vocab": [["a", -1.0], ["b", -2.0]]},
        "added_tokens": [{"content": "<x>", "id": 2}],
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert ids_of(tmp_path / "tokenizer.json") == {"a": 0, "b": 1, "<x>": 2}


def test_the_stage_commits_a_policy_and_hits_the_second_time(folder: Path) -> None:
    store = Store(folder / "store")
    claim = store.claim(fingerprint({"test": "tokenizer"}))
    assert claim is not None
    with claim:
        (claim.path / "files").rmdir() if (claim.path / "files").exists() else None
        (folder / "tokenizer").rename(claim.path / "files")
        record = Record(
            fingerprint=claim.fingerprint, kind="tokenizer", stage="test", digest="", identity={}
        )
        tokenizer: Artifact = Tokenizer(store.commit(claim, record))
    config = settings()
    source = resolve(config.sources, artifacts={}, base=folder, ledger=None, hashes=HashCache())
    found = [
        execute(
            stages()["adopt"], node="adopt", settings=config, inputs={"tokenizer": tokenizer},
            sources={"sources": source}, store=store, workers=1,
        )
        for _ in range(2)
    ]  # fmt: skip
    assert [outcome.status for outcome in found] == ["built", "hit"]
    policy = found[0].artifact
    assert isinstance(policy, Policy)
    assert policy.card.vocabulary == 369
    assert policy.card.shape.has_qk_norm
