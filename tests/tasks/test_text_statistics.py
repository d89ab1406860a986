"""Compiled statistics equal a plain count per document, on real and on strange text."""

import re
from collections import Counter
from math import log
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from storage.corpus import Shard
from tasks.text_statistics import (
    FINEWEB2_STOP_CHARACTERS,
    GOPHER_STOP_WORDS,
    GRAM_WORDS,
    HAN_GRAM_WORDS,
    STATISTICS,
    build_statistics,
    read_statistics,
    word_hashes,
)
from tests.storage.corpora import corpus_of

SINGLE = "\u4e00-\u9fff\u3400-\u4dbf\uf900-\ufaff\U00020000-\U0003ffff\u3041-\u30ff\uac00-\ud7af"
LETTER = "A-Za-z\xc0-\xd6\xd8-\xf6\xf8-\u1fff\uff21-\uff3a\uff41-\uff5a"
WORD = re.compile(f"[{SINGLE}]|[{LETTER}0-9\uff10-\uff19_]+")
IN_WORD = re.compile(f"[{SINGLE}{LETTER}0-9\uff10-\uff19]")
SENTENCE_END = re.compile("[。！？．…]|[.!?](?=[ \\t\n\u3000\u2000\"'”’)\\]」』】]|$)")
MORE = re.compile("(read ?more|展开|更多|。。。)$", re.IGNORECASE)
ENDS = ".!?\"'):;’”…。》」』】！）．：；？"
PIECES = [
    "the fox ",
    "狐狸",
    "住在山洞里。",
    "\n",
    "  ",
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
]


def by_hand(text: str, language: str) -> dict[str, Any]:
    """The same statistics in plain Python."""
    words = [re.sub("[A-Z]", lambda m: m.group().lower(), w) for w in WORD.findall(text)]
    lines = [line for raw in text.split("\n") if (line := raw.strip(" \t\u3000\u2000"))]
    head = Counter(words[:1000])
    total = sum(head.values())
    blocks = paragraphs_of(text)
    widths = HAN_GRAM_WORDS if language == "zh" else GRAM_WORDS
    figures: dict[str, Any] = {
        "chars": len(text),
        "bytes": len(text.encode()),
        "words": len(words),
        "word_chars": sum(map(len, words)),
        "letter_words": sum(bool(re.search(f"[{SINGLE}{LETTER}]", w)) for w in words),
        "digits": len(re.findall("[0-9\uff10-\uff19]", text)),
        "newlines": text.count("\n"),
        "braces": text.count("{") + text.count("}"),
        "hashes": text.count("#"),
        "han": len(
            re.findall("[\u4e00-\u9fff\u3400-\u4dbf\uf900-\ufaff\U00020000-\U0003ffff]", text)
        ),
        "lines": len(lines),
        "ended_lines": sum(line[-1] in ENDS for line in lines),
        "short_lines": sum(len(line) <= 30 for line in lines),
        "bullet_lines": sum(line[0] in "-*•" for line in lines),
        "ellipsis_lines": sum(line.endswith(("...", "…")) for line in lines),
        "repeated_lines": len(lines) - len({re.sub("[ \t\u3000\u2000]+", " ", x) for x in lines}),
        "repeated_line_chars": len("".join(squeezed(lines)))
        - len("".join(dict.fromkeys(squeezed(lines)))),
        "thin_lines": sum(len(WORD.findall(line)) < 3 for line in lines),
        "more_lines": sum(bool(MORE.search(line)) for line in lines),
        "paragraphs": len(blocks),
        "repeated_paragraphs": len(blocks) - len(set(blocks)),
        "repeated_paragraph_chars": len("".join(blocks)) - len("".join(dict.fromkeys(blocks))),
        "sentences": sum(bool(IN_WORD.search(piece)) for piece in SENTENCE_END.split(text)),
        "bracketed": bracketed(text),
        "gopher_stop_words": sum(word in GOPHER_STOP_WORDS for word in words),
        "fineweb2_stop_words": sum(word in FINEWEB2_STOP_CHARACTERS for word in words),
        "javascript_lines": sum("javascript" in raw.lower() for raw in text.split("\n")),
        "lorem_ipsum": sum("lorem ipsum" in raw.lower() for raw in text.split("\n")),
        "head_unique": len(head),
        "entropy": -sum(n / total * log(n / total) for n in head.values()),
    }
    for width, name in zip(widths, GRAM_WORDS, strict=True):
        grams = [tuple(words[i : i + width]) for i in range(len(words) - width + 1)]
        figures[f"gram_{name}_chars"] = top(grams) if name < 5 else repeated(words, width)
    return figures


def squeezed(lines: list[str]) -> list[str]:
    """Runs of white space as one space."""
    return [re.sub("[ \t\u3000\u2000]+", " ", line) for line in lines]


def paragraphs_of(text: str) -> list[str]:
    """Neighbouring lines that are not blank, joined by one character."""
    found: list[list[str]] = [[]]
    for raw in text.split("\n"):
        if line := raw.strip(" \t\u3000\u2000"):
            found[-1].append(line)
        else:
            found.append([])
    return ["\n".join(squeezed(block)) for block in found if block]


def bracketed(text: str) -> int:
    """No bracketed part is counted where there is no Han (the brackets are Chinese ones)."""
    has_han = re.search("[\u4e00-\u9fff\u3400-\u4dbf\uf900-\ufaff\U00020000-\U0003ffff]", text)
    return sum(map(len, re.findall("【(.*?)】", text))) if has_han else 0


def top(grams: list[tuple[str, ...]]) -> int:
    if not grams:
        return 0
    gram, count = Counter(grams).most_common(1)[0]
    return count * sum(map(len, gram)) if count > 1 else 0


def repeated(words: list[str], width: int) -> int:
    """Gopher's count as datatrove has it."""
    seen: set[tuple[str, ...]] = set()
    chars, index = 0, 0
    while index < len(words) - width + 1:
        gram = tuple(words[index : index + width])
        if gram in seen:
            chars += sum(map(len, gram))
            index += width
        else:
            seen.add(gram)
            index += 1
    return chars


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
        agree(row, by_hand(text, language), text)


def test_one_text_by_hand(tmp_path: Path) -> None:
    [row] = measured(tmp_path, [("The cat is red.\nthe cat is red.\nThe cat...", "en")])
    # words: the cat is red x2, the cat = 10, of 3 + 3 + 2 + 3 = 11 letters twice, and 6
    assert (row["words"], row["word_chars"], row["head_unique"]) == (10, 28, 4)
    assert (row["lines"], row["ended_lines"], row["ellipsis_lines"]) == (3, 3, 1)
    # "the cat", 6 letters, three times
    assert row["gram_2_chars"] == 18
    # "the cat is red the" comes a second time: 3 + 3 + 2 + 3 + 3 letters
    assert row["gram_5_chars"] == 14


def test_words_ignore_case_and_punctuation() -> None:
    assert word_hashes("The CAT, 猫!") == word_hashes("the cat 猫")
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
