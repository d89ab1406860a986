"""Settings of sample: a part of a corpus that keeps its proportions, or takes others."""

from typing import Annotated, Literal

from pydantic import Field

from conf.settings import Settings

Stratum = Literal["language", "source", "domain", "topic"]


class SampleConfig(Settings):
    """How much of each group of documents is kept."""

    share: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Share of the characters of every group that is kept, to within one document."""
    strata: tuple[Stratum, ...] = ("language", "source")
    """What makes a group: documents alike in all of these; `topic` needs the input `topics`."""
    shares: dict[str, Annotated[float, Field(ge=0, le=1)]] = Field(default_factory=dict[str, float])
    """Other shares for some groups, named by their values: `{zh/web: 0.5, en/books: 1.0}`."""
    held_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the held-out documents of every group that is kept."""
    seed: int = 0
    """Another seed draws other documents."""
