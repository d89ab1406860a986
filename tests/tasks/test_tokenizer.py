"""tokenizer learns from a bounded, balanced sample of training text, the same bytes every time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from conf.tokenizer import TokenizerConfig
from storage.conversations import Conversations
from storage.corpus import Corpus
from tasks.text_sample import sample_texts, shares
from tasks.tokenizer import tokenizer
from tests.storage.corpora import corpus_of
from tests.tasks.text_jobs import digest_of, job_at

EN = "The quick brown fox number {} jumps over the lazy dog, said document {}."
ZH = "第{}只敏捷的棕色狐狸跳过了懒狗，文件{}这样说。"


def bilingual(root: Path, en: int = 60, zh: int = 20, *, held_every: int = 10) -> Corpus:
    documents = [
        {
            "text": (EN if language == "en" else ZH).format(i, i * 7),
            "language": language,
            "split": "held" if i % held_every == 0 else "train",
        }
        for language, count in (("en", en), ("zh", zh))
        for i in range(count)
    ]
    return corpus_of(root, [documents[:30], documents[30:]])


def conversations_of(root: Path) -> Conversations:
    rows = [
        {
            "id": str(i),
            "messages": [
                {"role": "user", "content": f"zyx{i}"},
                {"role": "assistant", "content": "zyxzyx"},
            ],
            "domain": "d",
            "source": "s",
            "language": "en",
        }
        for i in range(50)
    ]
    folder = root / "conversations" / "files"
    folder.mkdir(parents=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "train.jsonl").write_text(lines)
    (folder / "held.jsonl").write_text(lines.replace("zyx", "HELD"))
    return Conversations(folder.parent)


def test_it_has_the_size_the_bytes_and_the_digits(tmp_path: Path) -> None:
    job = job_at(tmp_path, "t")
    found = tokenizer(job, bilingual(tmp_path), TokenizerConfig(vocabulary=330))
    chat = found.chat
    assert chat.vocabulary == job.metrics["vocabulary"] == 330
    assert found.meta.pretokenizer == "qwen2"
    assert [chat.decode([i]) for i in chat.encode("1234")] == ["1", "2", "3", "4"]
    assert chat.decode(chat.encode("日本語 ümlaut 🙂")) == "日本語 ümlaut 🙂"
    assert len(chat.encode("狐狸跳过了懒狗")) < 21  # 7 characters of 3 bytes
    assert set(job.metrics["compression"]) == {"en", "zh"}
    assert all(value > 1 for value in job.metrics["compression"].values())


def test_a_sentence_that_many_share_is_not_one_token(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path, [["牛是什么颜色的动物"] * 200])
    chat = tokenizer(job_at(tmp_path, "t"), corpus, TokenizerConfig(vocabulary=400)).chat
    assert 2 <= len(chat.encode("牛是什么颜色的动物")) <= 4  # 27 bytes, at most 16 a token


def test_digits_may_merge(tmp_path: Path) -> None:
    config = TokenizerConfig(vocabulary=300, splits_digits=False)
    found = tokenizer(job_at(tmp_path, "t"), corpus_of(tmp_path, [["1000 1000 1000"] * 9]), config)
    assert found.meta.pretokenizer == "gpt-2"
    assert len(found.chat.encode("1000")) == 1


def test_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    corpus = bilingual(tmp_path)
    digests = set()
    for name in ("a", "b"):
        job = job_at(tmp_path, name)
        tokenizer(job, corpus, TokenizerConfig(vocabulary=400))
        digests.add(digest_of(job.files))
    assert len(digests) == 1


def test_held_and_dropped_documents_are_not_learnt_from(tmp_path: Path) -> None:
    import polars as pl

    documents = [
        {"text": "secretword " * 50, "split": "held"},
        {"text": "droppedword " * 50, "split": "train"},
        {"text": "plainword " * 50, "split": "train"},
    ]
    corpus = corpus_of(tmp_path, [documents])
    keep = pl.DataFrame({"keep": [True, False, True], "reason": [None, "bad", None]})
    Corpus.write(tmp_path / "kept" / "files", corpus, [keep], "filter")
    chat = tokenizer(
        job_at(tmp_path, "t"), Corpus(tmp_path / "kept"), TokenizerConfig(vocabulary=400)
    ).chat
    assert len(chat.encode(" plainword")) == 1
    assert len(chat.encode(" secretword")) > 3
    assert len(chat.encode(" droppedword")) > 3


def test_shares_are_equal_as_far_as_there_is_text() -> None:
    totals = {"en": 1000, "zh": 300, "de": 10}
    # de has 10; of the other 590 half each: 295
    assert shares(totals, 600, "equal") == {"de": 10, "zh": 295, "en": 295}
    assert shares(totals, 5000, "equal") == totals
    assert shares(totals, 131, "natural") == {"en": 100, "zh": 30, "de": 1}
    assert shares({}, 600, "equal") == {}


def test_a_sample_is_bounded_balanced_and_seeded(tmp_path: Path) -> None:
    corpus = bilingual(tmp_path, en=300, zh=100, held_every=1000)
    config = TokenizerConfig(sample_bytes=6000, sample_seed=1)
    sample = sample_texts(corpus, None, config)
    longest = max(len(text.encode()) for text in sample.texts)
    assert all(3000 <= taken < 3000 + longest for taken in sample.bytes.values())
    assert sum(len(text.encode()) for text in sample.texts) == sum(sample.bytes.values())
    assert sample_texts(corpus, None, config) == sample
    assert sample_texts(corpus, None, TokenizerConfig(sample_bytes=6000)).texts != sample.texts


def test_a_book_weighs_no_more_than_pages(tmp_path: Path) -> None:
    book = "".join(f"line {i} of the book. " for i in range(10_000))
    pages = ["a page " + str(i) for i in range(1000)]
    corpus = corpus_of(tmp_path, [[{"text": t, "split": "train"} for t in (book, *pages)]])
    config = TokenizerConfig(sample_bytes=20_000, chunk_chars=1000)
    sample = sample_texts(corpus, None, config)
    assert max(map(len, sample.texts)) <= 1000
    assert all(text in book for text in sample.texts if len(text) > 20)
    assert sum(sample.bytes.values()) <= 21_000


def test_conversations_get_their_share(tmp_path: Path) -> None:
    corpus = bilingual(tmp_path)
    config = TokenizerConfig(vocabulary=320, sample_bytes=2000)
    conversations = conversations_of(tmp_path)
    sample = sample_texts(corpus, conversations, config)
    assert 200 <= sample.bytes["conversations/en"] < 220
    assert any("zyx" in text for text in sample.texts)
    assert not any("HELD" in text for text in sample.texts)
    job = job_at(tmp_path, "t")
    found = tokenizer(job, corpus, config, conversations=conversations)
    assert len(found.chat.encode("zyx")) == 1


def test_a_vocabulary_the_text_cannot_fill_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job = job_at(tmp_path, "t")
    tokenizer(job, corpus_of(tmp_path, [["only one document"]]), TokenizerConfig())
    assert job.metrics["vocabulary"] < job.metrics["vocabulary_asked"] == 32_000
    assert "set tokenizer.vocabulary=" in caplog.text


def test_poisoned_text_does_not_stop_it(tmp_path: Path) -> None:
    texts = [
        "\x00" * 500,
        "\ufffd" * 500,
        "<|eos|><|pad|>" * 20,
        "\u200b",
        "a" * 50_000,
        "",
        "词" * 99,
    ]
    corpus = corpus_of(tmp_path, [texts])
    chat = tokenizer(job_at(tmp_path, "t"), corpus, TokenizerConfig(vocabulary=300)).chat
    assert all(chat.decode(chat.encode(text)) == text for text in texts)
    assert max(len(chat.decode([i])) for i in range(4, chat.vocabulary)) <= 16


@pytest.mark.parametrize("shards", [[], [[]], [[""]]])
def test_nothing_to_learn_from_is_an_error(tmp_path: Path, shards: list[list[str]]) -> None:
    with pytest.raises(ValueError, match="keeps no training document"):
        tokenizer(job_at(tmp_path, "t"), corpus_of(tmp_path, shards), TokenizerConfig())


@pytest.mark.parametrize(("size", "message"), [(1 << 25, "of 260 to"), (100, "of 260 to")])
def test_sizes_that_cannot_be_are_refused(size: int, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TokenizerConfig(vocabulary=size)


def test_wordpiece_takes_the_longest_piece_and_every_text_comes_back(tmp_path: Path) -> None:
    config = TokenizerConfig(algorithm="wordpiece", vocabulary=700, special=("<|tool|>",))
    found = tokenizer(job_at(tmp_path, "a"), bilingual(tmp_path), config)
    chat = found.chat
    assert (found.meta.algorithm, found.meta.pretokenizer) == ("wordpiece", "other")
    for text in ("a" * 1000, "<|tool|><|eos|> \u203fx##y \x00 é", "日本 🙂\n\n", "狐狸跳过了懒狗"):
        ids = chat.encode(text)
        assert chat.decode(ids) == text
        assert min(ids) > 4
    assert len(chat.encode(" jumps over the lazy")) == 4
    digest = digest_of(tmp_path / "a" / "files")
    tokenizer(job_at(tmp_path, "b"), bilingual(tmp_path), config)
    assert digest_of(tmp_path / "b" / "files") == digest


def test_unigram_gives_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    config = TokenizerConfig(algorithm="unigram", vocabulary=600, special=("<|tool|>",))
    job = job_at(tmp_path, "a")
    found = tokenizer(job, bilingual(tmp_path), config)
    chat = found.chat
    assert (found.meta.algorithm, found.meta.pretokenizer) == ("unigram", "other")
    for text in (
        "a" * 1000,
        "<|tool|><|eos|><unk> \u2581x##y \x00 é",
        "日本 🙂\n\n",
        "狐狸跳过了懒狗",
    ):
        ids = chat.encode(text)
        assert chat.decode(ids) == text
        assert min(ids, default=5) > 4
    assert len(chat.encode(" jumps over the lazy")) == 4
    assert max(len(chat.decode([i])) for i in range(5, chat.vocabulary)) <= 16
    sample = json.dumps(sample_texts(bilingual(tmp_path), None, config).texts)
    script = (
        "import hashlib, json, sys; from conf.tokenizer import TokenizerConfig; "
        "from tasks.tokenizer_training import train; "
        "config = TokenizerConfig(algorithm='unigram', vocabulary=600, special=('<|tool|>',)); "
        "print(hashlib.sha256(train(json.load(sys.stdin), config).to_str().encode()).hexdigest())"
    )
    for seed in ("1", "2"):
        run = subprocess.run(
            [sys.executable, "-c", script],
            input=sample,
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        )
        assert run.stdout.strip() == found.meta.digest


def test_unigram_without_its_library_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ValueError, match="pip install 'bessemer\\[unigram\\]'"):
        tokenizer(
            job_at(tmp_path, "t"),
            bilingual(tmp_path),
            TokenizerConfig(algorithm="unigram", vocabulary=600),
        )


def test_tokens_that_nothing_uses_are_counted(tmp_path: Path) -> None:
    job = job_at(tmp_path, "t")
    corpus = corpus_of(tmp_path, [[{"text": "aaa bbb", "split": "train"}] * 3])
    chat = tokenizer(job, corpus, TokenizerConfig(vocabulary=262)).chat
    assert chat.vocabulary == 262  # 4 special ones, 256 bytes, and two merges of aaa, bbb, " bbb"
    used = set(chat.encode("aaa bbb"))
    assert job.metrics["unused_tokens"] == 262 - 4 - len(used)
    assert job.metrics["unreachable_tokens"] == 13  # bytes that UTF-8 never has
    assert [row["text"] for row in job.tables["unreachable tokens"]][:2] == ["‹C0›", "‹C1›"]


@pytest.mark.parametrize("algorithm", ["bpe", "wordpiece", "unigram"])
def test_transformers_loads_the_folder(tmp_path: Path, algorithm: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = TokenizerConfig.model_validate({"algorithm": algorithm, "vocabulary": 600})
    found = tokenizer(job_at(tmp_path, "t"), bilingual(tmp_path), config)
    theirs = transformers.AutoTokenizer.from_pretrained(str(found.files))
    for text in ("The quick fox 42.", "敏捷的狐狸🙂", "", "  two\n\n"):
        assert theirs(text)["input_ids"] == found.chat.encode(text)
    names = {path.name for path in found.files.iterdir()}
    older = {
        "bpe": {"vocab.json", "merges.txt"},
        "wordpiece": {"vocab.txt"},
        "unigram": {"unigram.json"},
    }[algorithm]
    assert names == {"tokenizer.json", "tokenizer.meta.json", "tokenizer_config.json"} | older
