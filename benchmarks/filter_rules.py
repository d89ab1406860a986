"""All rules of filter at once, and duplicate n-grams alone, against the same per document in Python.

`plain_statistics` is the independent truth that the tests compare the compiled counts with. Both sides
run in one process. A row says also for how many documents both came to the same decision.
"""

import re
import time
import unicodedata
from collections import Counter
from math import log
from pathlib import Path
from typing import Any

import numba as nb
import numpy as np
import pyarrow as pa

from benchmarks.work import Row, Work, megabytes_per_second
from conf.filter import FilterConfig, Rule
from storage.corpus import Corpus
from storage.store import Store
from tasks.filter import filter as filter_stage
from tasks.han import common_han
from tasks.kernels.characters import words_of
from tasks.kernels.repetition import repetition
from tasks.kernels.statistics import room_for
from tasks.stage import Job
from tasks.text_statistics import (
    FINEWEB2_STOP_CHARACTERS,
    GOPHER_STOP_WORDS,
    GRAM_WORDS,
    HAN_GRAM_WORDS,
    STOP_CHARACTERS,
    STOP_WORDS,
    buffers,
)

PEER_MEGABYTES = 2.0
"""Documents of every kind, evenly drawn: the plain rules are so slow that a part tells their rate."""
HAN = "\u4e00-\u9fff\u3400-\u4dbf\uf900-\ufaff\U00020000-\U0003ffff"
SINGLE = HAN + "\u3041-\u30ff\uac00-\ud7af"
LETTER = "A-Za-z\xc0-\xd6\xd8-\xf6\xf8-\u1fff\uff21-\uff3a\uff41-\uff5a"
SPACES = " \t\u3000\u2000-\u200a"
WORD = re.compile(f"[{SINGLE}]|[{LETTER}0-9\uff10-\uff19_]+")
IN_WORD = re.compile(f"[{SINGLE}{LETTER}0-9\uff10-\uff19]")
NARROW = {c: unicodedata.normalize("NFKC", chr(c)) for c in range(0xFF01, 0xFF5F)}
"""Full-width characters, as ASCII."""
MARK = re.compile("[!\"'(),\\-.:;?\u2010-\u205e\u3001-\u301f\uff01-\uff65]")
SENTENCE_END = re.compile(
    f"[。！？．…]|[.!?](?=[{SPACES}\n\"'”’)\\]」』】]|$)|(?<=[{SINGLE}])[.!?]"
)
MORE = re.compile("(read ?more|展开|更多|。。。)$", re.IGNORECASE)
ENDS = ".!?\"'):;’”…。》」』】！）．：；？"
BULLETS = "*-•‣■□▪▫▶◦●"
POLICY = re.compile(
    "terms of use|privacy policy|cookie policy|uses cookies|use of cookies|use cookies"
    "|enable javascript|all rights reserved|使用条款|隐私政策|版权所有|icp备"
)


def plain_statistics(text: str, language: str) -> dict[str, float]:
    """Every count of `tasks.text_statistics` in plain Python."""
    found = [word.translate(NARROW) for word in WORD.findall(text)]
    words = [re.sub("[A-Z]", lambda m: m.group().lower(), word) for word in found]
    figures = _of_characters(text) | _of_words(words) | _of_lines(text)
    figures["sentences"] = sum(bool(IN_WORD.search(p)) for p in SENTENCE_END.split(text))
    widths = HAN_GRAM_WORDS if language == "zh" else GRAM_WORDS
    return figures | dict(zip(_GRAMS, gram_chars(words, widths), strict=True))


_GRAMS = [f"gram_{n}_chars" for n in GRAM_WORDS]


def _of_characters(text: str) -> dict[str, float]:
    found = {
        "spaces": len(re.findall(f"[{SPACES}]", text)),
        "newlines": text.count("\n"),
        "letters": len(re.findall(f"[{SINGLE}{LETTER}]", text)),
        "digits": len(re.findall("[0-9\uff10-\uff19]", text)),
    }
    marks = sum(not re.match(f"[{LETTER}\uff10-\uff19]", mark) for mark in MARK.findall(text))
    han = re.findall(f"[{HAN}]", text)
    return {
        **found,
        "chars": len(text),
        "bytes": len(text.encode()),
        "punctuation": marks,
        "signs": len(text) - marks - sum(found.values()),
        "braces": text.count("{") + text.count("}"),
        "hashes": text.count("#"),
        "ellipses": text.count("…") + sum(1 for _ in re.finditer(r"\.{3,}", text)),
        "odd": len(re.findall("[\x80-\x9f\ue000-\uf8ff\ufffd]", text)),
        "supplement": len(re.findall("[\xa0-\xff]", text)),
        "han": len(han),
        "rare_han": sum(character not in common_han() for character in han),
        "bracketed": sum(map(len, re.findall("【(.*?)】", text))) if han else 0,
        "sentence_marks": len(re.findall("[.!?。！？．]", text)),
    }


