"""Lines are cut and documents stay: as C4's code does it in English, by hand in Chinese."""

import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from conf.filter import C4_LINES, FilterConfig, LineRule
from storage.corpus import Corpus, without_spans
from tasks.filter import filter  # noqa: A004 - the stage's word
from tasks.line_cuts import line_spans
from tests.storage.corpora import corpus_of
from tests.tasks.text_jobs import digest_of, job_at

PIECES = [
    *("The fox is red.", "It eats honey [12] every day.", "Read the Terms of Use.", "Home", " ", ""),
    *("He said: \"No\"", "and so on...", "Please enable Javascript to go on.", "go on!", "one two"),
    *("What is it?[citation needed]", "# Head [edit]", "x" * 1001 + " is long, it is.", "e\u0301 é 😀 !"),
    *("We use cookies here.", "\tTwo words.", "[3]", "The cat [] sat.  ", "\0 \0 \0."),
]  # fmt: skip


def left_of(text: str, *rules: LineRule, language: str = "en") -> str:
    return without_spans(text, line_spans(text, language, rules, Counter()))


def c4_lines(page: str) -> list[str]:
    """The lines that C4 keeps (its released `get_clean_page_fn`), its later rules on pages aside."""
    policy = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies",
              "use cookies")  # fmt: skip
    kept: list[str] = []
    for line in page.split("\n"):
        clean = re.sub(r"\[\d*\]|\[edit\]|\[citation needed\]", "", line.strip()).strip()
        if any(len(word) > 1000 for word in clean.split()):
            continue
        if not clean.endswith((".", "?", "!", '"')) or clean.endswith("..."):
            continue
        if len(clean.split()) < 3:
            continue
        if "javascript" in clean.lower() or any(phrase in clean.lower() for phrase in policy):
            continue
        kept.append(clean)
    return kept


def test_the_lines_of_c4_are_those_of_its_code() -> None:
    rng = random.Random(5)
    for _ in range(2000):
        page = "\n".join(
            " ".join(rng.choices(PIECES, k=rng.randrange(1, 3))) for _ in range(rng.randrange(12))
        )
        left = left_of(page, *C4_LINES)
        assert [line.strip() for line in left.split("\n") if line.strip()] == c4_lines(page), page


def test_chinese_lines_by_hand() -> None:
    text = "首页\n狐是红色的，住在山洞里。\n更多\n它吃蜂蜜！\n版权所有 某某公司。\n老人说：“走吧。”\n去。"
    assert left_of(text, *C4_LINES, language="zh") == ("狐是红色的，住在山洞里。\n老人说：“走吧。”")
    assert left_of(text, "more", language="zh") == text.replace("更多\n", "")


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("It is so.\n\nHome\n\nIt is red.", "It is so.\n\nIt is red."),
        ("Home\n\nIt is so.", "It is so."),
        ("It is so.\nHome\n\nIt is red.", "It is so.\n\nIt is red."),
        ("It is so.\n\nHome", "It is so."),
        ("It is so.\n\n\n\nIt is red.", "It is so.\n\n\n\nIt is red."),
        ("Home\n\nAbout", ""),
        ("", ""),
        ("It is so [1], they say.", "It is so , they say."),
    ],
)
def test_no_gap_is_left_behind(text: str, left: str) -> None:
    assert left_of(text, *C4_LINES) == left


def run(root: Path, name: str, corpus: Corpus, **fields: Any) -> Corpus:
    settings = FilterConfig(preset="none", outlier_sigmas=None, **fields)
    return filter(job_at(root, name), corpus=corpus, settings=settings)


def test_documents_stay_without_their_lines_and_go_with_all_of_them(tmp_path: Path) -> None:
    texts = [
        "Home\nThe fox is red.\nLogin\nThe fox eats honey.",
        "Home\nLogin\nAbout us and others",
        "It is all sound. It really is.",
    ]
    corpus = corpus_of(tmp_path, [texts, []])
    cut = run(tmp_path, "cut", corpus, line_cuts=("c4",))
    assert [d["text"] for d in cut.documents()] == [
        "The fox is red.\nThe fox eats honey.",
        texts[2],
    ]
    assert [(d["text"], d["reason"]) for d in cut.dropped()] == [(texts[1], "little_left")]


def test_a_second_cut_is_in_the_characters_of_the_shard(tmp_path: Path) -> None:
    text = "Menu\nThe fox {is} red.\nHome\nThe fox eats honey [1] often.\nlorem ipsum it is."
    corpus = corpus_of(tmp_path, [[text]])
    once = run(tmp_path, "once", corpus, line_cuts=("short",))
    twice = run(tmp_path, "twice", once, line_cuts=("braces", "citations", "lorem_ipsum"))
    assert [d["text"] for d in twice.documents()] == ["The fox eats honey  often."]


def test_figures_are_lines_per_rule_and_language(tmp_path: Path) -> None:
    documents = [
        {"text": "Home\nThe fox is red.\nAnd so on...", "language": "en"},
        {"text": "首页\n狐是红色的，住在山洞里，早上吃蜂蜜。", "language": "zh"},
    ]
    job = job_at(tmp_path, "job")
    settings = FilterConfig(preset="none", outlier_sigmas=None, line_cuts=("unended",), min_chars=5)
    filter(job, corpus=corpus_of(tmp_path, [documents]), settings=settings)
    # "Home", a line end before and after "And so on...", and "首页"
    assert job.metrics["line_cuts"] == {"chars": 5 + 13 + 3, "unended": 3}
    assert job.tables["line_cuts"] == [
        {"rule": "unended", "language": "en", "lines": 2},
        {"rule": "unended", "language": "zh", "lines": 1},
    ]
    assert job.metrics["rules"]["little_left"]["evaluated"] == 2


def test_twice_the_same_bytes_and_nothing_is_cut_unasked(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path, [["Home\nThe fox is red.", "\0\nA \ufffd b c."]])
    first, second = (run(tmp_path, name, corpus, line_cuts=("c4",)) for name in "ab")
    assert digest_of(first.files) == digest_of(second.files)
    plain = run(tmp_path, "c", corpus)
    assert "cuts" not in pl.read_parquet_schema(plain.files / "keep-00000.parquet")
