"""Scores by trained models: good text apart from shuffled text and spam, bounds by quantile, own rules."""

import json
import random
from collections.abc import Sequence
from math import log2
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from benchmarks.filter_rules import WORD
from conf.extract import ExtractConfig
from conf.filter import FilterConfig
from storage.corpus import Corpus
from tasks.extract import extract
from tasks.filter import filter  # noqa: A004 - the stage's word
from tasks.quality import BOUNDS, build_models, build_scores, read_scores
from tests.storage.corpora import corpus_of
from tests.tasks.corpus_runs import reasons, run_stage, spec, texts

ZH_SPAM = [
    "官方正品",
    "限时抢购",
    "加微信",
    "点击领取",
    "全网最低价",
    "日赚千元",
    "无抵押贷款",
    "包过",
]
EN_SPAM = [
    "buy cheap",
    "click here",
    "limited offer",
    "best price",
    "viagra online",
    "casino bonus",
]


UNSAFE = {
    "zh": [
        *(
            "线上赌场首存送彩金",
            "百家乐真人荷官",
            "老虎机爆大奖",
            "提现秒到账",
            "六合彩内部资料",
            "下注返水",
        ),
        *(
            "外围投注平台",
            "棋牌游戏开户",
            "同城约会上门",
            "成人视频免费看",
            "激情直播间",
            "美女裸聊",
        ),
        *("私密影片下载", "一夜情交友", "情色小说全集", "无码在线观看"),
    ],
    "en": [
        *(
            "live casino jackpot",
            "deposit bonus free spins",
            "betting odds tonight",
            "online slots",
        ),
        *("poker room rakeback", "sportsbook welcome offer", "blackjack dealer", "roulette system"),
        *("adult webcam girls", "xxx videos streaming", "hot singles hookup", "nude photos leaked"),
        *(
            "escort service near you",
            "sex chat now",
            "porn site membership",
            "erotic massage booking",
        ),
    ],
}
"""Advertising for gambling and adult sites."""


def write(path: Path, documents: Sequence[str], **fields: Any) -> None:
    rows = [json.dumps({"text": text, **fields}, ensure_ascii=False) for text in documents]
    path.write_text("\n".join(rows) + "\n", "utf-8")


def shuffled(text: str, rng: random.Random) -> str:
    words = WORD.findall(text)
    rng.shuffle(words)
    return ("" if "\u4e00" <= text[0] <= "\u9fff" else " ").join(words)


def spam(of: list[str], text: str, rng: random.Random) -> str:
    """A text of the same length in which every other piece is spam."""
    words = WORD.findall(text)
    pieces = [rng.choice(of) if rng.random() < 0.5 else rng.choice(words) for _ in words[:60]]
    return " ".join(pieces)


def auc(good: Sequence[float], bad: Sequence[float]) -> float:
    """Probability that a good score is above a bad one; ties count half."""
    a, b = np.array(good)[:, None], np.array(bad)[None, :]
    return float((a > b).mean() + (a == b).mean() / 2)


def scored(root: Path, documents: list[str], good: list[str], bad: list[str]) -> list[Any]:
    root.mkdir(exist_ok=True)
    from storage.source import HashCache, resolve
    from tasks.fanout import Part

    write(root / "good.jsonl", good)
    write(root / "bad.jsonl", bad)

    def files(name: str) -> list[Any]:
        source = resolve((spec(name),), artifacts={}, base=root, ledger=None, hashes=HashCache())
        return list(source.files)

    build_models(root / "models", files("good.jsonl"), files("bad.jsonl") if bad else [])
    shard = corpus_of(root, [documents]).shards[0]
    build_scores(root / "scores" / "files", shard, root / "models", [])
    return read_scores(Part("", "", root / "scores", {}, is_reused=False)).to_dicts()


def test_perplexity_of_one_text_by_hand(tmp_path: Path) -> None:
    # Counts of "a b a": a 2, b 1, of 3; pairs ^a 1, ab 1, ba 1; triples ^^a, ^ab, aba 1 each.
    size = 1 << 20
    # "a": last word is empty and never counted as one: only its own count speaks.
    first = 3 / (3 + size)
    # "b" after "a": 1 of a's 2; as a triple ^ab, 1 of the pair ^a's 1.
    second = 0.1 * 2 / (3 + size) + 0.4 * 1 / 2 + 0.5 * 1 / 1
    first_mixed = 0.1 * first + 0.4 * first + 0.5 * first
    [row] = scored(tmp_path, ["a b"], ["a b a"], [])
    assert row["perplexity"] == pytest.approx(-(log2(first_mixed) + log2(second)) / 2, rel=1e-4)
    assert row["quality"] is None


