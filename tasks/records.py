"""Raw files to raw records: crawls, pages, JSON, tables, text. A bad record is a refusal, not an end.

Damage costs the record it hits; damage to a compressed stream costs what lies behind it in the file,
and is a refusal of its own.
"""

import csv
import io
import lzma
import re
import tarfile
import zlib
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal

from storage.source import SourceFile
from tasks.archives import archive_records, wat_records
from tasks.charset import decode
from tasks.raw_record import RawRecord, Refusal, UrlRule
from tasks.rows import BadRow, open_text, read_rows, text_template

TextDocuments = Literal["blank_line", "file", "line"]

MAX_CSV_CHARS = 1 << 28
MAX_TEXT_CHARS = 1 << 28
"""More of one text is not read; the setting `max_record_chars` refuses it."""
MOST_UNFOLDING = 100
"""A compressed file that unfolds more than so many times is no text; text unfolds 3 to 20 times."""
_HTML_NAMES = re.compile(r"\.x?html?$", re.IGNORECASE)
_TAR_NAME = re.compile(r"\.(tar(\.\w+)?|tgz)$", re.IGNORECASE)


def read_records(
    file: SourceFile, *, text_documents: TextDocuments, url_reason: UrlRule, max_page_bytes: int
) -> Iterator[RawRecord | Refusal]:
    """Every record of a file, in order; what cannot be read comes as a refusal.

    `url_reason` says for an address why it is refused, before its record is read. Pages above
    `max_page_bytes` come cut off one byte behind it. Raises OSError where the file cannot be opened.
    """
    with file.fetched():
        yield from _until_damage(_records(file, text_documents, url_reason, max_page_bytes))


def _records(
    file: SourceFile, text_documents: TextDocuments, url_reason: UrlRule, max_page_bytes: int
) -> Iterator[RawRecord | Refusal]:
    match file.format:
        case "warc":
            return archive_records(file, url_reason, max_page_bytes)
        case "wat":
            return wat_records(file, url_reason)
        case "html":
            return _pages(file, max_page_bytes)
        case "jsonl" | "json" | "parquet":
            return _rows(read_rows(file), file.spec.text, url_reason)
        case "csv":
            return _rows(_csv_rows(file.path), file.spec.text, url_reason)
        case "text" | "markdown" | "latex" | "code":
            whole = text_documents if file.format == "text" else "file"
            return (RawRecord(text=text) for text in _texts(file.path, whole))
        case _:
            raise ValueError(
                f"{file.name}: {file.format} is no layout of raw text; expected warc, wat, html, "
                "jsonl, json, parquet, csv, text, markdown, latex or code; set `format` of the source"
            )


def _until_damage(records: Iterator[RawRecord | Refusal]) -> Iterator[RawRecord | Refusal]:
    """The records up to the place where a file cannot be read any further, which is told."""
    import zstandard
    from pyarrow import ArrowException

    # ValueError: damaged rows files (tasks.rows) and Arrow; EOFError, OSError: gzip and the disk.
    streams = (EOFError, OSError, zlib.error, lzma.LZMAError, zstandard.ZstdError, tarfile.TarError)
    damage = (ValueError, OverflowError, MemoryError, ArrowException, csv.Error, *streams)
    while True:
        try:
            record = next(records)
        except StopIteration:
            return
        except FileNotFoundError:
            raise
        except damage as error:
            yield Refusal("", f"damaged_file:{type(error).__name__}")
            return
        yield record


# Pages in files


def _pages(file: SourceFile, max_page_bytes: int) -> Iterator[RawRecord]:
    if not _TAR_NAME.search(file.name.removesuffix(".zst").removesuffix(".gz")):
        with open_text(file.path) as stream:
            yield RawRecord(page=stream.read(max_page_bytes + 1))
        return
    with open_text(file.path) as stream, tarfile.open(fileobj=stream, mode="r|*") as archive:
        for member in archive:
            content = archive.extractfile(member) if member.isfile() else None
            if content is not None and _HTML_NAMES.search(member.name):
                yield RawRecord(member.name, page=content.read(max_page_bytes + 1))


# Rows


def _rows(
    rows: Iterable[tuple[int, Any] | BadRow], field: str, url_reason: UrlRule
) -> Iterator[RawRecord | Refusal]:
    text_of = text_template(field)
    for row in rows:
        if isinstance(row, BadRow):
            yield Refusal("", f"bad_record:{row.reason.split(' at ')[0].split(':')[0]}")
            continue
        fields: Mapping[str, Any] = row[1] if isinstance(row[1], dict) else {}
        url = fields.get("url")
        url = url if isinstance(url, str) else ""
        if url and (reason := url_reason(url)):
            yield Refusal(url, reason)
            continue
        text = text_of(fields)
        yield Refusal(url, "no_text") if text is None else RawRecord(url, text=text)


def _csv_rows(path: Path) -> Iterator[tuple[int, Any] | BadRow]:
    csv.field_size_limit(MAX_CSV_CHARS)
    with _text_stream(path) as stream:
        sample = stream.readline()
        delimiter = "\t" if sample.count("\t") > sample.count(",") else ","
        header = next(csv.reader([sample], delimiter=delimiter), [])
        rows = csv.DictReader(stream, fieldnames=header, delimiter=delimiter)
        yield from enumerate(rows, start=2)


# Text


def _texts(path: Path, documents: TextDocuments) -> Iterator[str]:
    with _text_stream(path) as stream:
        match documents:
            case "file":
                yield stream.read(MAX_TEXT_CHARS)
            case "line":
                yield from (line for line in _lines(stream) if line.strip())
            case "blank_line":
                yield from _paragraph_blocks(_lines(stream))


def _lines(stream: IO[str]) -> Iterator[str]:
    """Lines; a longer one than a text may be comes in pieces, which are refused."""
    return iter(lambda: stream.readline(MAX_TEXT_CHARS), "")


def _paragraph_blocks(lines: Iterable[str]) -> Iterator[str]:
    block: list[str] = []
    size = 0
    for line in lines:
        if line.strip():
            block.append(line)
            size += len(line)
        # One that is longer than a text may be comes in pieces, too.
        if block and (size > MAX_TEXT_CHARS or not line.strip()):
            yield "".join(block)
            block, size = [], 0
    if block:
        yield "".join(block)


@contextmanager
def _text_stream(path: Path) -> Generator[IO[str]]:
    """The lines of a file: UTF-8 as a stream; in another character set, as a whole."""
    with open_text(path) as stream:
        head = stream.read(1 << 16)
    with open_text(path) as stream:
        if _begins_as_utf8(head):
            yield io.TextIOWrapper(stream, "utf-8-sig", errors="replace", newline=None)
        else:
            most = max(MAX_TEXT_CHARS, MOST_UNFOLDING * path.stat().st_size)
            content = stream.read(most + 1)
            if len(content) > most:
                raise ValueError(
                    f"{path.name} unfolds to more than {most} bytes in no known coding"
                )
            yield io.StringIO(decode(content), newline=None)


def _begins_as_utf8(head: bytes) -> bool:
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        # The piece may end within a character.
        return error.start > len(head) - 4 and error.end == len(head)
    return True
