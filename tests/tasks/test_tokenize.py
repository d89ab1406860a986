"""tokenize writes the ids that a plain loop over documents would, shard by shard, once."""

import json
import random
import sys
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.tokenize import TokenizeConfig
from conf.tokenizer import TokenizerConfig
from storage.corpus import Corpus
from storage.errors import PartsFailed
from storage.tokenizer import Tokenizer, write_tokenizer
from storage.tokens import Tokens
from tasks.token_writer import choose_encoder
from tasks.tokenize import tokenize
from tasks.tokenizer_training import train
from tests.storage.corpora import corpus_of
from tests.tasks.text_jobs import digest_of, job_at

LEARNT = ["The cat sat on the mat 12 times.", "猫坐在垫子上，狗在山上吃草。"] * 20

DOCUMENTS = [
    {"text": "The cat sat.", "domain": "web", "split": "train", "language": "en"},
    {"text": "猫坐在垫子上。", "domain": "web", "split": "held", "language": "zh"},
    {"text": "a dog <|eos|> on 12 mats<|im_end|>", "domain": "books", "split": "train"},
    {"text": "", "domain": "web", "split": "train"},
    {"text": "狗吃草 🙂\n\n", "domain": "web", "split": "train", "language": "zh"},
    {"text": "held cat", "domain": "web", "split": "held"},
]


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("bpe")
    write_tokenizer(path / "files", train(LEARNT, TokenizerConfig(vocabulary=400)), "qwen2")
    return Tokenizer(path)


def plain(bpe: Tokenizer, documents: Sequence[Mapping[str, Any]]) -> dict[str, bytes]:
    """The same files, one document at a time."""
    files: dict[str, bytes] = {}
    for domain in sorted({d["domain"] for d in documents}):
        for split in ("train", "held"):
            tokens, ends, sizes = array("H"), array("Q"), array("I")
            for document in documents:
                if (document["domain"], document["split"]) == (domain, split):
                    tokens.extend([*bpe.chat.encode(document["text"]), 1])
                    ends.append(len(tokens))
                    sizes.append(len(document["text"].encode()))
            files[f"{domain}.{split}.bin"] = tokens.tobytes()
            files[f"{domain}.{split}.idx"] = ends.tobytes()
            if split == "held":
                files[f"{domain}.held.bytes"] = sizes.tobytes()
    return files


def written(tokens: Tokens) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in tokens.files.iterdir()
        if path.suffix in (".bin", ".idx", ".bytes")
    }


@pytest.mark.parametrize("engine", ["auto", "tokenizers"])
@pytest.mark.parametrize("cut", [0, 2, 6])
def test_files_are_those_of_a_plain_loop(
    tmp_path: Path, bpe: Tokenizer, engine: Any, cut: int
) -> None:
    corpus = corpus_of(tmp_path, [DOCUMENTS[:cut], DOCUMENTS[cut:]])
    job = job_at(tmp_path, "t")
    tokens = tokenize(job, corpus, bpe, TokenizeConfig(engine=engine))
    assert written(tokens) == plain(bpe, DOCUMENTS)
    assert job.metrics["documents"] == 6
    assert job.metrics["bytes"] == sum(len(d["text"].encode()) for d in DOCUMENTS)


def test_wide_ids_are_written_and_read_as_uint32(tmp_path: Path, bpe: Tokenizer) -> None:
    content = json.loads((bpe.files / "tokenizer.json").read_text("utf-8"))
    size = 70_000
    ids = content["model"]["vocab"]
    moved = ids["Ċ"]  # the line break, which every other merge leaves alone
    ids["Ċ"] = size - 1
    ids |= {f"\u2581{index}": index for index in (moved, *range(len(ids), size - 1))}
    write_tokenizer(
        tmp_path / "w" / "files", tokenizers.Tokenizer.from_str(json.dumps(content)), "qwen2"
    )
    wide = Tokenizer(tmp_path / "w")
    corpus = corpus_of(tmp_path, [DOCUMENTS])
    with pytest.raises(ValueError, match=r"70,000 tokens.*set tokenize\.dtype=uint32"):
        tokenize(job_at(tmp_path, "narrow"), corpus, wide, TokenizeConfig())
    found = tokenize(job_at(tmp_path, "t"), corpus, wide, TokenizeConfig(dtype="uint32")).reader
    assert found.meta.dtype == "uint32"
    tokens = found.tokens("web", "train")
    expected = [
        token
        for document in DOCUMENTS
        if (document["domain"], document["split"]) == ("web", "train")
        for token in [*wide.chat.encode(document["text"]), wide.meta.special["eos"]]
    ]
    assert tokens.dtype == np.uint32
    assert tokens.tolist() == expected
    assert max(expected) == size - 1
    assert [ids.tolist() for ids, _ in found.held_documents("web")] == [
        wide.chat.encode(d["text"])
        for d in DOCUMENTS
        if (d["domain"], d["split"]) == ("web", "held")
    ]