@pytest.mark.parametrize(
    ("name", "of_spam"),
    [
        ("pretrain/zh_csl_abstracts/abstracts.jsonl.zst", ZH_SPAM),
        ("pretrain/en_c4_minimal/train.jsonl.zst", EN_SPAM),
    ],
)
def test_good_text_is_told_from_shuffled_text_and_from_spam(
    shared_data: Path, tmp_path: Path, name: str, of_spam: list[str]
) -> None:
    sources = (spec(shared_data / name),)
    corpus = run_stage(extract, ExtractConfig(sources=sources), {}, tmp_path)
    documents = [text for text in texts(corpus.artifact) if len(text) > 100][:2400]
    rng = random.Random(0)
    cut = len(documents) * 5 // 6
    train, held = documents[:cut], documents[cut:]
    noise = [shuffled(text, rng) for text in held]
    # Spam of the training and of the test share half of their phrases.
    bad = [spam(of_spam[: len(of_spam) * 3 // 4], text, rng) for text in train]
    junk = [spam(of_spam[len(of_spam) // 4 :], text, rng) for text in held]
    rows = scored(tmp_path, [*held, *noise, *junk], train, bad)
    n = len(held)
    perplexity = [-row["perplexity"] for row in rows]
    quality = [row["quality"] for row in rows]
    figures = {
        "perplexity, shuffled": auc(perplexity[:n], perplexity[n : 2 * n]),
        "perplexity, spam": auc(perplexity[:n], perplexity[2 * n :]),
        "classifier, spam": auc(quality[:n], quality[2 * n :]),
    }
    figures_file = tmp_path / "figures.json"
    figures_file.write_text(json.dumps([name, len(train), n, figures]), "utf-8")
    assert min(figures.values()) >= 0.9, figures


def unsafe(phrases: Sequence[str], around: str, rng: random.Random) -> str:
    """An advertisement for one site: its address, some of the phrases, and far more of ordinary words."""
    words = rng.choices(WORD.findall(around), k=40)
    site = f"www.{rng.randrange(10**4)}{rng.choice('abcxyz')}.com"
    pieces = [*rng.choices(phrases, k=5), *words, site]
    rng.shuffle(pieces)
    return rng.choice("，。! ").join(pieces)


def test_unsafe_text_is_told_from_good_text_in_both_languages(
    shared_data: Path, tmp_path: Path
) -> None:
    names = {"zh": "zh_csl_abstracts/abstracts", "en": "en_c4_minimal/train"}
    sources = tuple(
        spec(shared_data / "pretrain" / f"{name}.jsonl.zst", language=language)
        for language, name in names.items()
    )
    corpus = run_stage(extract, ExtractConfig(sources=sources), {}, tmp_path).artifact
    rng = random.Random(0)
    train: list[str] = []
    bad: list[str] = []
    held: dict[str, list[str]] = {}
    junk: dict[str, list[str]] = {}
    for language, phrases in UNSAFE.items():
        rows = [text for text in texts_in(corpus, language) if len(text) > 100][:900]
        known, unknown = phrases[::2] + phrases[1::4], phrases[::4] + phrases[3::4]
        train += rows[:600]
        bad += [unsafe(known, text, rng) for text in rows[:600]]
        held[language] = rows[600:]
        # Half of what the advertisements of the test say was in none of the samples.
        junk[language] = [unsafe(unknown, text, rng) for text in rows[600:]]
    for language in UNSAFE:
        documents = [*held[language], *junk[language]]
        rows = scored(tmp_path / language, documents, train, bad)
        quality = [row["quality"] for row in rows]
        figure = auc(quality[: len(held[language])], quality[len(held[language]) :])
        assert figure >= 0.9, (language, figure)


def texts_in(corpus: Any, language: str) -> list[str]:
    return [row["text"] for row in corpus.documents() if row["language"] == language]


def run(root: Path, documents: list[str], **fields: Any) -> Any:
    write(root / "docs.jsonl", documents)
    corpus = run_stage(
        extract, ExtractConfig(sources=(spec("docs.jsonl", language="en"),)), {}, root
    )
    settings = FilterConfig(preset="none", min_chars=0, outlier_sigmas=None, **fields)
    return run_stage(filter, settings, {"corpus": corpus.artifact}, root)


def test_the_share_asked_for_is_dropped_and_another_costs_no_scores(tmp_path: Path) -> None:
    write(tmp_path / "good.jsonl", ["the boat is on the river"] * 3)
    write(tmp_path / "bad.jsonl", ["buy cheap watches now"] * 2)
    documents = [f"the boat is on the {'river ' * n}buy {n}" for n in range(9)]
    documents.append("watches cheap buy buy")
    samples = {"good_texts": (spec("good.jsonl"),), "bad_texts": (spec("bad.jsonl"),)}
    outcome = run(tmp_path, documents, drop_quality=0.1, **samples)
    assert list(reasons(outcome.artifact)) == [("watches cheap buy buy", "low_quality")]
    assert outcome.record.metrics["rules"]["low_quality"]["evaluated"] == 10
    again = run(tmp_path, documents, drop_quality=0.3, drop_perplexity=0.1, **samples)
    assert again.record.metrics["shards"] == {"built": 0, "reused": 3}
    assert len(texts(again.artifact)) in (6, 7)
    tables = json.loads((again.artifact.logs / "tables.json").read_text("utf-8"))
    [row] = tables["quality_by_source"]
    assert row["documents"] == 10
    assert row["head"] + row["middle"] + row["tail"] == pytest.approx(1, abs=1e-3)


def test_pinned_bounds_stay(tmp_path: Path) -> None:
    write(tmp_path / "good.jsonl", ["the boat is on the river"] * 3)
    settings = FilterConfig(
        preset="none", outlier_sigmas=None, good_texts=(spec("good.jsonl"),), drop_perplexity=0.5
    )
    (tmp_path / "docs").mkdir()
    filtered: list[Any] = []
    for number, word in enumerate(("boat", "zebra")):
        write(
            tmp_path / "docs" / f"{number}.jsonl", [f"the {word} is on the {n}" for n in range(9)]
        )
        sources = (spec("docs/*.jsonl", language="en"),)
        corpus = run_stage(extract, ExtractConfig(sources=sources), {}, tmp_path)
        inputs = {"corpus": corpus.artifact} | ({"pinned": filtered[0]} if filtered else {})
        filtered.append(run_stage(filter, settings, inputs, tmp_path).artifact)
    first, second = ((corpus.files / BOUNDS).read_bytes() for corpus in filtered)
    assert first == second
    assert isinstance(filtered[0], Corpus)
    assert texts(filtered[1])[: len(texts(filtered[0]))] == texts(filtered[0])


def test_a_rule_of_ones_own_is_one_function_and_its_content_is_identity(tmp_path: Path) -> None:
    rule = tmp_path / "mine.py"
    rule.write_text("def drops(document):\n    return 'secret' in document['text']\n", "utf-8")
    own = {"own_rules": (spec("mine.py", format="text"),)}
    first = run(tmp_path, ["a secret plan", "an open plan"], **own)
    assert list(reasons(first.artifact)) == [("a secret plan", "own_rule")]
    rule.write_text("def drops(document):\n    return 'open' in document['text']\n", "utf-8")
    second = run(tmp_path, ["a secret plan", "an open plan"], **own)
    assert texts(second.artifact) == ["a secret plan"]
    assert first.record.fingerprint != second.record.fingerprint
    rule.write_text("keep = 1\n", "utf-8")
    with pytest.raises(Exception, match="no function `drops`"):
        run(tmp_path, ["a secret plan"], **own)


def test_empty_corpora_and_texts_have_no_scores(tmp_path: Path) -> None:
    write(tmp_path / "good.jsonl", ["the boat"])
    settings = {"good_texts": (spec("good.jsonl"),), "drop_perplexity": 0.5}
    assert texts(run(tmp_path, [], **settings).artifact) == []
    assert texts(run(tmp_path, ["!!!"], **settings).artifact) == ["!!!"]


def test_what_is_missing_is_named() -> None:
    with pytest.raises(ValidationError, match="give `good_texts`"):
        FilterConfig(drop_perplexity=0.1)
    with pytest.raises(ValidationError, match="give `bad_texts`"):
        FilterConfig(good_texts=(spec("x"),), drop_quality=0.1)
