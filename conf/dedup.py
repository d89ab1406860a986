"""Settings of dedup: how close two documents must be to count as one."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from conf.settings import RUNTIME, Settings

LEAST_PERMUTATIONS, MOST_PERMUTATIONS = 64, 256
"""What `least_recall` chooses from, as far as it needs to."""


class DedupConfig(Settings):
    """Which copies are dropped. Several ways after one another are several nodes of this stage."""

    mode: Literal["near", "simhash", "exact", "substring", "soft", "off"] = "near"
    """`near` drops exact copies and near-copies (MinHash, then the exact Jaccard similarity), `simhash`
    those within some bits of a 64-bit SimHash, `exact` only equal texts (128-bit hash). `substring` cuts
    passages that an earlier document has. `soft` thins out documents that resemble earlier ones. `off`
    keeps all."""
    unit: Literal["document", "paragraph"] = "document"
    """What is compared in the modes `near`, `simhash` and `exact`: whole documents, or paragraphs (lines)
    of different documents; a paragraph that is a copy is cut out."""
    keep: Literal["first", "longest", "quality", "source"] = "first"
    """Which one of a group stays, among documents of one landing: the first in order, the longest, the one
    with the largest share of text in lines that end a sentence, or the one whose source (or domain) comes
    first in `source_order`; the first in order where that is equal. What an earlier landing kept stays."""
    source_order: tuple[str, ...] = ()
    """Sources or domains from best to worst, for `keep: source`; those not named come last."""
    threshold: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Jaccard similarity of the shingle sets from which two documents are duplicates (mode `near`)."""
    shingles: Literal["tokens", "characters", "windows", "words"] = "tokens"
    """What a shingle is made of: `tokens` (one Han character, or one run of letters and digits), `characters`
    (letters and digits one by one, without spaces and punctuation), `windows` (every character as it
    is, spaces too), or `words` (jieba's words in Chinese, which signs about 0.5 MB a second)."""
    shingle_tokens: Annotated[int, Field(ge=1, le=64)] = 5
    """How many of them in a row are a shingle; a document with fewer is one shingle."""
    min_shingles: Annotated[int, Field(ge=1)] = 1
    """Documents with fewer shingles are dropped as equal texts only: in a short text one word decides. With 1,
    every document with a token is compared."""
    bands: Annotated[int, Field(ge=1, le=256)] = 20
    """Groups of signature values; two documents are compared if all values of one group agree."""
    band_rows: Annotated[int, Field(ge=1, le=64)] = 6
    """Values in a group. More find fewer pairs; a pair at similarity s is found with probability
    1 - (1 - s^band_rows)^bands: 0.998 at 0.8 with 20 x 6."""
    least_recall: Annotated[float | None, Field(gt=0, lt=1)] = None
    """Chooses `bands` and `band_rows`: the longest bands, then the fewest, that find a pair at the threshold
    with this probability, with at most 256 values in a signature."""
    permutation_seed: Annotated[int, Field(ge=0, lt=2**32)] = 1
    """Seed of datasketch's permutations; not the recipe's seed, which need not move the corpus."""
    weights: Literal["unit", "tfidf"] = "unit"
    """How shingles count in a SimHash: alike, or by TF-IDF with the frequencies of the first landing."""
    distance_bits: Annotated[int, Field(ge=0, le=7)] = 3
    """Bits in which two SimHashes may differ (Manku, Jain and Das Sarma 2007: 3)."""
    passage_tokens: Annotated[int, Field(ge=8, le=1000)] = 50
    """Tokens in a row that an earlier document has, from which they are cut (mode `substring`; Lee et al. 2022:
    50)."""
    min_paragraph_tokens: Annotated[int, Field(ge=1)] = 8
    """Paragraphs with fewer tokens are never cut: headings and everyday phrases."""
    min_left_chars: Annotated[int, Field(ge=0)] = 15
    """A document that keeps fewer characters after cuts is dropped."""
    soft_floor: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """TF-IDF cosine similarity to an earlier document from which a document's weight falls (mode `soft`)."""
    least_weight: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Weight of an exact copy. It falls in a line from 1 at `soft_floor`; a document stays with a probability
    that is its weight, drawn from its id."""

    memory_mb: Annotated[int | None, RUNTIME, Field(ge=0)] = None
    """MB that buckets, signatures and shingles of documents with possible copies may take in memory; what is
    more lies on disk. None: a quarter of what the machine or the container has."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.unit == "paragraph" and self.mode in ("substring", "soft"):
            raise ValueError(
                f"unit=paragraph compares in the modes near, simhash and exact, not in {self.mode}; "
                f"leave unit at document"
            )
        if self.keep != "first" and self.mode in ("substring", "soft"):
            raise ValueError(
                f"mode={self.mode} goes by the order of documents alone, keep={self.keep} would change "
                f"nothing; leave keep at first or use mode near, simhash or exact"
            )
        if self.shingles != "tokens" and self.mode == "substring":
            raise ValueError(
                f"mode=substring finds passages of tokens, shingles={self.shingles} would change "
                f"nothing; leave shingles at tokens"
            )
        if self.keep == "source" and not self.source_order:
            raise ValueError("keep=source needs source_order: name sources or domains, best first")
        if self.least_recall is not None:
            if self.model_fields_set & {"bands", "band_rows"}:
                raise ValueError(
                    "least_recall chooses bands and band_rows; give one or the other, not both"
                )
            self.banding()
        return self

    def banding(self) -> tuple[int, int]:
        """Bands, and rows in a band: as set, or chosen for `least_recall`.

        Raises ValueError if 256 values are too few.
        """
        if self.least_recall is None:
            return self.bands, self.band_rows
        for rows in range(64, 0, -1):
            most = MOST_PERMUTATIONS // rows
            if _recall(self.threshold, most, rows) < self.least_recall:
                continue
            return next(
                (bands, rows)
                for bands in range(-(-LEAST_PERMUTATIONS // rows), most + 1)
                if _recall(self.threshold, bands, rows) >= self.least_recall
            )
        raise ValueError(
            f"no {MOST_PERMUTATIONS} values find pairs at similarity {self.threshold} with "
            f"probability {self.least_recall}; lower least_recall or raise threshold"
        )

    def recall(self, similarity: float) -> float:
        """Probability that a pair of that similarity is compared at all."""
        return _recall(similarity, *self.banding())


def _recall(similarity: float, bands: int, rows: int) -> float:
    return 1 - (1 - similarity**rows) ** bands
