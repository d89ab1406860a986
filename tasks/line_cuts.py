"""Lines that are cut out of a document which stays: menus, notices, half sentences, marks of citations.

The rules are C4's (Raffel et al. 2020; the numbers are those of its released code), with Chinese forms of them.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.filter import FilterConfig, LineRule
from storage.corpus import Shard, joined_spans
from tasks.fanout import Part, PartItem, fan_out
from tasks.kept_rows import text_digest
from tasks.stage import Job
from tasks.text_statistics import C4_POLICY, HAN_POLICY, batches

if TYPE_CHECKING:
    import polars as pl

CUTS = "cuts.parquet"
"""`cuts` (characters of the shard's own text) and `left` (characters that remain), row by row."""
VERSION = 1
MIN_WORDS = 5
MIN_HAN_CHARS = 8
"""Five words in Chinese, a word being 1.6 characters."""
MAX_WORD_CHARS = 1000
_ENDS = (".", "!", "?", '"')
_HAN_ENDS = ("。", "！", "？", "…", "”", "」", "』", "）", "》", "；", "：", *_ENDS)
_PHRASES: dict[LineRule, tuple[str, ...]] = {
    "javascript": ("javascript",),
    "policy": (*C4_POLICY, *HAN_POLICY),
    "lorem_ipsum": ("lorem ipsum",),
    "braces": ("{", "}"),
}
_MORE = re.compile(r"(?:read ?more|展开|更多|。。。)$", re.IGNORECASE)
_CITATION = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]")
_HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")

Span = tuple[int, int]


def line_cut_parts(job: Job, shards: Sequence[Shard], settings: FilterConfig) -> list[Part]:
    """A part per shard with what is cut from it; none where nothing is to be cut."""
    rules = settings.line_rules()
    items = [
        PartItem(
            {"text": shard.entry.digest, "cuts": text_digest(shard), "rules": list(rules)},
            (shard, rules),
            f"lines cut from {shard.entry.name}",
        )
        for shard in shards
    ]
    parts = fan_out(job, build_line_cuts, items, version=VERSION) if rules else []
    _report(job, parts)
    return parts


def build_line_cuts(files: Path, shard: Shard, rules: Sequence[LineRule]) -> dict[str, Any]:
    """Write `cuts.parquet` of a shard. Cost: 20 MB of text a second."""
    import polars as pl

    files.mkdir(parents=True, exist_ok=True)
    found: dict[int, list[dict[str, int]]] = {}
    left: list[int] = []
    counts: Counter[tuple[str, str]] = Counter()
    chars = 0
    for texts, languages in batches(shard):
        for text, language in zip(texts.to_pylist(), languages, strict=True):
            spans = line_spans(text, language, rules, counts)
            if spans:
                found[len(left)] = spans
            left.append(len(text) - sum(span["end"] - span["start"] for span in spans))
            chars += len(text)
    if shard.has_cuts:
        found = shard.uncut_spans(found)
    kind = pl.List(pl.Struct({"start": pl.UInt32, "end": pl.UInt32}))
    cuts = pl.Series("cuts", [found.get(row, []) for row in range(len(left))], dtype=kind)
    frame = pl.DataFrame([cuts, pl.Series("left", left, dtype=pl.UInt32)])
    frame.write_parquet(files / CUTS, compression="zstd")
    cut = [[*key, count] for key, count in sorted(counts.items())]
    return {"cut": cut, "chars": chars - sum(left)}


def read_line_cuts(part: Part) -> "pl.DataFrame":
    """The cuts of a shard, row by row."""
    import polars as pl

    return pl.read_parquet(part.files / CUTS)


def line_spans(
    text: str, language: str, rules: Sequence[LineRule], counts: Counter[tuple[str, str]]
) -> list[dict[str, int]]:
    """What to cut from a text, in order; `counts` gets one more for each (rule, language) that cuts.

    A line goes with its end; blank lines that would stand together then, or at the begin, go too.
    """
    spans = list(_lines(text, language, rules, counts))
    if "citations" in rules:
        for mark in _CITATION.finditer(text):
            counts["citations", language] += 1
            spans.append(mark.span())
    joined = joined_spans({"start": start, "end": end} for start, end in spans)
    if joined and joined[-1]["end"] == len(text):
        joined[-1]["start"] = len(text[: joined[-1]["start"]].rstrip("\n"))
    return joined


def _lines(
    text: str, language: str, rules: Sequence[LineRule], counts: Counter[tuple[str, str]]
) -> Iterator[Span]:
    start = 0
    has_gap = True
    """Whether a blank line here would stand at the begin or beside another one."""
    is_cut = False
    """Whether something was cut since the last line that stays."""
    for line in text.split("\n"):
        end = min(start + len(line) + 1, len(text))
        trimmed = line.strip()
        if "citations" in rules:
            # As in C4's code, a space before the mark is then the line's end.
            trimmed = _CITATION.sub("", trimmed)
        if not trimmed.strip():
            if is_cut and has_gap:
                yield start, end
            has_gap = True
        elif rule := _broken(trimmed, language, rules):
            is_cut = True
            counts[rule, language] += 1
            yield start, end
        else:
            has_gap = is_cut = False
        start = end


def _broken(line: str, language: str, rules: Sequence[LineRule]) -> LineRule | None:
    """The first rule that a line breaks."""
    return next((rule for rule in rules if _breaks(rule, line, language)), None)


def _breaks(rule: LineRule, line: str, language: str) -> bool:
    match rule:
        case "unended":
            if language == "zh":
                return not line.endswith(_HAN_ENDS)
            return not line.endswith(_ENDS) or line.endswith("...")
        case "short":
            if language == "zh":
                return len(_HAN.findall(line)) < MIN_HAN_CHARS and len(line.split()) < MIN_WORDS
            return len(line.split()) < MIN_WORDS
        case "long_word":
            # Chinese has no spaces: a line is one word.
            return language != "zh" and any(len(word) > MAX_WORD_CHARS for word in line.split())
        case "javascript" | "policy" | "lorem_ipsum" | "braces":
            lowered = line.lower()
            return any(phrase in lowered for phrase in _PHRASES[rule])
        case "more":
            return _MORE.search(line) is not None
        case "citations":
            return False


def _report(job: Job, parts: Sequence[Part]) -> None:
    if not parts:
        return
    total: Counter[tuple[str, str]] = Counter()
    for part in parts:
        total.update({(rule, language): count for rule, language, count in part.metrics["cut"]})
    job.tables["line_cuts"] = [
        {"rule": rule, "language": language, "lines": count}
        for (rule, language), count in sorted(total.items())
    ]
    job.metrics["line_cuts"] = {
        "chars": sum(part.metrics["chars"] for part in parts),
        **{rule: sum(n for (name, _), n in total.items() if name == rule) for rule, _ in total},
    }
