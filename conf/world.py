"""Settings of the demo world."""

from typing import Annotated

from pydantic import Field

from conf.settings import Settings


class WorldConfig(Settings):
    """How large the synthetic bilingual web is, and how much is asked about it."""

    seed: int = 0
    """Decides the facts, the pages and everything that is said about them."""
    warcs: Annotated[int, Field(ge=1, le=99)] = 8
    """WARC files. A file's bytes do not depend on how many follow it."""
    good_pages: Annotated[int, Field(ge=24)] = 220
    """Sound pages per WARC file; junk, copies and leaks are planted in proportion."""
    animals: Annotated[int, Field(ge=6, le=24)] = 24
    """Things that the world has facts about."""
    held_share: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of the questions that are never asked in alignment training."""
    chats: Annotated[int, Field(ge=1)] = 6000
    """Demonstrations of mixed quality for training."""
    pairs: Annotated[int, Field(ge=1)] = 8000
    """Preference pairs for training."""
    held_pairs: Annotated[int, Field(ge=1)] = 600
    """Preference pairs on questions that are never asked in training."""
    min_margin: Annotated[float, Field(gt=0, le=2)] = 1.0
    """Least difference in true reward between the two answers of a pair."""
