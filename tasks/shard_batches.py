"""A shard's kept documents in small frames, so that no stage needs a whole shard in memory."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from storage.corpus import Shard, without_spans

if TYPE_CHECKING:
    import polars as pl

BATCH_BYTES = 8_000_000


def kept_batches(
    shard: Shard, columns: Sequence[str], *, batch_bytes: int = BATCH_BYTES
) -> "Iterator[pl.DataFrame]":
    """The kept rows in order, with `row` added and removed spans taken out of `text`.

    A frame holds about `batch_bytes` of text (as the Parquet file counts them) or one document; two
    or three times that are in memory at once. Raises ValueError if the file has not the rows that the
    manifest names.
    """
    import polars as pl
    import pyarrow.parquet as pq

    decisions = shard.decisions() if shard.keep_path is not None else None
    # Not mapped: pages of a map count as memory of the process until the kernel wants them back.
    with pq.ParquetFile(shard.text_path, memory_map=False, buffer_size=1 << 20) as file:
        if file.metadata.num_rows != shard.rows:
            raise ValueError(
                f"{shard.text_path}: {file.metadata.num_rows} rows found, the manifest says "
                f"{shard.rows}; run `bessemer verify --full` and build the corpus again"
            )
        start = 0
        for group in range(file.num_row_groups):
            rows = _rows_per_batch(file.metadata.row_group(group), batch_bytes)
            found = file.iter_batches(
                rows, row_groups=[group], columns=list(columns), use_threads=False
            )
            for batch in found:
                frame = pl.DataFrame(pl.from_arrow(batch)).with_row_index("row", offset=start)
                start += frame.height
                if decisions is not None:
                    of_rows = decisions[start - frame.height : start]
                    frame = _cut(frame, of_rows).filter(of_rows["keep"])
                if frame.height:
                    yield frame


def _rows_per_batch(group: Any, batch_bytes: int) -> int:
    """Rows that hold about so many bytes; `group` is pyarrow's metadata of a row group."""
    per_row = group.total_byte_size / max(group.num_rows, 1)
    return max(1, int(batch_bytes / max(per_row, 1.0)))


def _cut(frame: "pl.DataFrame", decisions: "pl.DataFrame") -> "pl.DataFrame":
    import polars as pl

    if "cuts" not in decisions.columns or "text" not in frame.columns:
        return frame
    texts = [
        without_spans(text, cuts) if cuts else text
        for text, cuts in zip(frame["text"], decisions["cuts"].to_list(), strict=True)
    ]
    return frame.with_columns(pl.Series("text", texts, dtype=pl.String))