def test_the_reader_gives_the_texts_back(tmp_path: Path, bpe: Tokenizer) -> None:
    corpus = corpus_of(tmp_path, [DOCUMENTS])
    reader = tokenize(job_at(tmp_path, "t"), corpus, bpe, TokenizeConfig()).reader
    assert reader.domains == ["books", "web"]
    assert reader.meta.tokenizer_digest == bpe.meta.digest == reader.tokenizer.digest
    tokens, ends = reader.tokens("web", "train"), reader.ends("web", "train").tolist()
    texts = [
        reader.tokenizer.decode(tokens[start : end - 1].tolist())
        for start, end in zip([0, *ends], ends, strict=False)
    ]
    assert texts == ["The cat sat.", "", "狗吃草 🙂\n\n"]
    assert [int(tokens[end - 1]) for end in ends] == [1, 1, 1]
    assert reader.text_bytes("web").tolist() == [21, 8]
    assert reader.count("books", "held").documents == 0


def test_only_kept_documents_and_kept_spans_are_written(tmp_path: Path, bpe: Tokenizer) -> None:
    corpus = corpus_of(tmp_path, [[{"text": t, "split": "train"} for t in ("one two", "cat", "x")]])
    spans = pl.List(pl.Struct({"start": pl.UInt32, "end": pl.UInt32}))
    keep = pl.DataFrame({"keep": [True, False, True], "reason": [None, "bad", None]}).with_columns(
        pl.Series("cuts", [[{"start": 3, "end": 7}], [], []], dtype=spans)
    )
    Corpus.write(tmp_path / "kept" / "files", corpus, [keep], "decontaminate")
    tokens = tokenize(job_at(tmp_path, "t"), Corpus(tmp_path / "kept"), bpe, TokenizeConfig())
    ids = tokens.reader.tokens("default", "train").tolist()
    assert ids == [*bpe.chat.encode("one"), 1, *bpe.chat.encode("x"), 1]
    assert tokens.reader.count("default", "train").bytes == 4


def test_a_new_shard_costs_only_itself(tmp_path: Path, bpe: Tokenizer) -> None:
    tokenize(
        job_at(tmp_path, "a"), corpus_of(tmp_path, [DOCUMENTS], name="c"), bpe, TokenizeConfig()
    )
    more = corpus_of(tmp_path, [DOCUMENTS, DOCUMENTS[:2]], name="d")
    job = job_at(tmp_path, "b")
    tokens = tokenize(job, more, bpe, TokenizeConfig())
    assert job.metrics["shards"] == {"built": 1, "reused": 1}
    assert written(tokens) == plain(bpe, [*DOCUMENTS, *DOCUMENTS[:2]])


def test_reasons_do_not_count_but_keep_bits_do(tmp_path: Path, bpe: Tokenizer) -> None:
    corpus = corpus_of(tmp_path, [DOCUMENTS])
    built: list[int] = []
    for name, dropped, reason in (("a", 0, "short"), ("b", 0, "other"), ("c", 1, "short")):
        keep = pl.DataFrame(
            {
                "keep": [i != dropped for i in range(6)],
                "reason": [reason if i == dropped else None for i in range(6)],
            }
        )
        Corpus.write(tmp_path / name / "files", corpus, [keep], "filter")
        job = job_at(tmp_path, f"t{name}")
        tokenize(job, Corpus(tmp_path / name), bpe, TokenizeConfig())
        built.append(job.metrics["shards"]["built"])
    assert built == [1, 0, 1]


@pytest.mark.parametrize("shards", [[], [[]], [[], ["one document"]]])
def test_nothing_and_one_document_pass(
    tmp_path: Path, bpe: Tokenizer, shards: list[list[str]]
) -> None:
    job = job_at(tmp_path, "t")
    tokens = tokenize(job, corpus_of(tmp_path, shards), bpe, TokenizeConfig())
    documents = sum(map(len, shards))
    assert job.metrics["documents"] == documents
    assert tokens.reader.domains == (["default"] if documents else [])


def test_twice_gives_the_same_bytes_with_any_engine_and_workers(
    tmp_path: Path, bpe: Tokenizer
) -> None:
    digests: set[str] = set()
    for name, workers, engine in (("a", 1, "auto"), ("b", 2, "tokenizers")):
        root = tmp_path / name
        corpus = corpus_of(root, [DOCUMENTS, DOCUMENTS[1:]])
        job = job_at(root, "t", workers=workers)
        tokenize(job, corpus, bpe, TokenizeConfig.model_validate({"engine": engine}))
        digests.add(digest_of(job.files))
    assert len(digests) == 1


def test_a_domain_that_cannot_name_a_file_is_refused(tmp_path: Path, bpe: Tokenizer) -> None:
    corpus = corpus_of(tmp_path, [[{"text": "x", "domain": "../web"}]])
    with pytest.raises(PartsFailed, match="cannot name a file"):
        tokenize(job_at(tmp_path, "t"), corpus, bpe, TokenizeConfig())


