"""Usual text lengths of every language and source, kept with the corpus so that an extension reuses them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from conf.filter import FilterConfig
from storage.corpus import Corpus

if TYPE_CHECKING:
    import polars as pl

LENGTHS = "lengths.json"
"""In `files/`: one entry per language and source, small groups too."""
KEYS = ("language", "source")
DIGITS = 6
"""Figures are rounded before they are used: the last bits of a logarithm differ between machines."""
MAD_TO_SIGMA = 1.4826
"""Median absolute deviation to standard deviation, of a normal distribution."""


def measured(lengths: "Sequence[pl.DataFrame]") -> "pl.DataFrame":
    """Median and median absolute deviation of the log length of every (language, source).

    One frame per shard: `language`, `source`, `log_chars`. Columns of the result: `language`,
    `source`, `centre`, `deviation` (both in log characters), `documents`; sorted.
    """
    import polars as pl

    schema = {"language": pl.String, "source": pl.String, "log_chars": pl.Float64}
    median = pl.col("log_chars").median()
    return (
        pl.concat([pl.DataFrame(schema=schema), *lengths])
        .group_by(KEYS)
        .agg(
            centre=median.round(DIGITS),
            deviation=(pl.col("log_chars") - median).abs().median().round(DIGITS),
            documents=pl.len().cast(pl.Int64),
        )
        .sort(KEYS)
    )


def carried_on(pinned: Corpus, fresh: "pl.DataFrame") -> "pl.DataFrame":
    """The lengths of an earlier filtered corpus; of `fresh` only groups that it did not know.

    What was decided on earlier shards stays so: a group that was there keeps its figures, however many
    documents come. Raises ValueError for a corpus that holds no lengths.
    """
    import polars as pl

    path = pinned.files / LENGTHS
    if not path.is_file():
        raise ValueError(
            f"filter: {pinned.path} holds no {LENGTHS}; a corpus that this version of filter made is "
            "expected as `pinned`; run once without --extend, or name another"
        )
    known = pl.DataFrame(json.loads(path.read_text("utf-8")), schema=fresh.schema)
    return pl.concat([known, fresh.join(known, on=KEYS, how="anti")]).sort(KEYS)


def write_lengths(files: Path, lengths: "pl.DataFrame") -> None:
    """Write the lengths beside the corpus."""
    content = json.dumps(lengths.to_dicts(), ensure_ascii=False, indent=1)
    (files / LENGTHS).write_text(content + "\n", "utf-8")


def with_sigmas(
    frame: "pl.DataFrame", lengths: "pl.DataFrame", settings: FilterConfig
) -> "pl.DataFrame":
    """The frame with `sigmas`: the distance of `chars` from its group's centre, in robust standard
    deviations; null where the group has too few documents."""
    import polars as pl

    usual = lengths.filter(pl.col("documents") >= settings.outlier_min_documents).select(
        *KEYS,
        "centre",
        spread=(MAD_TO_SIGMA * pl.col("deviation")).clip(lower_bound=settings.outlier_min_sigma),
    )
    distance = (pl.col("chars").clip(lower_bound=1).log() - pl.col("centre")).abs()
    return (
        frame.join(usual, on=KEYS, how="left", maintain_order="left")
        .with_columns(sigmas=distance / pl.col("spread"))
        .drop("centre", "spread")
    )
