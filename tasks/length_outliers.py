"""Usual text lengths of every language and source, kept with the corpus so that an extension reuses them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from conf.filter import FilterConfig
from storage.corpus import Corpus

if TYPE_CHECKING:
    import polars as pl

LENGTHS = "lengths.json"
"""In `files/`: one entry per language and source, small groups too."""
PLAIN_LENGTHS = "plain_lengths.json"
"""The same with mean and standard deviation."""
KEYS = ("language", "source")
DIGITS = 6
"""Figures are rounded before they are used: the last bits of a logarithm differ between machines."""
MAD_TO_SIGMA = 1.4826
"""Median absolute deviation to standard deviation, of a normal distribution."""


def measured(
    lengths: "Sequence[pl.DataFrame]", spread: Literal["robust", "plain"] = "robust"
) -> "pl.DataFrame":
    """Middle and spread of the log length of every (language, source): median and median absolute
    deviation, or mean and standard deviation (0 for one document).

    One frame per shard: `language`, `source`, `chars` and how many `documents` have so many; there are
    far fewer lengths than documents. Columns of the result: `language`, `source`, `centre`, `deviation`
    (both in log characters), `documents`; sorted.
    """
    import polars as pl

    numbers, names = pl.Int64, pl.String
    schema = {"language": names, "source": names, "chars": numbers, "documents": numbers}
    counts = (
        pl.concat([pl.DataFrame(schema=schema), *lengths])
        .group_by(*KEYS, "chars")
        .agg(pl.col("documents").sum())
        .select(*KEYS, "documents", value=pl.col("chars").log())
    )
    value, documents = pl.col("value"), pl.col("documents")
    if spread == "plain":
        total = documents.sum()
        centre = (value * documents).sum() / total
        squares = (documents * (value - centre).pow(2)).sum()
        deviation = (squares / (total - 1)).sqrt().fill_nan(0.0)
        found = counts.group_by(KEYS).agg(centre=centre, deviation=deviation, documents=total)
    else:
        centres = _medians(counts).rename({"value": "centre"})
        apart = counts.join(centres, on=KEYS).with_columns(value=(value - pl.col("centre")).abs())
        deviations = _medians(apart).select(*KEYS, deviation="value")
        found = centres.join(deviations, on=KEYS)
    rounded = pl.col("centre", "deviation").round(DIGITS)
    return found.select(*KEYS, rounded, "documents").sort(KEYS)


def _medians(counts: "pl.DataFrame") -> "pl.DataFrame":
    """Median `value` of every group, each row counted `documents` times, and the group's `documents`."""
    import polars as pl

    value, documents = pl.col("value"), pl.col("documents")
    total, upto = documents.sum(), documents.cum_sum()
    middle = [value.filter(upto > place).first() for place in ((total - 1) // 2, total // 2)]
    return (
        counts.sort(*KEYS, "value")
        .group_by(KEYS, maintain_order=True)
        .agg(value=(middle[0] + middle[1]) / 2, documents=total)
    )


def lengths_file(settings: FilterConfig) -> str:
    """Name of the file that holds the lengths: another one for another kind of spread."""
    return LENGTHS if settings.outlier_spread == "robust" else PLAIN_LENGTHS


def carried_on(pinned: Corpus, fresh: "pl.DataFrame", settings: FilterConfig) -> "pl.DataFrame":
    """The lengths of an earlier filtered corpus; of `fresh` only groups that it did not know.

    What was decided on earlier shards stays so: a group that was there keeps its figures, however many
    documents come. Raises ValueError for a corpus that holds no lengths.
    """
    import polars as pl

    path = pinned.files / lengths_file(settings)
    if not path.is_file():
        raise ValueError(
            f"filter: {pinned.path} holds no {path.name}; a corpus that this version of filter made with "
            "the same `outlier_spread` is expected as `pinned`; run once without --extend, or name another"
        )
    known = pl.DataFrame(json.loads(path.read_text("utf-8")), schema=fresh.schema)
    return pl.concat([known, fresh.join(known, on=KEYS, how="anti")]).sort(KEYS)


def write_lengths(files: Path, lengths: "pl.DataFrame", settings: FilterConfig) -> None:
    """Write the lengths beside the corpus."""
    content = json.dumps(lengths.to_dicts(), ensure_ascii=False, indent=1)
    (files / lengths_file(settings)).write_text(content + "\n", "utf-8")


def with_sigmas(
    frame: "pl.DataFrame", lengths: "pl.DataFrame", settings: FilterConfig
) -> "pl.DataFrame":
    """The frame with `sigmas`: the distance of `chars` from its group's centre, in standard
    deviations; null where the group has too few documents."""
    import polars as pl

    to_sigma = MAD_TO_SIGMA if settings.outlier_spread == "robust" else 1.0
    usual = lengths.filter(pl.col("documents") >= settings.outlier_min_documents).select(
        *KEYS,
        "centre",
        spread=(to_sigma * pl.col("deviation")).clip(lower_bound=settings.outlier_min_sigma),
    )
    distance = (pl.col("chars").clip(lower_bound=1).log() - pl.col("centre")).abs()
    return (
        frame.join(usual, on=KEYS, how="left", maintain_order="left")
        .with_columns(sigmas=distance / pl.col("spread"))
        .drop("centre", "spread")
    )
