"""Reads rows of JSON, JSON lines (plain, .gz, .zst) and Parquet, naming the place of every bad one.

Damage costs the rows that it hits: a JSON array goes on at its next object, a Parquet file at its next
row group, and every row of a lost group is told of.
"""

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import re
import string
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

from storage.source import SourceFile
from tasks.normalise import without_halves

MAX_ROW_BYTES = 1 << 28
"""A line, or an item of an array, that is longer is a bad row and is not held in memory."""
WHOLE_BYTES = 1 << 24
"""A larger JSON array is read item by item."""
PARQUET_BATCH_ROWS = 256
"""Few: some bytes of a column may unfold into a row of a megabyte."""
NAME = re.compile(r"[A-Za-z_]\w*")
MESSAGE_KEYS = (("role", "content"), ("from", "value"))
_HAS_HALVES = re.compile(r"\\u[dD][89a-fA-F]")


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
    readers = {"parquet": _parquet_rows, "json": _json_rows, "jsonl": _json_rows, "csv": _cell_rows}
    if file.format not in readers:
        raise ValueError(
            f"{file.path}: {file.format} holds no conversations or pairs; expected JSON, JSON lines, "
            "Parquet or CSV; convert the file or set `format` of the source"
        )
    with file.fetched():
        yield from readers[file.format](file)


def _cell_rows(file: SourceFile) -> Iterator[tuple[int, Any] | BadRow]:
    """Rows of CSV or TSV: objects where the first row has nothing but names, else lists of text."""
    csv.field_size_limit(MAX_ROW_BYTES)
    with open_text(file.path) as stream:
        lines = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="replace", newline="")
        first = lines.readline()
        delimiter = "\t" if first.count("\t") > first.count(",") else ","
        rows = csv.reader(chain([first], lines), delimiter=delimiter)
        header = next(rows, [])
        has_names = all(NAME.fullmatch(cell) for cell in header)
        if header and not has_names:
            yield 1, header
        for row in rows:
            yield rows.line_num, dict(zip(header, row, strict=False)) if has_names else row


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
        has_lines = is_lines(file)
        with open_text(file.path) if file.span is None else open_span(file) as stream:
            yield from _lines(stream, file.name) if has_lines else _document(stream, file.name)
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


def is_lines(file: SourceFile) -> bool:
    """Whether the first line that is not blank is a whole JSON value and another one follows, or the
    name says so: some projects call JSON lines `.json`."""
    if file.span is not None or ".jsonl" in file.path.name or ".ndjson" in file.path.name:
        return True
    with open_text(file.path) as stream:
        first, second = (
            *(line for line, _ in zip(_filled(stream), range(2), strict=False)),
            b"",
            b"",
        )[:2]
    return bool(second) and not isinstance(_parse(first), str)


def _filled(stream: IO[bytes]) -> Iterator[bytes]:
    return (line for line in bounded_lines(stream) if line.strip())


def bounded_lines(stream: IO[bytes]) -> Iterator[bytes]:
    """Every line; one above `MAX_ROW_BYTES` is passed over and comes as a line of one NUL."""
    while line := stream.readline(MAX_ROW_BYTES):
        if len(line) >= MAX_ROW_BYTES and not line.endswith(b"\n"):
            line = b"\0\n"
            skip_line(stream)
        yield line


def skip_line(stream: IO[bytes]) -> None:
    """Read on to the begin of the next line, however far that is."""
    while (line := stream.readline(WHOLE_BYTES)) and not line.endswith(b"\n"):
        pass


def text_template(field: str) -> Callable[[Mapping[str, Any]], str | None]:
    """How the text of a row is made: one field, or a template of several; None where one lacks."""
    if "{" not in field:
        return lambda row: _text_or_none(row.get(field))
    names = {name for _, name, _, _ in string.Formatter().parse(field) if name}

    def fill(row: Mapping[str, Any]) -> str | None:
        values = {name: _text_or_none(row.get(name)) for name in names}
        if any(value is None for value in values.values()):
            return None
        return re.sub(r"\{(\w+)\}", lambda match: str(values[match.group(1)]), field)

    return fill


def _text_or_none(value: object) -> str | None:
    if isinstance(value, str):
        return value
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def open_span(file: SourceFile) -> BinaryIO:
    """The bytes of a file's piece, of the whole file where it has none; not decompressed."""
    if file.span is None:
        return file.path.open("rb")
    return io.BufferedReader(_Span(file.path, *file.span))


class _Span(io.RawIOBase):
    """A piece of a file as a file of its own."""

    def __init__(self, path: Path, start: int, end: int) -> None:
        super().__init__()
        self._file = path.open("rb", buffering=0)
        self._start, self._size = start, end - start
        self.seek(0)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._file.tell() - self._start

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self.tell(), io.SEEK_END: self._size}[whence]
        return self._file.seek(self._start + origin + offset) - self._start

    def readinto(self, buffer: Any) -> int:
        room = max(0, min(len(buffer), self._size - self.tell()))
        return self._file.readinto(memoryview(buffer)[:room])

    def close(self) -> None:
        self._file.close()
        super().close()


def _lines(stream: IO[bytes], name: str) -> Iterator[tuple[int, Any] | BadRow]:
    for number, line in enumerate(bounded_lines(stream), start=1):
        if not line.strip():
            continue
        value = _parse(line)
        yield BadRow(name, number, value) if isinstance(value, str) else (number, value)


