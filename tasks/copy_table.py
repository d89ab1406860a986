"""The table of copies that a landing finds: which unit, of what kind, of which kept one, how close."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import polars as pl

DUPLICATES = "duplicates.parquet"
"""What a landing dropped: shard, row, kind (exact, near), of_shard, of_row, jaccard."""
NEAR_MISSES = "near_misses.parquet"
"""Some kept units that are nearest to being dropped; the same columns."""


def schema() -> "dict[str, Any]":
    """Columns of a table of copies, with their types."""
    import polars as pl

    row = {"shard": pl.UInt32, "row": pl.UInt32, "kind": pl.String}
    return {**row, "of_shard": pl.UInt32, "of_row": pl.UInt32, "jaccard": pl.Float64}


def empty_table() -> "pl.DataFrame":
    """A table of copies without rows."""
    import polars as pl

    return pl.DataFrame(schema=schema())


def with_kept_partners(exact: "pl.DataFrame", near: "pl.DataFrame") -> "pl.DataFrame":
    """Copies of a text that is itself a near-copy point to what was kept for it."""
    import polars as pl

    moved = near.select(
        of_shard="shard", of_row="row", to_shard="of_shard", to_row="of_row", closeness="jaccard"
    )
    return exact.join(moved, on=["of_shard", "of_row"], how="left", maintain_order="left").select(
        "shard",
        "row",
        "kind",
        pl.coalesce("to_shard", "of_shard").alias("of_shard"),
        pl.coalesce("to_row", "of_row").alias("of_row"),
        pl.coalesce("closeness", "jaccard").alias("jaccard"),
    )
