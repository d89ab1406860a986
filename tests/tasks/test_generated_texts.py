"""Filter, dedup and signatures against plain versions, on many generated texts of both languages.

`make soak` takes thousands of them and lines of ten megabytes.
"""

import random
import re
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from datasketch import MinHash

from benchmarks.filter_rules import NARROW, SINGLE, plain_statistics
from conf.dedup import DedupConfig
from conf.filter import FilterConfig, Preset, Rule
from tasks.dedup import dedup
from tasks.filter import filter  # noqa: A004 - the stage's word
from tasks.signatures import shingle_sets, sign_texts
from tests.storage.corpora import corpus_of
from tests.tasks.test_filter import GOOD, JUNK
from tests.tasks.test_text_statistics import PIECES
from tests.tasks.text_jobs import job_at

SENTENCES = [text for texts in GOOD.values() for text in texts] + [
    t for ts in JUNK.values() for t in ts
]
ODD = [
    *("e\u0301\u0327", "👩\u200d👧🏽", "\0", "\ud83d", "\udc00x", "\u200b", "\u202e"),
    *("ﬁ", "Ａ１", "ｇ＿９", "\r\n", "\t", "कि", "한글", "ひ"),
]


def generated(count: int, *, long_lines: bool = False) -> list[dict[str, Any]]:
    """Texts of sentences, of pieces, of any characters, of what repeats, and of nothing."""
    rng = random.Random(7)
    texts = ["", "\n", "\0"]
    while len(texts) < count:
        pool = rng.choice([SENTENCES, PIECES, PIECES + ODD, SENTENCES + PIECES + ODD, [_any(rng)]])
        text = rng.choice(["", "", " ", "\n"]).join(rng.choices(pool, k=rng.randrange(1, 60)))
        texts.append(text + text[: rng.randrange(len(text))] * rng.randrange(3))
    if long_lines:
        texts += [_long_line(rng, "en"), _long_line(rng, "zh")]
    # As extract does with what is no character.
    return [
        {"text": text.encode("utf-8", "replace").decode(), "language": rng.choice(["zh", "en"])}
        for text in texts
    ]


def _any(rng: random.Random) -> str:
    return "".join(
        chr(rng.choice((rng.randrange(1, 0x3000), rng.randrange(0x20, 0x2FFFF)))) for _ in range(30)
    )


def _long_line(rng: random.Random, language: str) -> str:
    if language == "zh":
        return "".join(chr(rng.randrange(0x4E00, 0x6E00)) for _ in range(3_400_000))
    return " ".join(f"w{rng.randrange(10**6):07d}" for _ in range(1_150_000))


SIZES = [
    pytest.param(250, False),
    pytest.param(4000, True, marks=pytest.mark.soak),
]


# Filter


LINE_KINDS = ("ended", "short", "bullet", "ellipsis", "repeated", "policy", "more")


def plain_shares(text: str, language: str) -> dict[str, float | None]:
    """Every count, and every share that a rule of a preset is about; none where there is no whole."""
    counts = plain_statistics(text, language)
    counts["solid"] = counts["chars"] - counts["spaces"] - counts["newlines"]
    counts["signs_of_symbols"] = max(counts["hashes"], counts["ellipses"])
    shares: dict[str, float | None] = dict(counts)
    of = {
        "solid": ["odd", "supplement", "sign", "digit", "brace", "letter"],
        "lines": [f"{kind}_line" for kind in LINE_KINDS],
        "chars": ["repeated_line_char", "repeated_paragraph_char"],
        "paragraphs": ["repeated_paragraph"],
        "han": ["rare_han"],
    }
    parts = [
        (f"{name}_share", name if name in counts else f"{name}s", whole)
        for whole, names in of.items()
        for name in names
    ]
    parts += [
        (f"{'top' if n < 5 else 'repeated'}_{n}gram_share", f"gram_{n}_chars", "solid")
        for n in range(2, 11)
    ]
    parts += [
        ("symbols_per_word", "signs_of_symbols", "words"),
        ("mean_word_chars", "word_chars", "words"),
        ("letter_word_share", "letter_words", "words"),
        ("newlines_per_word", "newlines", "words"),
        ("unique_word_share", "head_unique", "head_words"),
        ("bracketed_share", "bracketed", "chars"),
        ("hashes_per_char", "hashes", "chars"),
        ("ellipses_per_char", "ellipses", "chars"),
    ]
    for name, part, whole in parts:
        shares[name] = counts[part] / counts[whole] if counts[whole] else None
    if counts["lines"] == 1 and counts["sentence_marks"]:
        shares["ended_line_share"] = 1.0
    shares["is_unwrapped"] = float(counts["wrapped_lines"] < max(5, 0.35 * counts["lines"]))
    return shares


