"""Reads rows of JSON, JSON lines (plain, .gz, .zst) and Parquet, naming the place of every bad one."""

import bz2
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from storage.source import SourceFile

MESSAGE_KEYS = (("role", "content"), ("from", "value"))


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used, and why."""

    file: str
    line: int
    """Line of the file, from 1; the row's number where the format has no lines."""
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


def read_rows(file: SourceFile) -> Iterator[tuple[int, Any] | BadRow]:
    """Every row with its line, or why it is none.

    Raises ValueError for a file that is damaged as a whole or in a format that has no rows.
    """
    if file.format == "parquet":
        yield from _parquet_rows(file.path)
    elif file.format not in ("json", "jsonl"):
        raise ValueError(
            f"{file.path}: {file.format} holds no conversations or pairs; expected JSON, "
            "JSON lines or Parquet; convert the file or set `format` of the source"
        )
    else:
        yield from _json_rows(file)


def open_text(path: Path) -> IO[bytes]:
    """The bytes of a file, decompressed where its name says so (.gz .zst .xz .bz2)."""
    match path.suffix:
        case ".gz":
            return cast("IO[bytes]", gzip.open(path, "rb"))
        case ".xz":
            return cast("IO[bytes]", lzma.open(path, "rb"))
        case ".bz2":
            return cast("IO[bytes]", bz2.open(path, "rb"))
        case ".zst":
            import zstandard

            raw = path.open("rb")
            reader = zstandard.ZstdDecompressor().stream_reader(
                raw, read_across_frames=True, closefd=True
            )
            return cast("IO[bytes]", io.BufferedReader(cast("io.RawIOBase", reader)))
        case _:
            return path.open("rb")


def _json_rows(file: SourceFile) -> Iterator[tuple[int, Any] | BadRow]:
    try:
        with open_text(file.path) as stream:
            if _is_lines(file.path):
                yield from _lines(stream, file.name)
            else:
                yield from _document(stream.read(), file.name)
    except _damages(file.path) as error:
        raise ValueError(
            f"{file.path}: cannot be decompressed ({error}); fetch it again"
        ) from error


def _damages(path: Path) -> tuple[type[Exception], ...]:
    """What the decompressor of a file raises for broken bytes."""
    if path.suffix != ".zst":
        return (EOFError, OSError, lzma.LZMAError, zlib.error)
    import zstandard

    return (EOFError, OSError, zstandard.ZstdError)


def _is_lines(path: Path) -> bool:
    """Whether the first line that is not blank is a whole JSON value and another one follows, or the
    name says so: some projects call JSON lines `.json`."""
    if ".jsonl" in path.name or ".ndjson" in path.name:
        return True
    with open_text(path) as stream:
        first, second = (
            *(line for line, _ in zip(_filled(stream), range(2), strict=False)),
            b"",
            b"",
        )[:2]
    return bool(second) and not isinstance(_parse(first), str)


def _filled(stream: IO[bytes]) -> Iterator[bytes]:
    return (line for line in stream if line.strip())


def _lines(stream: IO[bytes], name: str) -> Iterator[tuple[int, Any] | BadRow]:
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        value = _parse(line)
        yield BadRow(name, number, value) if isinstance(value, str) else (number, value)


def _document(content: bytes, name: str) -> Iterator[tuple[int, Any] | BadRow]:
    """Rows of one JSON value: an array of rows, an object that holds one array, or a single row."""
    if not content.strip():
        return
    value = _parse(content)
    if isinstance(value, str):
        yield BadRow(name, 1, value)
        return
    yield from enumerate(_rows_of(value), start=1)


def _rows_of(value: Any) -> list[Any]:
    if isinstance(value, list):
        return [value] if _is_conversation(value) else value
    if isinstance(value, dict):
        arrays = [item for item in value.values() if isinstance(item, list)]
        if len(value) == 1 and arrays and not _is_conversation(arrays[0]):
            return arrays[0]
    return [value]


def _is_conversation(value: list[Any]) -> bool:
    return bool(value) and all(
        isinstance(item, dict) and any(set(keys) <= item.keys() for keys in MESSAGE_KEYS)
        for item in value
    )


def _parse(content: bytes) -> Any:
    """The JSON value; text says why there is none (a row is never bare text)."""
    try:
        value = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return f"is not UTF-8 at byte {error.start}"
    except json.JSONDecodeError as error:
        return f"is not JSON: {error.msg} at character {error.pos + 1}"
    except RecursionError:
        return "is JSON nested too deeply"
    return "is bare text, not an object" if isinstance(value, str) else value


def _parquet_rows(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow.parquet as pq

    number = 0
    with pq.ParquetFile(path) as table:
        for batch in table.iter_batches(batch_size=4096):
            for row in batch.to_pylist():
                number += 1
                yield number, row
