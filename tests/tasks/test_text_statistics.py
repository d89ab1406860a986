"""Compiled statistics equal a plain count per document, on real and on strange text."""

import shutil
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numba.core import config as numba_config

from benchmarks.filter_rules import plain_statistics
from storage.corpus import Shard
from tasks.text_statistics import (
    STATISTICS,
    build_statistics,
    read_statistics,
    word_hashes,
)
from tests.storage.corpora import corpus_of

PIECES = [
    "the fox ",
    "狐狸",
    "住在山洞里。",
    "\n",
    "  ",
    "a  b",
    "a",
    "é",
    "😀",
    "1 2",
    "...",
    "…",
    "# {",
    "-",
    "\u3000",
    "_x",
    "\ufffd",
    "𠀀",
    "。。。",
    "\n\n",
    "【",
    "】",
    '."',
    "!",
    "3.5",
    "更多",
    "Read More",
    "e\u0301",
    "\0",
    "👩\u200d👧",
    "Use Javascript to",
    "lorem Ipsum",
    "结论.",
    "Ａｂ１",
    "ab1",
]


def measured(tmp_path: Path, texts: list[tuple[str, str]]) -> list[dict[str, Any]]:
    shard = shard_of(tmp_path, texts)
    build_statistics(tmp_path / "out", shard, [])
    return read_statistics(tmp_path / "out").to_dicts()


def shard_of(tmp_path: Path, texts: list[tuple[str, str]]) -> Shard:
    documents = [{"text": text, "language": language} for text, language in texts]
    return corpus_of(tmp_path, [documents]).shards[0]


def agree(found: dict[str, Any], wanted: dict[str, Any], text: str) -> None:
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, abs=1e-5), (name, text[:200])


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(
        st.tuples(
            st.lists(st.sampled_from(PIECES), max_size=60).map("".join),
            st.sampled_from(["zh", "en"]),
        ),
        min_size=1,
        max_size=12,
    )
)
@example(texts=[("", "en"), ("\n\n", "zh"), ("a" * 5000, "en"), ("x y " * 3000, "en")])
def test_equal_to_plain_python(tmp_path_factory: Any, texts: list[tuple[str, str]]) -> None:
    rows = measured(tmp_path_factory.mktemp("s"), texts)
    for row, (text, language) in zip(rows, texts, strict=True):
        agree(row, plain_statistics(text, language), text)


def test_one_text_by_hand(tmp_path: Path) -> None:
    [row] = measured(tmp_path, [("The cat is red.\nthe cat is red.\nThe cat...", "en")])
    # words: the cat is red x2, the cat = 10, of 3 + 3 + 2 + 3 = 11 letters twice, and 6
    assert (row["words"], row["word_chars"], row["head_unique"]) == (10, 28, 4)
    assert (row["lines"], row["ended_lines"], row["ellipsis_lines"]) == (3, 3, 1)
    # "the cat", 6 letters, three times
    assert row["gram_2_chars"] == 18
    # "the cat is red the" comes a second time: 3 + 3 + 2 + 3 + 3 letters
    assert row["gram_5_chars"] == 14


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("提出了方法.结果表明有效.", 2),
        ("使用3.5版本!效果好?是", 3),
        ("见图(一).结论", 1),
        ("It is 3.5 m. www.example.org", 2),
        ("见example.org网站", 1),
        ("好.)", 1),
    ],
)
def test_a_plain_mark_ends_a_sentence_behind_a_han_character(
    tmp_path: Path, text: str, sentences: int
) -> None:
    [row] = measured(tmp_path, [(text, "zh")])
    assert row["sentences"] == sentences
    assert plain_statistics(text, "zh")["sentences"] == sentences


def test_a_line_of_ten_megabytes_by_hand(tmp_path: Path) -> None:
    n = 2_500_000
    [row] = measured(tmp_path, [("the " * n, "en")])
    assert (row["chars"], row["words"], row["lines"], row["head_unique"]) == (4 * n, n, 1, 1)
    assert row["gram_2_chars"] == (n - 1) * 6
    # Of the n - 4 windows of five words the first is new; from the second on every fifth is looked at.
    assert row["gram_5_chars"] == (n - 5) // 5 * 15


def test_words_ignore_case_and_punctuation() -> None:
    assert word_hashes("The CAT, 猫!") == word_hashes("the cat 猫")
    assert word_hashes("ＴＨＥ　ｃａｔ２") == word_hashes("the cat2")
    assert len(word_hashes("It's 3.5 猫狗")) == 6


def test_an_empty_shard_has_statistics_without_rows(tmp_path: Path) -> None:
    assert measured(tmp_path, []) == []


def test_the_same_bytes_twice(tmp_path: Path) -> None:
    shard = shard_of(tmp_path, [("The cat is red.", "en"), ("猫是红色的。", "zh")])
    for name in ("a", "b"):
        build_statistics(tmp_path / name, shard, ["red"])
    first, second = ((tmp_path / name / STATISTICS).read_bytes() for name in ("a", "b"))
    assert first == second


def test_bad_words_are_whole_in_latin_script_and_anywhere_in_chinese(tmp_path: Path) -> None:
    texts = ["An ass. Class. ASS!", "你这个坏蛋，坏蛋", "nothing"]
    shard = shard_of(tmp_path, [(text, "en") for text in texts])
    build_statistics(tmp_path / "out", shard, ["ass", "坏蛋"])
    assert read_statistics(tmp_path / "out")["bad_words"].to_list() == [2, 2, 0]


def test_compiled_code_lies_under_the_content_of_all_kernels(tmp_path: Path) -> None:
    from tasks.kernels import FOLDER, cache_folder

    assert str(cache_folder()) == cast(Any, numba_config).CACHE_DIR
    copy = tmp_path / "kernels"
    shutil.copytree(FOLDER, copy, ignore=shutil.ignore_patterns("__pycache__"))
    assert cache_folder(copy) == copy / "__pycache__" / cache_folder().name
    with (copy / "words.py").open("a") as stream:
        stream.write("# what other files inline has changed\n")
    assert cache_folder(copy).name != cache_folder().name
