"""Which conversations or pairs are unfit, leaked, repeated or too many of their domain."""

from collections import Counter
from collections.abc import Container, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from conf.decontaminate import DecontaminateConfig
from conf.dedup import DedupConfig
from conf.screen import ScreenConfig
from storage.jsonl import Split, SplitWriter, content_id
from storage.source import Source
from tasks.decontaminate import Index
from tasks.exam_questions import ExamText, read_exams
from tasks.near_duplicates import copies_among
from tasks.signatures import text_buffers
from tasks.stage import Job

if TYPE_CHECKING:
    import polars as pl

DROPPED = "dropped.parquet"
LISTED = 200
NOTHING = {"of": None, "question": None}
RUN_CHARS = 10
"""Characters of a run that an answer may repeat."""
HELD_FIRST: tuple[Split, Split] = ("held", "train")
"""The order of the sides in which rows are screened."""


class Told(NamedTuple):
    """A conversation or pair, and what it says."""

    split: Split
    row: Mapping[str, Any]
    answers: list[str]
    """What the assistant says."""
    text: str
    """All that is said."""


def screened(job: Job, rows: list[Told], settings: ScreenConfig) -> dict[str, int]:
    """Write the rows that are kept and the list of the others; how many there were and are.

    `rows` of the held-out side come first, so that no training row repeats one.
    """
    import polars as pl

    texts = pl.Series([told.text for told in rows], dtype=pl.String)
    questions = list(read_exams(job.sources.get("exams", Source()), settings.fields))
    reasons = {n: {"reason": why} for n, told in enumerate(rows) if (why := _unfit(told, settings))}
    leaks = _leaks(texts, questions, settings)
    reasons |= {n: _leak(question) for n, question in leaks.items()}
    clean = [number for number in range(len(rows)) if number not in reasons]
    copies = _copies(texts, clean, settings)
    reasons |= {n: {"reason": "repeated", "of": rows[of].row["id"]} for n, of in copies.items()}
    reasons |= {n: {"reason": "domain_share"} for n in _above_share(rows, reasons, settings)}
    dropped = [
        {"id": rows[number].row["id"], "split": rows[number].split, **NOTHING, **reasons[number]}
        for number in sorted(reasons)
    ]
    with SplitWriter(job.files) as writer:
        for number, told in enumerate(rows):
            if number not in reasons:
                writer.write(told.split, told.row)
    names = ("id", "split", "reason", "of", "question")
    frame = pl.DataFrame(dropped, schema=dict.fromkeys(names, pl.String))
    frame.write_parquet(job.files / DROPPED, compression="zstd")
    job.metrics |= {
        "leaked": len(leaks),
        "repeated": len(copies),
        "reasons": dict(sorted(Counter(why["reason"] for why in reasons.values()).items())),
        "exams": dict(sorted(Counter(question.exam for question in leaks.values()).items())),
        **writer.counts,
    }
    job.tables["dropped"] = dropped[:LISTED]
    return {"in": len(rows), "kept": len(rows) - len(dropped)}


def _unfit(told: Told, settings: ScreenConfig) -> str:
    """Why a row is not worth learning from, whatever the others say; empty if it is."""
    if min(map(len, told.answers)) < settings.least_answer_chars:
        return "short_answer"
    if 0 < settings.most_chars < len(told.text):
        return "long"
    shares = map(_repeated_share, told.answers)
    if settings.most_repeated < 1 and max(shares) > settings.most_repeated:
        return "repeats_itself"
    return ""


def _repeated_share(text: str) -> float:
    runs = [text[at : at + RUN_CHARS] for at in range(len(text) - RUN_CHARS + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def _leak(question: ExamText) -> dict[str, Any]:
    return {"reason": "exam", "of": question.exam, "question": question.question}


def _above_share(rows: list[Told], gone: Container[int], settings: ScreenConfig) -> list[int]:
    """Training rows that their domain has too many of.

    Raises ValueError for a domain without a share, or a share of a domain that is not there.
    """
    if not settings.domain_shares:
        return []
    by_domain: dict[str, list[int]] = {}
    for number, told in enumerate(rows):
        if told.split == "train" and number not in gone:
            by_domain.setdefault(told.row["domain"], []).append(number)
    if by_domain.keys() != settings.domain_shares.keys():
        raise ValueError(
            f"domain_shares names {sorted(settings.domain_shares)}, the rows are of "
            f"{sorted(by_domain)}; give each of these a share, and no other"
        )
    total = min(len(found) / settings.domain_shares[name] for name, found in by_domain.items())
    above: list[int] = []
    for name, found in by_domain.items():
        kept = round(total * settings.domain_shares[name])
        above += sorted(found, key=lambda n: content_id(["share", rows[n].row["id"]]))[kept:]
    return above


def _leaks(
    texts: "pl.Series", questions: list[ExamText], settings: ScreenConfig
) -> dict[int, ExamText]:
    """The first question that each leaked row holds, by the row's number."""
    from tasks.kernels import overlap

    if not questions:
        return {}
    how = DecontaminateConfig(
        ngram_words=settings.ngram_words, short_min_words=settings.short_min_words
    )
    index = Index.of(questions, how)
    hits = overlap.hits(*text_buffers(texts), index.widths, index.table, index.owners)
    found: dict[int, ExamText] = {}
    for row, _, _, owner in hits.tolist():
        found.setdefault(row, questions[owner])
    return found


def _copies(texts: "pl.Series", clean: list[int], settings: ScreenConfig) -> dict[int, int]:
    """For each repeated row the number of the one that it repeats."""
    how = DedupConfig(mode="exact")
    if settings.threshold is not None:
        how = DedupConfig(
            threshold=settings.threshold,
            shingle_tokens=settings.shingle_tokens,
            least_recall=settings.least_recall,
        )
    found = copies_among(texts.gather(clean), how)
    return {clean[place]: clean[of] for place, of in enumerate(found) if of is not None}