def _document(stream: IO[bytes], name: str) -> Iterator[tuple[int, Any] | BadRow]:
    """Rows of one JSON value: an array of rows, an object that holds one array, or a single row."""
    content = stream.read(WHOLE_BYTES)
    is_array = content.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["
    if len(content) == WHOLE_BYTES and not is_array:
        content += stream.read(MAX_ROW_BYTES)
    if not content.strip():
        return
    if len(content) == WHOLE_BYTES and is_array:
        yield from _numbered(ArrayItems(stream, content), name)
        return
    value = _parse(content)
    if not isinstance(value, str):
        yield from enumerate(_rows_of(value), start=1)
    elif is_array:
        yield from _numbered(ArrayItems(stream, content), name)
    else:
        yield BadRow(name, 1, value)


def _numbered(items: "ArrayItems", name: str) -> Iterator[tuple[int, Any] | BadRow]:
    for number, item in enumerate(items, start=1):
        yield BadRow(name, number, item.reason) if isinstance(item, BadItem) else (number, item)


@dataclass(frozen=True)
class BadItem:
    """What stands in an array where an item should be."""

    reason: str


class ArrayItems:
    """The items of a large or damaged JSON array; holds one of them and the piece read last.

    Behind something that is no JSON it goes on at the next object that follows one.
    """

    _NEXT = re.compile(r"\}\s*,\s*(?=\{)")
    _GAP = re.compile(r"[\s,]*")
    _RAW = re.compile("[\udc80-\udcff]")

    def __init__(self, stream: IO[bytes], begin: bytes) -> None:
        self._stream = stream
        # Bytes that are no UTF-8 become lone surrogates, which mark the item they are in.
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._text = self._decoder.decode(begin.removeprefix(codecs.BOM_UTF8)).lstrip()[1:]
        self._is_last = False

    def __iter__(self) -> "Iterator[Any | BadItem]":
        while self._advance():
            found = self._item()
            if found is None:
                if self._read_more():
                    continue
                if self._is_at_end():
                    return
                yield BadItem("is not JSON")
                self._resync()
            else:
                yield found

    def _advance(self) -> bool:
        """Pass over spaces and commas; whether something follows."""
        while True:
            gap = self._GAP.match(self._text)
            self._text = self._text[gap.end() :] if gap and gap.end() else self._text
            if self._text or not self._read_more():
                return bool(self._text)

    def _item(self) -> Any:
        """The item at hand; None when it is broken or not whole yet."""
        try:
            item, end = json.JSONDecoder().raw_decode(self._text)
            if _HAS_HALVES.search(self._text, 0, end):
                item = _without_halves(item)
        except (json.JSONDecodeError, RecursionError):
            return None
        if end == len(self._text) and not self._is_last:
            return None  # a number may go on
        is_raw = self._RAW.search(self._text, 0, end)
        self._text = self._text[end:]
        return BadItem("is not UTF-8") if is_raw or item is None else item

    def _read_more(self) -> bool:
        """Read as much again as is held, at least; whether there was more and room for it."""
        if self._is_last or len(self._text) > MAX_ROW_BYTES or self._text[:1] == "]":
            return False
        piece = self._stream.read(max(WHOLE_BYTES, len(self._text)))
        self._is_last = not piece
        self._text += self._decoder.decode(piece, self._is_last)
        return not self._is_last

    def _is_at_end(self) -> bool:
        return self._text[0] == "]" and not self._text[1:].strip()

    def _resync(self) -> None:
        while not (match := self._NEXT.search(self._text)):
            self._text = self._text[-64:]
            if self._is_last or not (piece := self._stream.read(WHOLE_BYTES)):
                self._text = ""
                return
            self._text += self._decoder.decode(piece)
        self._text = self._text[match.end() :]


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
        text = content.decode("utf-8-sig")
        value = json.loads(text)
        if _HAS_HALVES.search(text):
            value = _without_halves(value)
    except UnicodeDecodeError as error:
        return f"is not UTF-8 at byte {error.start}"
    except json.JSONDecodeError as error:
        return f"is not JSON: {error.msg} at character {error.pos + 1}"
    except RecursionError:
        return "is JSON nested too deeply"
    return "is bare text, not an object" if isinstance(value, str) else value


def _without_halves(value: Any) -> Any:
    match value:
        case str():
            return without_halves(value)
        case list():
            return [_without_halves(item) for item in cast("list[Any]", value)]
        case dict():
            return {k: _without_halves(v) for k, v in cast("dict[str, Any]", value).items()}
        case _:
            return value


def _parquet_rows(file: SourceFile) -> Iterator[tuple[int, Any] | BadRow]:
    import pyarrow.parquet as pq

    first = 1
    with pq.ParquetFile(file.path) as table:
        for group in range(*(file.span or (0, table.num_row_groups))):
            # A damaged footer may promise any number of rows.
            rows = min(table.metadata.row_group(group).num_rows, 1000 * file.size)
            yield from _row_group(table, group, range(first, first + rows), file.name)
            first += rows


def _row_group(
    table: Any, group: int, numbers: range, name: str
) -> Iterator[tuple[int, Any] | BadRow]:
    import pyarrow as pa

    done = 0
    try:
        for batch in table.iter_batches(batch_size=PARQUET_BATCH_ROWS, row_groups=[group]):
            for row in _batch_rows(batch):
                number = numbers.start + done
                done += 1
                yield BadRow(name, number, row) if isinstance(row, str) else (number, row)
    except (pa.ArrowException, ValueError, OSError, MemoryError, OverflowError) as error:
        for number in numbers[done:]:
            yield BadRow(name, number, f"is in a damaged row group: {type(error).__name__}")


def _batch_rows(batch: Any) -> list[Any]:
    """Rows as dicts; text says why one is none."""
    import pyarrow as pa

    try:
        return batch.to_pylist()
    except (ValueError, OverflowError, pa.ArrowException):
        if batch.num_rows == 1:
            return ["is not UTF-8"]
    return [row for i in range(batch.num_rows) for row in _batch_rows(batch.slice(i, 1))]
