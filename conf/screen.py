"""Settings of screen: which conversations are not trained on."""

from typing import Annotated

from pydantic import Field

from conf.decontaminate import DecontaminateConfig
from conf.settings import Settings, SourceSpec


class ScreenConfig(Settings):
    """Which conversations hold exam questions, and which say what another one says."""

    exams: tuple[SourceSpec, ...] = ()
    """Exam files, as those of decontaminate."""
    ngram_words: Annotated[int, Field(ge=5, le=64)] = 13
    """Words in a row that a conversation may not share with a question and its options."""
    short_min_words: Annotated[float, Field(ge=1)] = 6.0
    """A question with fewer words than an n-gram counts as a whole, if it has this many words."""
    fields: tuple[str, ...] = DecontaminateConfig().fields
    """Fields of a record of an exam that hold questions, any capitals."""
    threshold: Annotated[float | None, Field(gt=0, le=1)] = 0.4
    """Jaccard similarity of all that is said in two conversations from which the later one goes; held-out
    ones come first, so that no training conversation repeats one. Without it only equal ones go."""
    shingle_tokens: Annotated[int, Field(ge=1, le=64)] = 5
    """Tokens in a row that are compared."""
    least_recall: Annotated[float, Field(gt=0, lt=1)] = 0.99
    """Probability that two conversations at the threshold are compared at all."""
