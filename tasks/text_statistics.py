"""Statistics of documents that the filter rules are about, computed once per shard."""

import functools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from storage.corpus import Shard
from tasks.han import common_han
from tasks.shard_batches import arrow_batches

if TYPE_CHECKING:
    import numpy as np
    import polars as pl
    from numpy.typing import NDArray

STATISTICS = "statistics.parquet"
GRAM_WORDS = (2, 3, 4, 5, 6, 7, 8, 9, 10)
HAN_GRAM_WORDS = (3, 5, 6, 8, 10, 11, 13, 14, 16)
"""The same for text whose words are single characters: a Chinese word is about 1.6 of them."""
GOPHER_STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
"""Rae et al. 2021, appendix A."""
STOP_WORDS = (
    *GOPHER_STOP_WORDS,
    # What short texts have instead: articles, copulas, prepositions, pronouns.
    *("a", "is", "are", "was", "in", "it", "for", "on", "as", "at", "this", "you", "i", "not"),
    *("he", "she", "they", "we", "or", "by", "from", "its"),
)
STOP_CHARACTERS = "的一是了不在有我人这个他们来上大为和就也说到地你会着那要下而之以"
FINEWEB2_STOP_CHARACTERS = "的年在月是和日了於為有被人中为他與後也而由"
"""FineWeb2's configuration cmn_Hani, without the middle dot, which is no word."""
C4_POLICY = (
    *("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies"),
    "use cookies",
)
HAN_POLICY = ("使用条款", "隐私政策", "版权所有", "icp备")
_PHRASES = {
    "lorem_ipsum": ("lorem ipsum",),
    "policy_lines": (*C4_POLICY, "enable javascript", "all rights reserved", *HAN_POLICY),
    "javascript_lines": ("javascript",),
}
"""Column -> phrases, in lower case; the column counts the lines that have one (ASCII case ignored)."""
WRAPPED_SHARE = 0.35
"""Share of lines that break off at 50 to 110 characters, from which a text is hard-wrapped."""
WRAPPED_MIN_LINES = 5
"""Such lines that it must have: two lines of a menu wrap nothing."""