ODD_PIECES = "cat|mat| |  |猫|坐在|12|3.5|é|'s|'S|，|\u3000|\u200b|🙂|\t|\r\n|\x1c|٣|½|\x00|\ufffd"
ODD = st.lists(
    st.sampled_from([*ODD_PIECES.split("|"), "\n", "\n\n", "<|eos|>", "<|im_end|>"]),
    max_size=30,
).map("".join)


@settings(max_examples=200, deadline=None)
@given(texts=st.lists(ODD | st.text(max_size=30), min_size=1, max_size=5))
def test_the_fast_encoder_gives_the_same_ids(bpe: Tokenizer, texts: list[str]) -> None:
    pytest.importorskip("fastokens")
    encode, name = choose_encoder(bpe.chat, bpe.files, ["cat"], "auto")
    assert name == "fastokens"
    ids, ends = encode(texts)
    expected = [bpe.chat.encode(text) for text in texts]
    assert ids.tolist() == [token for of_text in expected for token in of_text]
    assert ends[-1] == len(ids)


ALPHABETS = (
    "the cat sat on mats, dogs 12.5% ", "猫狗坐在垫子上，吃草。《山》", "🙂👩\u200d👩\u200d👧🇨🇳❤\ufe0f",
    "e\u0301a\u0308\u0323n\u0303", "\x00\x01\x7f\x85\x1c\ufffd\ufeff\u200b", " \t\n\r\u3000\u00a0", "٣½Ⅳ①𝟘𠮷",
    "<|eos|>im_start", "".join(map(chr, range(0x20, 0x3000, 37))),
)  # fmt: skip


def generated(count: int, *, seed: int) -> list[dict[str, Any]]:
    """Documents of runs of signs of one kind after another; some are empty, some long runs of one sign.

    A lone surrogate cannot be in a corpus: reading puts U+FFFD there.
    """
    pick = random.Random(seed)

    def text() -> str:
        runs = pick.choice((0, 1, 3, 20))
        kinds = pick.choices(ALPHABETS, k=runs)
        parts = ["".join(pick.choices(kind, k=pick.choice((1, 2, 7, 40)))) for kind in kinds]
        return "".join(parts) * (100 if pick.random() < 0.01 else 1)

    return [
        {"text": text(), "domain": pick.choice("ab"), "split": pick.choice(("train", "held"))}
        for _ in range(count)
    ]


@pytest.mark.parametrize("engine", ["auto", "tokenizers"])
def test_thousands_of_documents_get_the_ids_of_the_library(
    tmp_path: Path, bpe: Tokenizer, engine: Any
) -> None:
    assert_ids_of_the_library(tmp_path, bpe, generated(3_000, seed=1), engine)


@pytest.mark.soak
@pytest.mark.parametrize("engine", ["auto", "tokenizers"])
def test_a_line_of_ten_million_signs_gets_the_ids_of_the_library(
    tmp_path: Path, bpe: Tokenizer, engine: Any
) -> None:
    lines = [
        line * (10_000_000 // len(line.encode())) for line in ("a", "猫", "ab 猫，", "\x00", "🙂")
    ]
    lines.append(
        " " * 9_000_000
    )  # from ten million white spaces on, the library's pattern gives up
    documents = [{"text": line, "domain": "a", "split": "train"} for line in lines]
    assert_ids_of_the_library(tmp_path, bpe, documents + generated(20_000, seed=2), engine)


def assert_ids_of_the_library(
    tmp_path: Path, bpe: Tokenizer, documents: list[dict[str, Any]], engine: Any
) -> None:
    library = tokenizers.Tokenizer.from_file(str(bpe.files / "tokenizer.json"))
    library.encode_special_tokens = True
    half = len(documents) // 2
    corpus = corpus_of(tmp_path, [documents[:half], documents[half:]])
    found = tokenize(job_at(tmp_path, "t"), corpus, bpe, TokenizeConfig(engine=engine)).reader
    for domain, split in (("a", "train"), ("a", "held"), ("b", "train"), ("b", "held")):
        texts = [d["text"] for d in documents if (d["domain"], d["split"]) == (domain, split)]
        if texts:
            wanted = [[*library.encode(text, add_special_tokens=False).ids, 1] for text in texts]
            assert found.ends(domain, split).tolist() == np.cumsum([*map(len, wanted)]).tolist()
            assert found.tokens(domain, split).tolist() == [t for ids in wanted for t in ids]


def test_a_fast_encoder_that_differs_or_is_missing_is_not_used(
    bpe: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    write_tokenizer(other, train(["zzz other text"] * 9, TokenizerConfig(vocabulary=280)), "gpt-2")
    encode, name = choose_encoder(bpe.chat, other, ["the cat sat on the mat"], "auto")
    assert name == "tokenizers"
    assert encode(["the cat"])[0].tolist() == bpe.chat.encode("the cat")
    monkeypatch.setitem(sys.modules, "fastokens", None)
    assert choose_encoder(bpe.chat, bpe.files, ["cat"], "auto")[1] == "tokenizers"
