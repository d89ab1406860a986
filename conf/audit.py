"""Settings of the audit of the data stages."""

from typing import Annotated

from pydantic import Field

from conf.settings import RUNTIME, Settings


class AuditConfig(Settings):
    """Which planted pages count as copies, and how many mistakes are listed."""

    copy_similarity: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Jaccard similarity from which one of two pages has to go."""
    distinct_low: Annotated[float, Field(ge=0, le=1)] = 0.6
    """From this similarity, and up to `distinct_high`, both pages have to stay."""
    distinct_high: Annotated[float, Field(ge=0, le=1)] = 0.75
    """End of the range in which both pages have to stay."""
    mistakes: Annotated[int, Field(ge=0), RUNTIME] = 20
    """Pages listed per kind of mistake in `logs/mistakes.jsonl`."""
