"""Settings of rate: people compare answers without knowing whose they are."""

from typing import Annotated

from pydantic import Field

from conf.settings import Settings, SourceSpec


class RateConfig(Settings):
    """Which pairs of answers people are shown, and where their ratings come back from."""

    ratings: tuple[SourceSpec, ...] = ()
    """CSV files as the page saves them, or `pairs.csv` filled in: `id` and `verdict` (left, right, tie; empty
    for not rated), and `rater` where there are several. With `is_optional` the stage first makes the page."""
    baseline: str = ""
    """Name of the answers that all others are compared with; empty for every two."""
    questions: Annotated[int, Field(ge=0)] = 0
    """First questions that are shown; 0 for all that every checkpoint has answered."""
    seed: int = 0
    """Of the order of the pairs, and of which answer is on the left."""
