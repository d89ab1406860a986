"""Settings of topics: what a corpus is about."""

from typing import Annotated

from pydantic import Field

from conf.settings import Settings


class TopicsConfig(Settings):
    """How documents are grouped by what they are about."""

    topics: Annotated[int, Field(ge=2, le=1000)] = 20
    """Groups, of each language together."""
    terms: Annotated[int, Field(ge=16, le=65_536)] = 4096
    """Terms that documents are compared by: the most frequent ones that are not in too many of them."""
    max_term_share: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Share of the documents above which a term says nothing."""
    sample_documents: Annotated[int, Field(ge=2)] = 5000
    """Documents that the groups are found on; every document is then put to its nearest one."""
    document_chars: Annotated[int, Field(ge=1)] = 2000
    """So much of the beginning of a document is looked at."""
    rounds: Annotated[int, Field(ge=1)] = 15
    """Rounds of k-means at most."""
    seed: int = 0
    """Another seed begins with other documents as centres."""