def _of_words(words: list[str]) -> dict[str, float]:
    head = Counter(words[:1000])
    total = sum(head.values())
    return {
        "words": len(words),
        "word_chars": sum(map(len, words)),
        "letter_words": sum(bool(re.search(f"[{SINGLE}{LETTER}]", word)) for word in words),
        "head_words": total,
        "head_unique": len(head),
        "entropy": -sum(n / total * log(n / total) for n in head.values()),
        "stop_words": len({*words} & ({*STOP_WORDS} | {*STOP_CHARACTERS})),
        "gopher_stop_words": sum(word in GOPHER_STOP_WORDS for word in words),
        "fineweb2_stop_words": sum(word in FINEWEB2_STOP_CHARACTERS for word in words),
    }


def _of_lines(text: str) -> dict[str, float]:
    raw = text.split("\n")
    lines = [line for line in map(_trimmed, raw) if line]
    paragraphs = ["\n".join(block) for block in _blocks(raw)]
    followed = [(_trimmed(a), b) for a, b in zip(raw, [*raw[1:], ""], strict=True)]
    return {
        "lines": len(lines),
        "ended_lines": sum(line[-1] in ENDS for line in lines),
        "short_lines": sum(len(line) <= 30 for line in lines),
        "bullet_lines": sum(line[0] in BULLETS for line in lines),
        "ellipsis_lines": sum(line.endswith(("...", "…")) for line in lines),
        "wrapped_lines": sum(
            bool(after) and 50 <= len(line) <= 110 and line[-1] not in ENDS
            for line, after in followed
        ),
        "thin_lines": sum(len(WORD.findall(line)) < 3 for line in lines),
        "more_lines": sum(bool(MORE.search(line)) for line in lines),
        "repeated_lines": len(_repeats(lines)),
        "repeated_line_chars": sum(map(len, _repeats(lines))),
        "paragraphs": len(paragraphs),
        "repeated_paragraphs": len(_repeats(paragraphs)),
        "repeated_paragraph_chars": sum(map(len, _repeats(paragraphs))),
        "lorem_ipsum": sum("lorem ipsum" in part.lower() for part in raw),
        "javascript_lines": sum("javascript" in part.lower() for part in raw),
        "policy_lines": sum(bool(POLICY.search(part.lower())) for part in raw),
    }


def _trimmed(line: str) -> str:
    return re.sub(f"^[{SPACES}]+|[{SPACES}]+$", "", line)


def _repeats(parts: list[str]) -> list[str]:
    """All but the first of equal lines or paragraphs; a run of spaces in one is as good as one space."""
    seen: set[str] = set()
    repeats: list[str] = []
    for part in parts:
        key = re.sub(f"[{SPACES}]+", " ", part)
        if key in seen:
            repeats.append(part)
        seen.add(key)
    return repeats


def _blocks(raw: list[str]) -> list[list[str]]:
    """Lines without a blank one between."""
    found: list[list[str]] = [[]]
    for part in raw:
        if line := _trimmed(part):
            found[-1].append(line)
        else:
            found.append([])
    return [block for block in found if block]


def gram_chars(words: list[str], widths: tuple[int, ...]) -> list[int]:
    """Characters in the top gram of the first three widths, in repeated grams of the others."""
    return [_top(words, w) for w in widths[:3]] + [_repeated(words, w) for w in widths[3:]]


def _top(words: list[str], width: int) -> int:
    grams = Counter(tuple(words[i : i + width]) for i in range(len(words) - width + 1))
    for gram, count in grams.most_common(1):
        return count * sum(map(len, gram)) if count > 1 else 0
    return 0


def _repeated(words: list[str], width: int) -> int:
    """Gopher's count as datatrove has it: a repeated gram is skipped as a whole."""
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


# The rows


def measure(work: Work) -> list[Row]:
    """Two rows: the stage against plain rules, and repetition alone."""
    settings = FilterConfig(outlier_sigmas=None)
    _run(work.folder / "warm", work.corpus, settings)
    started = time.perf_counter()
    job = _run(work.folder / "timed", work.corpus, settings)
    seconds = time.perf_counter() - started
    rows = list(work.corpus.documents(kept_only=False))
    ours = job.metrics["bytes"] / 1e6 / seconds
    part = _part(rows)
    texts = [row["text"] for row in part]
    kept: list[bool] = []
    theirs = megabytes_per_second(
        texts, lambda: kept.extend(_is_kept(row, settings.rules()) for row in part)
    )
    found = {(d["shard"], d["row"]) for d in Corpus(job.path).documents()}
    same = sum(
        keep == ((r["shard"], r["row"]) in found) for r, keep in zip(part, kept, strict=True)
    )
    rules = len({rule.name for rule in settings.rules()})
    peer = f"plain Python, {same} of {len(part)} decisions equal"
    grams = _gram_rows(part, [row["text"] for row in rows])
    return [Row(f"{rules} rules at once", peer, ours, theirs, "MB/s", goal=10, floor=3), grams]


