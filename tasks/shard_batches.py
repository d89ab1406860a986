"""A shard's documents in small pieces, so that no stage needs a whole shard in memory."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from storage.corpus import Shard, without_spans

if TYPE_CHECKING:
    import polars as pl

BATCH_BYTES = 8_000_000


def arrow_batches(
    shard: Shard, columns: Sequence[str], *, batch_bytes: int = BATCH_BYTES
) -> Iterator[Any]:
    """Every row in order, as `pyarrow.RecordBatch`es; removed spans are taken out of `text`.

    A batch holds about `batch_bytes` of text (as the Parquet file counts them) or one document. Raises
    ValueError if the file has not the rows that the manifest names.
    """
    import pyarrow.parquet as pq

    cuts = shard.decisions()["cuts"] if "text" in columns and shard.has_cuts else None
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
                yield batch if cuts is None else _cut(batch, cuts[start : start + batch.num_rows])
                start += batch.num_rows


def kept_batches(
    shard: Shard, columns: Sequence[str], *, batch_bytes: int = BATCH_BYTES
) -> "Iterator[pl.DataFrame]":
    """The kept rows in order, with `row` added; two or three times `batch_bytes` are in memory at once."""
    import polars as pl

    keep = shard.keep
    start = 0
    for batch in arrow_batches(shard, columns, batch_bytes=batch_bytes):
        frame = pl.DataFrame(pl.from_arrow(batch)).with_row_index("row", offset=start)
        start += frame.height
        if keep is not None:
            frame = frame.filter(keep[start - frame.height : start])
        if frame.height:
            yield frame


def texts_at(shard: Shard, rows: Sequence[int]) -> dict[int, str]:
    """The texts of a few rows, without removed spans; what lies behind the last one is not read."""
    found: dict[int, str] = {}
    wanted, start = sorted(rows, reverse=True), 0
    for batch in arrow_batches(shard, ["text"]) if wanted else ():
        texts = batch.column("text")
        while wanted and wanted[-1] < start + len(texts):
            row = wanted.pop()
            found[row] = texts[row - start].as_py()
        if not wanted:
            break
        start += len(texts)
    return found


def _rows_per_batch(group: Any, batch_bytes: int) -> int:
    """Rows that hold about so many bytes; `group` is pyarrow's metadata of a row group."""
    per_row = group.total_byte_size / max(group.num_rows, 1)
    return max(1, int(batch_bytes / max(per_row, 1.0)))


def _cut(batch: Any, cuts: "pl.Series") -> Any:
    import pyarrow as pa

    texts = [
        without_spans(text, spans) if spans else text
        for text, spans in zip(batch.column("text").to_pylist(), cuts.to_list(), strict=True)
    ]
    place = batch.schema.get_field_index("text")
    return batch.set_column(place, "text", pa.array(texts, pa.large_string()))
