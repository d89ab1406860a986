"""Settings of the order, the length and the labels in which pretraining meets its data."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from conf.settings import Settings


class CurriculumConfig(Settings):
    """What pretraining begins with; by default everything at once, in a seeded order."""

    domain_order: tuple[str, ...] = ()
    """Domains to be read one after another, each for the share of the steps that it has of their tokens;
    none for the mixtures of `phases`."""
    competence: Literal["off", "linear", "sqrt"] = "off"
    """How fast windows beyond the easiest take part. At competence c the samples of a domain are drawn
    evenly from the share c of its windows that is easiest; at 1 each window comes once per pass again
    (Platanios et al. 2019, linear and square-root competence)."""
    difficulty: Annotated[str, Field(pattern=r"^[a-z0-9_]*$")] = ""
    """Column that says how difficult a document is, one of `tokenize.difficulty`; a window has the mean of
    its tokens. Empty with `perplexity_at`: no order before it."""
    first_share: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """Competence at the first step (Platanios et al. 2019: 0.01)."""
    until: Annotated[float, Field(gt=0, le=1)] = 0.3
    """Share of the steps after which competence is 1."""
    perplexity_at: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Share of the steps from which on the current model's loss of a window is its difficulty; none for
    never. Costs one pass over the data without gradients."""
    first_vocabulary: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the token ids, the most frequent ones, that are labels at the first step; rarer ones are
    read, but train nothing yet. It grows linearly to all of them."""
    vocabulary_until: Annotated[float, Field(gt=0, le=1)] = 0.3
    """Share of the steps after which every token is a label."""
    first_row_tokens: Annotated[int, Field(ge=0)] = 0
    """Length of rows at the first step; it doubles at even distances until rows have the whole `context`,
    which is a power of two times this. Rows are cut, so that a step has the same tokens at every length
    (Li et al. 2022 cut off instead). 0 for the whole length at once."""
    length_until: Annotated[float, Field(gt=0, le=1)] = 0.3
    """Share of the steps after which rows have the whole length."""

    @model_validator(mode="after")
    def _is_whole(self) -> "CurriculumConfig":
        if len(set(self.domain_order)) < len(self.domain_order):
            raise ValueError(
                f"curriculum.domain_order names a domain twice ({', '.join(self.domain_order)}); name each "
                f"once, or use phases"
            )
        if self.competence == "off":
            if self.difficulty or self.perplexity_at is not None:
                name = "difficulty" if self.difficulty else "perplexity_at"
                raise ValueError(
                    f"curriculum.{name} orders windows by competence, which is off; set "
                    f"curriculum.competence=sqrt or linear"
                )
        elif not self.difficulty and self.perplexity_at is None:
            raise ValueError(
                f"curriculum.competence={self.competence} needs to know what is difficult; name a column "
                f"of tokenize.difficulty as curriculum.difficulty, or set curriculum.perplexity_at"
            )
        elif self.perplexity_at is not None and self.perplexity_at >= self.until:
            raise ValueError(
                f"curriculum.perplexity_at={self.perplexity_at:g} is not before curriculum.until="
                f"{self.until:g}, after which no order holds; lower the one or raise the other"
            )
        return self
