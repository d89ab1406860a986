"""Settings of decontaminate: what of the exams must not be trained on."""

from typing import Annotated, Literal

from pydantic import Field

from conf.settings import Settings, SourceSpec


class DecontaminateConfig(Settings):
    """Which documents overlap with the exams in use, and what becomes of them.

    A word is one Chinese (or kana, hangul) character or one run of letters, digits and `_`, in lower
    case; punctuation and spaces do not count.
    """

    exams: tuple[SourceSpec, ...] = ()
    """Exam files: CSV in the layout of C-Eval, CMMLU or MMLU, JSON lines, JSON, Parquet, or text with
    a question a line. A source whose `text` is not `text` names the field or template to use."""
    ngram_words: Annotated[int, Field(ge=5, le=64)] = 13
    """Words in a row that a document may not share with a question and its options (GPT-3, Brown et
    al. 2020, appendix C: 13)."""
    short_min_words: Annotated[float, Field(ge=1)] = 6.0
    """A question with fewer words than an n-gram counts as a whole, if it has this many words, a
    Chinese character being 0.625 words: shorter ones (`下列说法正确的是`) are everyday language."""
    fields: tuple[str, ...] = (
        "question",
        "prompt",
        "problem",
        "query",
        "instruction",
        "goal",
        "sentence_good",
        "sentence_bad",
        "text",
    )
    """Fields of a record that hold questions, any capitals; every one that is there is used."""
    action: Literal["drop", "cut"] = "drop"
    """Whether a document that overlaps is dropped, or loses the overlapping passages."""
    cut_margin_chars: Annotated[int, Field(ge=0)] = 200
    """Characters cut on both sides of a passage (GPT-3: 200)."""
    max_cuts: Annotated[int, Field(ge=1)] = 10
    """A document that would lose more passages is dropped (GPT-3: 10)."""
    held_overlap: Annotated[float | None, Field(gt=0, le=1)] = None
    """Share of a held-out document's distinct runs of `ngram_words` words, found in training documents, from
    which it is dropped: held-out loss shall not measure memory. Without it nothing is compared."""
