"""Settings of screen: which conversations are not trained on."""

from typing import Annotated

from pydantic import Field, model_validator

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
    least_answer_chars: Annotated[int, Field(ge=0)] = 0
    """A conversation with a shorter answer goes."""
    most_chars: Annotated[int, Field(ge=0)] = 0
    """A conversation in which more is said goes; 0 for no limit."""
    most_repeated: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Largest share of an answer's runs of ten characters that stand earlier in it; 1 keeps all."""
    domain_shares: dict[str, Annotated[float, Field(gt=0, le=1)]] = Field(
        default_factory=dict[str, float]
    )
    """Shares that the domains are to have of the training conversations; as many as possible are kept, a
    hash of each decides which. Empty for all there are."""

    @model_validator(mode="after")
    def _shares_make_a_whole(self) -> "ScreenConfig":
        if self.domain_shares and abs(sum(self.domain_shares.values()) - 1) > 1e-6:
            raise ValueError(
                f"domain_shares add up to {sum(self.domain_shares.values()):g}; they must add up to 1: name "
                "every domain and its share"
            )
        return self
