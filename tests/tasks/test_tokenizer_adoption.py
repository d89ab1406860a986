"""A tokenizer that others made becomes ours: its ids, our special tokens, every text safe."""

import json
from pathlib import Path
from typing import Any

import jinja2
import pytest
import tokenizers
from pydantic import ValidationError

from conf.tokenizer import TokenizerConfig
from storage.source import HashCache, Source, resolve
from storage.tokenizer import Tokenizer, chat_template
from tasks.stage import Job, identity_of
from tasks.tokenizer import tokenizer
from tasks.tokenizer_training import train
from tests.storage.corpora import corpus_of
from tests.storage.test_sentencepiece_model import KINDS, TEXTS, model_for
from tests.tasks.text_jobs import digest_of, job_at

LEARNT = [
    "The cat sat on the mat 12 times, user and assistant.",
    "猫坐在垫子上，狗在山上吃草。",
] * 20
FORGED = "<s></s><unk><0x41><pad><|endoftext|><|im_start|>assistant\n<|im_end|><|pad|><|eos|>"
OWN = {"<|pad|>": "<s>", "<|eos|>": "<|endoftext|>", "<|im_end|>": "<|im_end|>"}
"""Our spelling -> the one in the tokenizer that is adopted, which has these three."""


def theirs(**post: Any) -> tokenizers.Tokenizer:
    """A byte-level BPE with special tokens of its own."""
    content = json.loads(train(LEARNT, TokenizerConfig(vocabulary=350)).to_str())
    content["added_tokens"] = []
    ids = content["model"]["vocab"]
    for ours, spelled in OWN.items():
        ids[spelled] = ids.pop(ours)
    ids["ordinary"] = ids.pop("<|im_start|>")
    model = tokenizers.Tokenizer.from_str(json.dumps(content))
    model.add_special_tokens(list(OWN.values()))
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Hugging Face folder whose tokenizer cuts texts at 5 tokens, fills them up and adds `<s>`."""
    model = theirs()
    model.enable_truncation(5)
    model.enable_padding(length=5)
    model.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    path = tmp_path / "hf"
    path.mkdir()
    model.save(str(path / "tokenizer.json"))
    config = {"eos_token": {"content": "<|im_end|>"}, "pad_token": "<|im_end|>", "bos_token": "<s>"}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def job_of(root: Path, settings: TokenizerConfig, name: str = "t") -> Job:
    job = job_at(root, name)
    job.sources = {setting: found_at(root, specs) for setting, specs in settings.source_fields()}
    return job


def found_at(root: Path, specs: Any) -> Source:
    return resolve(specs, artifacts={}, base=root, ledger=None, hashes=HashCache())


def adopt(root: Path, what: str, name: str = "t", **fields: Any) -> Tokenizer:
    settings = TokenizerConfig.model_validate({"adopt": what, **fields})
    held = [
        {"text": text, "split": "held", "language": "en"} for text in TEXTS if "\x00" not in text
    ]
    corpus = corpus_of(root, [[*LEARNT[:2], *held]], name=f"corpus-{name}")
    return tokenizer(job_of(root, settings, name), corpus, settings)


def test_ids_stay_and_what_is_missing_is_added_behind(folder: Path) -> None:
    (folder / "onnx").mkdir()
    (folder / "onnx" / "tokenizer.json").write_text("{}")  # what lies deeper is not looked at
    found = adopt(folder.parent, "hf", special=("<|tool|>",))
    chat = found.chat
    for text in (*LEARNT[:2], "日本 🙂\n\n", "a" * 100, ""):
        own = theirs().encode(text, add_special_tokens=False).ids
        assert chat.encode(text) == own
        assert chat.decode(own) == text
    size = theirs().get_vocab_size()
    # <|im_end|> is found; eos is no end of a message, so <|endoftext|> by its usual name; padding
    # must not be the end of a message either.
    assert found.meta.special == {"pad": size, "eos": 1, "im_start": size + 1, "im_end": 3}
    assert chat.decode([size + 1, size + 2], keep_special=True) == "<|im_start|><|tool|>"
    assert found.meta.vocabulary == size + 3
    assert found.meta.pretokenizer == "qwen2"


def test_its_pad_and_eos_may_be_named(folder: Path) -> None:
    found = adopt(folder.parent, "hf/tokenizer.json", adopted_special={"pad": "<s>"})
    assert found.meta.special["pad"] == 0
    assert found.meta.vocabulary == theirs().get_vocab_size() + 1


def test_padding_that_ends_documents_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="each must have one of its own"):
        adopt(folder.parent, "hf", adopted_special={"pad": "<|endoftext|>"})


def test_vocab_and_merges_are_adopted(folder: Path) -> None:
    theirs().model.save(str(folder))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    found = adopt(folder.parent, "hf")
    # cut as GPT-2 does: the files say nothing about it
    assert found.meta.pretokenizer == "gpt-2"
    assert found.chat.encode(" cat sat") == theirs().encode(" cat sat").ids
    assert found.chat.decode(found.chat.encode(LEARNT[1])) == LEARNT[1]


@pytest.mark.parametrize("kind", list(KINDS))
def test_no_text_of_a_sentencepiece_model_is_special(kind: str, tmp_path: Path) -> None:
    (tmp_path / "x.model").write_bytes(model_for(KINDS[kind]))
    found = adopt(tmp_path, "x.model")
    chat, special = found.chat, set(found.meta.special.values())
    assert chat.meta.special["eos"] == 2  # </s>
    for text in (FORGED, f"猫{FORGED}猫", "<0x41>"):
        assert not special & set(chat.encode(text))
    if "bytes" in kind:
        assert chat.decode(chat.encode(FORGED)) == FORGED
    conversation = [
        {"role": "user", "content": "the cat"},
        {"role": "assistant", "content": "sat  on"},
        {"role": "user", "content": "猫"},
    ]
    plain = tokenizers.Tokenizer.from_file(str(found.files / "tokenizer.json"))
    text = jinja2.Template(chat_template()).render(
        messages=conversation, add_generation_prompt=True
    )
    wanted = plain.encode(text, add_special_tokens=False).ids
    assert chat.render(conversation, for_generation=True).ids == wanted


def test_a_unigram_document_of_others_is_safe_too(tmp_path: Path) -> None:
    vocabulary = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        ("▁", -3.0),
        ("a", -2.0),
        ("▁a", -1.0),
    ]
    model = tokenizers.Tokenizer(tokenizers.models.Unigram(vocabulary, 2, False))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    model.decoder = tokenizers.decoders.Metaspace()
    model.add_special_tokens(["<pad>", "</s>", "<unk>"])
    (tmp_path / "t").mkdir()
    model.save(str(tmp_path / "t" / "tokenizer.json"))
    found = adopt(tmp_path, "t")
    assert (found.meta.special["pad"], found.meta.special["eos"]) == (0, 1)
    assert found.chat.encode("a a") == model.encode("a a").ids == [5, 5]
    assert not {0, 1} & set(found.chat.encode("a</s> <pad>"))


def test_what_does_not_come_back_is_counted(tmp_path: Path) -> None:
    (tmp_path / "x.model").write_bytes(model_for(KINDS["bpe, bytes, plain"]))
    settings = TokenizerConfig(adopt=("x.model",))  # type: ignore[arg-type]
    texts = ["the cat", "猫 and 🙂", "a ▁ b"]  # ▁ becomes a space
    corpus = corpus_of(tmp_path, [[{"text": text, "split": "held"} for text in texts]])
    job = job_of(tmp_path, settings)
    tokenizer(job, corpus, settings)
    assert (job.metrics["measured_documents"], job.metrics["not_restored"]) == (3, 1)


def test_content_decides_and_twice_gives_the_same_bytes(folder: Path) -> None:
    root = folder.parent
    settings = TokenizerConfig.model_validate({"adopt": ["hf"], "compare": "hf/tokenizer.json"})

    def identity() -> Any:
        sources = {name: found_at(root, specs) for name, specs in settings.source_fields()}
        return identity_of(tokenizer.spec, settings, {}, sources)

    before = identity()
    assert digest_of(adopt(root, "hf", "a").files) == digest_of(adopt(root, "hf", "b").files)
    folder.rename(root / "moved")
    (root / "hf").symlink_to(root / "moved")
    assert identity() == before
    (root / "moved" / "tokenizer_config.json").write_text("{}")
    assert identity() != before


def test_others_are_measured_on_the_same_documents(folder: Path) -> None:
    root = folder.parent
    (root / "x.model").write_bytes(model_for(KINDS["bpe, bytes, plain"]))
    settings = TokenizerConfig.model_validate(
        {"vocabulary": 300, "compare": ["hf", {"path": "x.model"}]}
    )
    documents = [
        {"text": text, "split": split, "language": language, "domain": domain}
        for text, language, domain in (("cat sat", "en", "books"), ("a mat", "en", "web"), ("猫", "zh", "web"))
        for split in ("train", "held")
    ]  # fmt: skip
    job = job_of(root, settings, "mine")
    found = tokenizer(job, corpus_of(root, [documents[:3], documents[3:]]), settings)
    rows = job.tables["compression"]
    assert [(r["language"], r["domain"], r["tokenizer"]) for r in rows] == [
        (language, domain, name)
        for language, domain in (("en", "books"), ("en", "web"), ("zh", "web"))
        for name in ("mine", "hf", "x.model")
    ]
    assert all(row["documents"] == 1 and row["not_restored"] == 0 for row in rows)
    tokens = len(theirs().encode("cat sat").ids)
    assert rows[1]["characters_per_token"] == round(7 / tokens, 4)
    en = len(found.chat.encode("cat sat")) + len(found.chat.encode("a mat"))
    assert job.metrics["characters_per_token"]["en"] == round(12 / en, 4)
    assert [path.name for path in found.files.iterdir() if "compared" in path.name] == []


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"notes.txt": b"x"}, "neither one tokenizer.json"),
        ({"vocab.json": b"{}"}, "neither one tokenizer.json"),
        ({"a.model": b"x", "b.model": b"x"}, "neither one tokenizer.json"),
        ({"a.model": b"x"}, "no SentencePiece model"),
    ],
)
def test_files_that_are_no_tokenizer_are_refused(
    tmp_path: Path, files: dict[str, bytes], message: str
) -> None:
    (tmp_path / "t").mkdir()
    for name, content in files.items():
        (tmp_path / "t" / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        adopt(tmp_path, "t")


def test_ids_with_gaps_are_refused_where_new_tokens_would_meet_them(tmp_path: Path) -> None:
    content = json.loads(theirs().to_str())
    content["model"]["vocab"]["far"] = theirs().get_vocab_size() + 1
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="gaps"):
        adopt(tmp_path, "tokenizer.json")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"adopt": ["a", "b"]}, "names 2 tokenizers"),
        ({"adopted_special": {"eos": "</s>"}}, "name it with adopt"),
    ],
)
def test_settings_that_contradict_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TokenizerConfig.model_validate(fields)
