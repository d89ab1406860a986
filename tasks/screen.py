"""The stage that takes leaked and repeated conversations out."""

from collections import Counter
from typing import TYPE_CHECKING, Any

from conf.decontaminate import DecontaminateConfig
from conf.dedup import DedupConfig
from conf.screen import ScreenConfig
from storage.conversations import Conversation, Conversations
from storage.jsonl import Split, SplitWriter
from storage.source import Source
from tasks.decontaminate import Index
from tasks.exam_questions import ExamText, read_exams
from tasks.near_duplicates import copies_among
from tasks.signatures import text_buffers
from tasks.stage import Job, stage

if TYPE_CHECKING:
    import polars as pl

DROPPED = "dropped.parquet"
LISTED = 200
HELD_FIRST: tuple[Split, Split] = ("held", "train")


@stage(version=3)
def screen(job: Job, conversations: Conversations, settings: ScreenConfig) -> Conversations:
    """Drop conversations that hold exam questions, then those that repeat an earlier one.

    reads Conversations, exam files   writes Conversations and `dropped.parquet` (id, split, reason, of: the
    conversation it repeats or the exam, question)   cost one pass over the words; all texts in memory
    """
    import polars as pl

    rows: list[tuple[Split, Conversation]] = [
        (split, row) for split in HELD_FIRST for row in conversations.rows(split)
    ]
    texts = pl.Series([_said(row) for _, row in rows], dtype=pl.String)
    questions = list(read_exams(job.sources.get("exams", Source()), settings.fields))
    leaks = _leaks(texts, questions, settings)
    clean = [number for number in range(len(rows)) if number not in leaks]
    copies = _copies(texts, clean, settings)
    dropped = [
        {"id": row["id"], "split": split, **_why(number, leaks, copies, rows)}
        for number, (split, row) in enumerate(rows)
        if number in leaks or number in copies
    ]
    with SplitWriter(job.files) as writer:
        for number, (split, row) in enumerate(rows):
            if number not in leaks and number not in copies:
                writer.write(split, row)
    names = ("id", "split", "reason", "of", "question")
    frame = pl.DataFrame(dropped, schema=dict.fromkeys(names, pl.String))
    frame.write_parquet(job.files / DROPPED, compression="zstd")
    job.metrics |= {
        "conversations": {"in": len(rows), "kept": len(rows) - len(dropped)},
        "leaked": len(leaks),
        "repeated": len(copies),
        "exams": dict(sorted(Counter(question.exam for question in leaks.values()).items())),
        **writer.counts,
    }
    job.tables["dropped"] = dropped[:LISTED]
    return Conversations(job.path)


def _said(row: Conversation) -> str:
    return "\n".join(message["content"] for message in row["messages"])


def _why(
    number: int,
    leaks: dict[int, ExamText],
    copies: dict[int, int],
    rows: list[tuple[Split, Conversation]],
) -> dict[str, Any]:
    if number in leaks:
        question = leaks[number]
        return {"reason": "exam", "of": question.exam, "question": question.question}
    return {"reason": "repeated", "of": rows[copies[number]][1]["id"], "question": None}


def _leaks(
    texts: "pl.Series", questions: list[ExamText], settings: ScreenConfig
) -> dict[int, ExamText]:
    """The first question that each leaked conversation holds, by the conversation's number."""
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
    """For each repeated conversation the number of the one that it repeats."""
    how = DedupConfig(mode="exact")
    if settings.threshold is not None:
        how = DedupConfig(
            threshold=settings.threshold,
            shingle_tokens=settings.shingle_tokens,
            least_recall=settings.least_recall,
        )
    found = copies_among(texts.gather(clean), how)
    return {clean[place]: clean[of] for place, of in enumerate(found) if of is not None}