def build_statistics(files: Path, shard: Shard, bad_words: Sequence[str]) -> dict[str, Any]:
    """Write `statistics.parquet`: one row per document of a shard, dropped ones included."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    files.mkdir(parents=True, exist_ok=True)
    writer: pq.ParquetWriter | None = None
    for text, language in batches(shard):
        table = pa.table(_columns(text, language, bad_words))
        if writer is None:
            writer = pq.ParquetWriter(files / STATISTICS, table.schema, compression="zstd")
        writer.write_table(table)
    if writer is not None:
        writer.close()
    return {"rows": shard.rows}


def read_statistics(files: Path) -> "pl.DataFrame":
    """The counts of a shard and the shares that the rules name, row by row."""
    import polars as pl

    counts = pl.read_parquet(files / STATISTICS)
    solid = pl.col("chars") - pl.col("spaces") - pl.col("newlines")
    shares = {
        "odd_share": pl.col("odd") / solid,
        "supplement_share": pl.col("supplement") / solid,
        "sign_share": pl.col("signs") / solid,
        "digit_share": pl.col("digits") / solid,
        "brace_share": pl.col("braces") / solid,
        "symbols_per_word": pl.max_horizontal("hashes", "ellipses") / pl.col("words"),
        "mean_word_chars": pl.col("word_chars") / pl.col("words"),
        "letter_word_share": pl.col("letter_words") / pl.col("words"),
        "rare_han_share": pl.col("rare_han") / pl.col("han"),
        "unique_word_share": pl.col("head_unique") / pl.col("head_words"),
        # One paragraph of sentences is no menu, whatever it ends with.
        "ended_line_share": pl.when((pl.col("lines") == 1) & (pl.col("sentence_marks") > 0))
        .then(1.0)
        .otherwise(pl.col("ended_lines") / pl.col("lines")),
        "letter_share": pl.col("letters") / solid,
        "short_line_share": pl.col("short_lines") / pl.col("lines"),
        "bullet_line_share": pl.col("bullet_lines") / pl.col("lines"),
        "ellipsis_line_share": pl.col("ellipsis_lines") / pl.col("lines"),
        "repeated_line_share": pl.col("repeated_lines") / pl.col("lines"),
        "repeated_line_char_share": pl.col("repeated_line_chars") / pl.col("chars"),
        "policy_line_share": pl.col("policy_lines") / pl.col("lines"),
        "more_line_share": pl.col("more_lines") / pl.col("lines"),
        "bracketed_share": pl.col("bracketed") / pl.col("chars"),
        "hashes_per_char": pl.col("hashes") / pl.col("chars"),
        "ellipses_per_char": pl.col("ellipses") / pl.col("chars"),
        "repeated_paragraph_share": pl.col("repeated_paragraphs") / pl.col("paragraphs"),
        "repeated_paragraph_char_share": pl.col("repeated_paragraph_chars") / pl.col("chars"),
        "newlines_per_word": pl.col("newlines") / pl.col("words"),
        "is_unwrapped": (
            (pl.col("wrapped_lines") < WRAPPED_SHARE * pl.col("lines"))
            | (pl.col("wrapped_lines") < WRAPPED_MIN_LINES)
        ).cast(pl.Int8),
        **{f"top_{n}gram_share": pl.col(f"gram_{n}_chars") / solid for n in GRAM_WORDS[:3]},
        **{f"repeated_{n}gram_share": pl.col(f"gram_{n}_chars") / solid for n in GRAM_WORDS[3:]},
    }
    # What has no denominator (an empty text, no Han) has no share; no rule applies to it.
    return counts.with_columns(**{name: share.fill_nan(None) for name, share in shares.items()})


def batches(shard: Shard) -> Iterator[tuple[Any, list[str]]]:
    """Text (an Arrow large_string array) and languages of all rows, a batch at a time.

    Where an earlier stage has cut spans, the text is the cut one.
    """
    import pyarrow as pa

    for batch in arrow_batches(shard, ["text", "language"]):
        yield batch.column("text"), batch.column("language").to_pylist()
    if not shard.rows:
        yield pa.array([], pa.large_string()), []


def _columns(text: Any, languages: list[str], bad_words: Sequence[str]) -> dict[str, Any]:
    import numpy as np
    import polars as pl

    from tasks.kernels import statistics as kernel

    rows = len(text)
    counts = np.zeros((rows, len(kernel.COUNTS)), np.int64)
    grams = np.zeros((rows, len(GRAM_WORDS)), np.int64)
    entropy = np.zeros(rows, np.float32)
    widths = np.array(
        [HAN_GRAM_WORDS if language == "zh" else GRAM_WORDS for language in languages], np.int64
    ).reshape(rows, len(GRAM_WORDS))
    content, offsets = buffers(text)
    stops, lists = _stop_words()
    kernel.measure(content, offsets, widths, stops, lists, _common_han(), counts, grams, entropy)
    columns: dict[str, Any] = {
        name: counts[:, k].astype(np.uint32) for k, name in enumerate(kernel.COUNTS)
    }
    columns |= {f"gram_{n}_chars": grams[:, k].astype(np.uint32) for k, n in enumerate(GRAM_WORDS)}
    columns["entropy"] = entropy
    column = pl.Series(text, dtype=pl.String)
    columns |= {name: _lines_with(column, phrases) for name, phrases in _PHRASES.items()}
    if bad_words:
        columns["bad_words"] = _bad_word_counts(column, bad_words)
    return columns


def buffers(text: Any) -> "tuple[NDArray[np.uint8], NDArray[np.int64]]":
    """UTF-8 bytes and row offsets (rows + 1) of an Arrow large_string array, without a copy."""
    import numpy as np

    _, offsets, content = text.buffers()
    if offsets is None or len(text) == 0:
        return np.zeros(0, np.uint8), np.zeros(1, np.int64)
    starts = np.frombuffer(offsets, np.int64)[text.offset : text.offset + len(text) + 1]
    # A column of empty texts may have no content buffer at all.
    bytes_ = np.zeros(0, np.uint8) if content is None else np.frombuffer(content, np.uint8)
    return bytes_, starts


def _lines_with(texts: "pl.Series", phrases: Sequence[str]) -> "NDArray[np.uint32]":
    """How many lines of each text hold one of the phrases. Nearly no text has any: those that have are
    found by one automaton, and only they are looked at line by line."""
    import numpy as np

    pattern = re.compile("|".join(map(re.escape, phrases)), re.IGNORECASE | re.ASCII)
    counts = np.zeros(len(texts), np.uint32)
    for row in texts.str.contains_any(list(phrases), ascii_case_insensitive=True).arg_true():
        counts[row] = sum(pattern.search(line) is not None for line in texts[row].split("\n"))
    return counts


def _bad_word_counts(texts: "pl.Series", bad_words: Sequence[str]) -> "NDArray[np.uint32]":
    """How often bad words occur: Latin ones as whole words, Chinese ones anywhere (no spaces there)."""
    import numpy as np
    import polars as pl

    latin = sorted({w.lower() for w in bad_words if w.isascii()})
    others = sorted({w.lower() for w in bad_words if not w.isascii()})
    parts: list[str] = []
    if latin:
        parts.append(rf"{_begins(latin)}(?<![a-z0-9]){_one_of(latin)}(?![a-z0-9])")
    if others:
        parts.append(_begins(others) + _one_of(others))
    pattern = re.compile("|".join(parts))
    lowered = [text.lower() for text in texts]
    counts = np.zeros(len(texts), np.uint32)
    found = pl.Series(lowered, dtype=pl.String).str.contains_any([*latin, *others])
    for row in found.arg_true():
        counts[row] = sum(1 for _ in pattern.finditer(lowered[row]))
    return counts


def _begins(words: Sequence[str]) -> str:
    """A cheap look at the first letter before anything else is tried."""
    return f"(?=[{re.escape(''.join(sorted({word[0] for word in words})))}])"


def _one_of(words: Sequence[str]) -> str:
    """A pattern of any of the words, written as a tree: `re` tries one branch a letter, not each word.

    Where one word begins another, the shorter is tried first, as in a sorted list.
    """
    rests: dict[str, list[str]] = {}
    for word in words:
        if word:
            rests.setdefault(word[0], []).append(word[1:])
    branches = [re.escape(first) + _one_of(rest) for first, rest in rests.items()]
    if not branches:
        return ""
    tree = branches[0] if len(branches) == 1 else f"(?:{'|'.join(branches)})"
    return f"(?:|{tree})" if "" in words else tree


@functools.cache
def _stop_words() -> "tuple[NDArray[np.uint64], NDArray[np.uint8]]":
    """Hashes of all stop words, ours first, and the lists that each is on."""
    import numpy as np

    from tasks.kernels import statistics as kernel

    lists: dict[int, int] = {}
    for text, member in (
        (" ".join(STOP_WORDS), kernel.OURS),
        (STOP_CHARACTERS, kernel.OURS),
        (" ".join(GOPHER_STOP_WORDS), kernel.GOPHER),
        (FINEWEB2_STOP_CHARACTERS, kernel.FINEWEB2),
    ):
        for word in word_hashes(text):
            lists[word] = lists.get(word, 0) | member
    return np.array(list(lists), np.uint64), np.array(list(lists.values()), np.uint8)


def word_hashes(text: str) -> "list[int]":
    """Hashes of the words of a text, as the kernels compute them."""
    import numpy as np

    from tasks.kernels.characters import words_of

    content = np.frombuffer(text.encode("utf-8"), np.uint8)
    hashes, lengths = np.empty(len(content) + 1, np.uint64), np.empty(len(content) + 1, np.int64)
    ends = np.empty(len(content) + 1, np.int64)
    found, _ = words_of(content, 0, len(content), hashes, lengths, ends)
    return [int(value) for value in hashes[:found]]


@functools.cache
def _common_han() -> "NDArray[np.bool_]":
    import numpy as np

    table = np.zeros(0x9FFF - 0x4E00 + 1, np.bool_)
    table[[ord(character) - 0x4E00 for character in common_han()]] = True
    return table
