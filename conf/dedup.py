"""Settings of dedup: how close two documents must be to count as one."""

from typing import Annotated, Literal

from pydantic import Field

from conf.settings import Settings


class DedupConfig(Settings):
    """Which copies are dropped."""

    mode: Literal["near", "exact", "off"] = "near"
    """`near` drops exact copies and near-copies, `exact` only byte-equal texts, `off` nothing."""
    threshold: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Jaccard similarity of the shingle sets from which two documents are duplicates."""
    shingle_tokens: Annotated[int, Field(ge=1, le=64)] = 5
    """Tokens in a shingle; a token is one Han character or one run of letters and digits."""
    bands: Annotated[int, Field(ge=1, le=256)] = 20
    """Groups of signature values; two documents are compared if all values of one group agree."""
    band_rows: Annotated[int, Field(ge=1, le=64)] = 6
    """Values in a group. More find fewer pairs; a pair at similarity s is found with probability
    1 - (1 - s^band_rows)^bands: 0.998 at 0.8 with 20 x 6."""
    permutation_seed: Annotated[int, Field(ge=0, lt=2**32)] = 1
    """Seed of datasketch's permutations; not the recipe's seed, which need not move the corpus."""

    def recall(self, similarity: float) -> float:
        """Probability that a pair of that similarity is compared at all."""
        return 1 - (1 - similarity**self.band_rows) ** self.bands