def plain_reason(text: str, language: str, rules: tuple[Rule, ...]) -> str | None:
    """The first rule, in order of names, that a text breaks."""
    shares = plain_shares(text, language)

    def is_broken(rule: Rule) -> bool:
        value = shares[rule.statistic]
        if value is None or (rule.languages and language not in rule.languages):
            return False
        if any((shares[name] or 0) < least for name, least in rule.needs.items()):
            return False
        is_low = rule.minimum is not None and value < rule.minimum
        return is_low or (rule.maximum is not None and value > rule.maximum)

    broken = {rule.name for rule in rules if is_broken(rule)}
    return next((rule.name for rule in rules if rule.name in broken), None)


@pytest.mark.parametrize(("count", "long_lines"), SIZES)
def test_rules_decide_as_their_plain_version(tmp_path: Path, count: int, long_lines: bool) -> None:
    documents = generated(count, long_lines=long_lines)
    corpus = corpus_of(tmp_path, [documents])
    presets: tuple[Preset, ...] = ("zh_en", "zh_en_published")
    for preset in presets:
        settings = FilterConfig(preset=preset, outlier_sigmas=None)
        result = filter(job_at(tmp_path, preset), corpus=corpus, settings=settings)
        found = result.shards[0].decisions()["reason"].to_list()
        wanted = [plain_reason(d["text"], d["language"], settings.rules()) for d in documents]
        assert found == wanted
        assert len({*wanted}) > 12


# Dedup


# A Han, kana or hangul character, or other letters and digits in a row.
TOKEN = re.compile(f"[{SINGLE}]|[A-Za-z0-9_\xc0-\xd6\xd8-\xf6\xf8-\u1fff]+")


def plain_shingles(text: str, width: int = 5) -> set[tuple[str, ...]]:
    """Runs of five tokens, ASCII case ignored."""
    found = TOKEN.findall(text.translate(NARROW))
    words = [re.sub("[A-Z]", lambda m: m.group().lower(), word) for word in found]
    width = min(width, len(words))
    return {tuple(words[i : i + width]) for i in range(len(words) - width + 1)} if words else set()


def plain_kept(texts: list[str], threshold: float) -> list[bool]:
    """What to keep, by the exact Jaccard similarity with every document kept before."""
    kept: list[tuple[str, set[tuple[str, ...]]]] = []
    decisions: list[bool] = []
    for text in texts:
        shingles = plain_shingles(text)
        is_copy = any(
            text == other or _jaccard(shingles, theirs) >= threshold for other, theirs in kept
        )
        decisions.append(not is_copy)
        kept += [] if is_copy else [(text, shingles)]
    return decisions


def _jaccard(one: set[Any], other: set[Any]) -> float:
    both = len(one & other)
    return both / (len(one) + len(other) - both) if both else 0.0


@pytest.mark.parametrize(("count", "long_lines"), SIZES)
def test_dedup_decides_as_comparing_everything(
    tmp_path: Path, count: int, long_lines: bool
) -> None:
    rng = random.Random(11)
    texts = [document["text"] for document in generated(count // 4, long_lines=long_lines)]
    texts += [_changed(rng, rng.choice(texts)) for _ in range(count // 4)]
    rng.shuffle(texts)
    # A band of one row compares nearly every pair, so that nothing may be missed.
    settings = DedupConfig(bands=120, band_rows=1, threshold=0.7)
    result = dedup(job_at(tmp_path, "d"), corpus_of(tmp_path, [texts]), settings)
    found = result.shards[0].decisions()["keep"].to_list()
    assert found == plain_kept(texts, 0.7)
    assert len(texts) // 3 < sum(found) < 9 * len(texts) // 10


def _changed(rng: random.Random, text: str) -> str:
    place = rng.randrange(len(text) + 1)
    return (
        text[:place] + rng.choice(["", " ", "new words", "新的"]) + text[place + rng.randrange(9) :]
    )


@pytest.mark.parametrize(("count", "long_lines"), SIZES)
def test_signatures_are_those_of_datasketch(count: int, long_lines: bool) -> None:
    texts = [document["text"] for document in generated(count, long_lines=long_lines)]
    settings = DedupConfig()
    signatures, counts = sign_texts(pl.Series(texts), settings)
    values, ends = shingle_sets(pl.Series(texts), settings)
    for row, (text, begin) in enumerate(zip(texts, [0, *ends[:-1]], strict=True)):
        hashes = [int(value) >> 32 for value in values[begin : ends[row]]]
        oracle = MinHash(num_perm=120, seed=1, scheme="affine32", hashfunc=int)
        oracle.update_batch(hashes)
        assert signatures[row].tolist() == oracle.hashvalues.tolist(), text[:200]
        assert (counts[row] > 0) == bool(hashes)
        assert len(hashes) == len(plain_shingles(text)), text[:200]
