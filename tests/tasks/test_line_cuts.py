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
from storage.source import SourceFile
from tasks.filter import filter  # noqa: A004 - the stage's word
from tasks.line_cuts import line_spans
from tasks.rows import BadRow, read_rows
from tests.storage.corpora import corpus_of
from tests.tasks.corpus_runs import spec
from tests.tasks.text_jobs import digest_of, job_at

PIECES = [
    *("The fox is red now.", "It eats honey [12] every day.", "Read the Terms of Use.", "Home", " ", ""),
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
        clean = line.strip()
        if any(len(word) > 1000 for word in clean.split()):
            continue
        clean = re.sub(r"\[\d*\]|\[edit\]|\[citation needed\]", "", clean)
        if not clean.endswith((".", "?", "!", '"')) or clean.endswith("..."):
            continue
        if len(clean.split()) < 5:
            continue
        if "javascript" in clean.lower() or any(phrase in clean.lower() for phrase in policy):
            continue
        kept.append(clean.strip())
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
    text = "首页\n狐是红色的，住在山洞里。\n更多\n它吃蜂蜜！\n版权所有 某某公司。\n老人笑着对他说：“我们走吧。”\n去。"
    assert left_of(text, *C4_LINES, language="zh") == (
        "狐是红色的，住在山洞里。\n老人笑着对他说：“我们走吧。”"
    )
    assert left_of(text, "more", language="zh") == text.replace("更多\n", "")


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (
            "It is so, he says.\n\nHome\n\nIt is red, he says.",
            "It is so, he says.\n\nIt is red, he says.",
        ),
        ("Home\n\nIt is so, he says.", "It is so, he says."),
        (
            "It is so, he says.\nHome\n\nIt is red, he says.",
            "It is so, he says.\n\nIt is red, he says.",
        ),
        ("It is so, he says.\n\nHome", "It is so, he says."),
        (
            "It is so, he says.\n\n\n\nIt is red, he says.",
            "It is so, he says.\n\n\n\nIt is red, he says.",
        ),
        ("Home\n\nAbout", ""),
        ("", ""),
        ("It is so [1], they say here.", "It is so , they say here."),
    ],
)
def test_no_gap_is_left_behind(text: str, left: str) -> None:
    assert left_of(text, *C4_LINES) == left


def run(root: Path, name: str, corpus: Corpus, **fields: Any) -> Corpus:
    settings = FilterConfig(preset="none", outlier_sigmas=None, **fields)
    return filter(job_at(root, name), corpus=corpus, settings=settings)


def test_documents_stay_without_their_lines_and_go_with_all_of_them(tmp_path: Path) -> None:
    texts = [
        "Home\nThe fox is red now.\nLogin\nThe fox eats honey now.",
        "Home\nLogin\nAbout us and others",
        "It is all sound text. It is.",
    ]
    corpus = corpus_of(tmp_path, [texts, []])
    cut = run(tmp_path, "cut", corpus, line_cuts=("c4",))
    assert [d["text"] for d in cut.documents()] == [
        "The fox is red now.\nThe fox eats honey now.",
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
        {"text": "Home\nThe fox is red now.\nAnd so on...", "language": "en"},
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
    corpus = corpus_of(tmp_path, [["Home\nThe fox is red now.", "\0\nA \ufffd b c d."]])
    first, second = (run(tmp_path, name, corpus, line_cuts=("c4",)) for name in "ab")
    assert digest_of(first.files) == digest_of(second.files)
    plain = run(tmp_path, "c", corpus)
    assert "cuts" not in pl.read_parquet_schema(plain.files / "keep-00000.parquet")


def test_nothing_is_left_to_cut_from_c4(shared_data: Path) -> None:
    path = shared_data / "pretrain/en_c4_minimal/validation.jsonl.zst"
    file = SourceFile(path, path.name, path.stat().st_size, "", "jsonl", spec(path), 0)
    texts = [row[1]["text"] for row in read_rows(file) if not isinstance(row, BadRow)]
    assert len(texts) == 200
    assert [left_of(text, *C4_LINES) for text in texts] == texts
