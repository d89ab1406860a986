"""Difficulty columns: one number a training document, equal to counts made by hand, kept by later landings."""

import math
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from conf.tokenize import TokenizeConfig
from conf.tokenizer import TokenizerConfig
from storage.tokenizer import Tokenizer, write_tokenizer
from storage.tokens import Tokens
from tasks.difficulty import tag_entropy
from tasks.tokenize import tokenize
from tasks.tokenizer_training import train
from tests.storage.corpora import corpus_of
from tests.tasks.text_jobs import job_at, with_landings

FIRST = [
    {"text": "the cat sat on the mat", "language": "en"},
    {"text": "", "language": "en"},
    {"text": "the dog sat", "split": "held", "language": "en"},
    {"text": "猫坐在垫子上。猫吃鱼。", "language": "zh"},
]
LATER = [{"text": "zebra 狗", "language": "en"}, {"text": "the cat", "domain": "books"}]
COLUMNS = ("length", "unigram", "bigram", "trigram", "rarity", "tag_diversity", "source_order")


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("bpe")
    texts = [str(document["text"]) for document in FIRST] * 9
    write_tokenizer(path / "files", train(texts, TokenizerConfig(vocabulary=300)), "qwen2")
    return Tokenizer(path)


def measured(root: Path, name: str, bpe: Tokenizer, shards: list[list[dict[str, str]]]) -> Tokens:
    corpus = with_landings(corpus_of(root / f"{name}-corpus", shards), range(len(shards)))
    job = job_at(root, name)
    result = tokenize(job, corpus, bpe, TokenizeConfig(difficulty=COLUMNS))
    assert job.metrics["shards"]["built"] + job.metrics["shards"]["reused"] == len(shards)
    return result


def nats(tokens: Tokens, bpe: Tokenizer, order: int) -> list[float]:
    """Mean -ln P of the training documents of FIRST, from plain dicts."""
    ids, ends = tokens.reader.tokens("default", "train"), tokens.reader.ends("default", "train")
    documents = [
        [1, 1, *ids[int(start) : int(end) - 1].tolist()] for start, end in pairwise([0, *ends[:3]])
    ]
    counts: Counter[tuple[int, ...]] = Counter()
    contexts: Counter[tuple[int, ...]] = Counter()
    for document in documents:
        for i in range(2, len(document)):
            for size in (1, 2, 3):
                counts[tuple(document[i - size + 1 : i + 1])] += 1
                contexts[tuple(document[i - size + 1 : i])] += 1
    means: list[float] = []
    for document in documents:
        total = 0.0
        for i in range(2, len(document)):
            p = [(counts[(document[i],)] + 1) / (contexts[()] + bpe.meta.vocabulary)]
            for size in (2, 3):
                gram = tuple(document[i - size + 1 : i + 1])
                seen = contexts[gram[:-1]]
                p.append(counts[gram] / seen if seen else p[-1])
            weights = (0.1, 0.4, 0.5)[:order]
            mixed = sum(w * x for w, x in zip(weights, p, strict=False)) / sum(weights)
            total -= math.log(mixed)
        means.append(total / max(1, len(document) - 2))
    return means


def test_columns_equal_counts_by_hand(tmp_path: Path, bpe: Tokenizer) -> None:
    tokens = measured(tmp_path, "a", bpe, [FIRST])
    reader = tokens.reader
    lengths = [len(bpe.chat.encode(str(d["text"]))) for d in FIRST if d.get("split") != "held"]
    assert reader.difficulty("default", "length").tolist() == lengths
    for order, column in enumerate(("unigram", "bigram", "trigram"), 1):
        found = reader.difficulty("default", column)
        assert found.dtype == np.float32
        assert found.tolist() == pytest.approx(nats(tokens, bpe, order), rel=1e-6)
    sums = [n * mean for n, mean in zip(lengths, nats(tokens, bpe, 1), strict=True)]
    assert reader.difficulty("default", "rarity").tolist() == pytest.approx(sums, rel=1e-6)
    assert reader.difficulty("default", "source_order").tolist() == pytest.approx([0, 1 / 3, 2 / 3])


def test_tags_are_told_apart_in_chinese_only(tmp_path: Path, bpe: Tokenizer) -> None:
    # jieba: 我们/r 学习/v 数学/n 。/x: four kinds, once each
    assert tag_entropy("我们学习数学。") == pytest.approx(math.log(4))
    assert tag_entropy("") == tag_entropy("数学") == 0
    english, empty, chinese = measured(tmp_path, "a", bpe, [FIRST]).reader.difficulty(
        "default", "tag_diversity"
    )
    assert english == empty == 0
    assert chinese == pytest.approx(tag_entropy("猫坐在垫子上。猫吃鱼。"), rel=1e-6)


def test_a_later_landing_changes_no_value(tmp_path: Path, bpe: Tokenizer) -> None:
    before = measured(tmp_path, "a", bpe, [FIRST]).reader
    after = measured(tmp_path, "b", bpe, [FIRST, LATER]).reader
    for column in COLUMNS[:-1]:
        old, new = before.difficulty("default", column), after.difficulty("default", column)
        assert new[:3].tolist() == old.tolist()
        assert len(new) == 4
        assert len(after.difficulty("books", column)) == 1
    assert after.difficulty("default", "unigram")[3] > old.max()


def test_a_corpus_without_documents_has_empty_columns(tmp_path: Path, bpe: Tokenizer) -> None:
    held = [{"text": "only held", "split": "held"}]
    assert measured(tmp_path, "a", bpe, [held]).reader.difficulty("default", "trigram").shape == (
        0,
    )