def _run(root: Path, corpus: Corpus, settings: FilterConfig) -> Job:
    job = Job(node="filter", stage="filter", path=root / "job", store=Store(root / "store"))
    for path in (job.files, job.logs, job.state):
        path.mkdir(parents=True)
    filter_stage(job, corpus=corpus, settings=settings)
    for entry in corpus.shards:
        (job.path.parent / entry.entry.part).symlink_to(entry.part_path)
    return job


def _part(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    total = sum(len(row["text"].encode()) for row in rows)
    return rows[:: max(1, round(total / 1e6 / PEER_MEGABYTES))]


def _is_kept(row: dict[str, Any], rules: tuple[Rule, ...]) -> bool:
    figures = plain_statistics(row["text"], row["language"])
    shares = figures | _shares(figures)
    return not any(
        _is_broken(rule, shares)
        for rule in rules
        if not rule.languages or row["language"] in rule.languages
    )


def _shares(f: dict[str, float]) -> dict[str, float | None]:
    solid = f["chars"] - f["spaces"] - f["newlines"]

    def share(name: str, of: float) -> float | None:
        return f[name] / of if of else None

    wrapped = f["wrapped_lines"]
    return {
        "odd_share": share("odd", solid), "supplement_share": share("supplement", solid),
        "sign_share": share("signs", solid), "digit_share": share("digits", solid),
        "brace_share": share("braces", solid), "letter_share": share("letters", solid),
        "symbols_per_word": max(f["hashes"], f["ellipses"]) / f["words"] if f["words"] else None,
        "mean_word_chars": share("word_chars", f["words"]),
        "letter_word_share": share("letter_words", f["words"]),
        "rare_han_share": share("rare_han", f["han"]),
        "unique_word_share": share("head_unique", f["head_words"]),
        "ended_line_share": 1.0 if f["lines"] == 1 and f["sentence_marks"]
        else share("ended_lines", f["lines"]),
        **{f"{kind}_line_share": share(f"{kind}_lines", f["lines"])
           for kind in ("short", "bullet", "ellipsis", "repeated", "policy")},
        "repeated_line_char_share": share("repeated_line_chars", f["chars"]),
        "newlines_per_word": share("newlines", f["words"]),
        "is_unwrapped": float(wrapped < 0.35 * f["lines"] or wrapped < 5),
        **{f"{'top' if n < 5 else 'repeated'}_{n}gram_share": share(f"gram_{n}_chars", solid)
           for n in GRAM_WORDS},
    }  # fmt: skip


def _is_broken(rule: Rule, shares: dict[str, float | None]) -> bool:
    value = shares[rule.statistic]
    if value is None or any((shares[name] or 0) < least for name, least in rule.needs.items()):
        return False
    is_low = rule.minimum is not None and value < rule.minimum
    return is_low or (rule.maximum is not None and value > rule.maximum)


def _gram_rows(part: list[dict[str, Any]], texts: list[str]) -> Row:
    widths = np.array(GRAM_WORDS, np.int64)
    content, offsets = buffers(pa.array(texts, pa.large_string()))
    out = np.zeros((len(texts), len(GRAM_WORDS)), np.int64)
    _grams(content, offsets[:2], widths, out)
    ours = megabytes_per_second(texts, lambda: _grams(content, offsets, widths, out))
    some = [row["text"] for row in part]
    theirs = megabytes_per_second(
        some, lambda: [gram_chars(WORD.findall(text.lower()), GRAM_WORDS) for text in some]
    )
    return Row("duplicate n-grams", "plain Python", ours, theirs, "MB/s", goal=20, floor=8)


@nb.njit(nogil=True)
def _grams(text: Any, offsets: Any, widths: Any, out: Any) -> None:
    longest = 1
    for row in range(offsets.shape[0] - 1):
        longest = max(longest, offsets[row + 1] - offsets[row])
    hashes, lengths, room, tables = room_for(longest)
    stamp = 0
    for row in range(offsets.shape[0] - 1):
        found, _ = words_of(
            text, offsets[row], offsets[row + 1], hashes, lengths, np.empty(0, np.int64)
        )
        stamp = repetition(hashes, lengths, found, widths, room, tables, stamp, out[row])
