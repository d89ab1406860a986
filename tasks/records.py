"""Raw files to raw records: crawls, pages, JSON, tables, text. A bad record is a refusal, not an end.

Damage costs the record it hits; damage to a compressed stream costs what lies behind it in the file,
and is a refusal of its own.
"""

import csv
import io
import json
import lzma
import re
import string
import tarfile
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, cast

from storage.source import SourceFile
from tasks.charset import decode
from tasks.http_body import CodingError, decoded_body
from tasks.rows import MAX_ROW_BYTES, BadRow, open_span, open_text, read_rows

TextDocuments = Literal["blank_line", "file", "line"]
UrlRule = Callable[[str], str | None]

MAX_RESYNCS = 1000
"""Damaged places of one archive after which the rest of it is given up."""
MAX_CSV_CHARS = 1 << 28
MAX_TEXT_CHARS = 1 << 28
"""More of one text is not read; the setting `max_record_chars` refuses it."""
_MAX_PAGE_BYTES = 1 << 28
_HTML_TYPES = ("text/html", "application/xhtml+xml")
_HTML_NAMES = re.compile(r"\.x?html?$", re.IGNORECASE)
_TAR_NAME = re.compile(r"\.(tar(\.\w+)?|tgz)$", re.IGNORECASE)
_RECORD_START = re.compile(rb"\r\n\r\nWARC/1\.[01]\r\nWARC-")
_MEMBER_STARTS = {True: b"\x1f\x8b\x08", False: b"WARC/1."}


@dataclass(frozen=True)
class RawRecord:
    """A page (bytes and the charset of its HTTP header) or a text."""

    url: str = ""
    page: bytes | None = None
    charset: str | None = None
    text: str | None = None


@dataclass(frozen=True)
class Refusal:
    """A record that is not read, and why."""

    url: str
    reason: str
    """`damaged_file`, `bad_record`, `no_text`, `blocked`, `url_word`, ...; detail after a colon."""


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
            return _warc_records(file, url_reason, max_page_bytes)
        case "wat":
            return _wat_records(file, url_reason)
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


# Crawls


def _warc_records(
    file: SourceFile, url_reason: UrlRule, max_page_bytes: int
) -> Iterator[RawRecord | Refusal]:
    from fastwarc.warc import ArchiveIterator

    start = 0
    for _ in range(MAX_RESYNCS):
        position = start
        with open_span(file) as stream:
            stream.seek(start)
            records = cast("Iterator[Any]", iter(ArchiveIterator(stream, parse_http=True)))
            while True:
                try:
                    record = next(records)
                    position = int(record.stream_pos)  # counted from the begin of the stream
                    found = _warc_record(record, url_reason, max_page_bytes)
                except StopIteration:
                    if _is_cut_off(file, position):
                        yield Refusal("", "damaged_record:cut_off")
                    return
                except (OSError, ValueError, EOFError) as error:
                    # An archive is a row of members: reading goes on at the next one.
                    yield Refusal("", f"damaged_record:{type(error).__name__}")
                    break
                if found is not None:
                    yield found
        following = _next_member(file, position + 1)
        if following is None:
            return
        start = following


def _is_cut_off(file: SourceFile, start: int) -> bool:
    """Whether a compressed archive does not end with the member at `start`, the last one read.

    The reader takes a member's end, or a head that is too short, for the end of the archive.
    """
    engine = zlib.decompressobj(31)
    with open_span(file) as stream:
        stream.seek(start)
        piece = stream.read(1 << 20)
        if file.path.suffix != ".gz" or not piece:
            return False
        try:
            while piece and not engine.eof:
                engine.decompress(piece, 1 << 20)
                piece = engine.unconsumed_tail or stream.read(1 << 20)
        except zlib.error:
            return True
        return not engine.eof or bool((engine.unused_data + stream.read(64)).strip(b"\0"))


def _next_member(file: SourceFile, start: int) -> int | None:
    """Where the next member or record of a damaged archive begins, searched from `start`."""
    with open_span(file) as stream:
        # The name counts as well: the first member may be the damaged one.
        mark = _MEMBER_STARTS[stream.read(2) == b"\x1f\x8b" or file.path.suffix == ".gz"]
        stream.seek(start)
        position, tail = start, b""
        while chunk := stream.read(1 << 20):
            found = (tail + chunk).find(mark)
            if found >= 0:
                return position - len(tail) + found
            position += len(chunk)
            tail = (tail + chunk)[-len(mark) + 1 :]
    return None


def _warc_record(
    record: Any, url_reason: UrlRule, max_page_bytes: int
) -> RawRecord | Refusal | None:
    """A page or text; None for what is no document by its kind (requests, metadata, images)."""
    from fastwarc.warc import WarcRecordType

    kinds = (WarcRecordType.response, WarcRecordType.resource, WarcRecordType.conversion)
    if record.record_type in (WarcRecordType.no_type, WarcRecordType.unknown):
        return Refusal("", "bad_record:no known WARC-Type")
    if record.record_type not in kinds:
        return None
    url = str(record.headers.get("WARC-Target-URI") or "").strip("<> ")
    content_type, charset, status = _content_type(record)
    if status is not None and status != 200:
        return Refusal(url, f"status:{status}")
    is_page = content_type in _HTML_TYPES
    if not is_page and content_type != "text/plain":
        return Refusal(url, f"type:{content_type or 'none'}"[:60])
    if reason := url_reason(url):
        return Refusal(url, reason)
    try:
        content = _body(record, max_page_bytes)
    except CodingError:
        return Refusal(url, "coding")
    if is_page:
        return RawRecord(url, page=content, charset=charset)
    if len(content) > max_page_bytes:
        return Refusal(url, "large")
    return RawRecord(url, text=decode(content, charset))


def _body(record: Any, max_page_bytes: int) -> bytes:
    promised = int(record.content_length)
    content = record.reader.read(max_page_bytes + 1)
    if len(content) < min(promised, max_page_bytes + 1):
        raise ValueError("the record is cut off")
    if _RECORD_START.search(content):
        raise ValueError("the record's length is wrong: it holds the records behind it")
    if not record.is_http or record.http_headers is None:
        return content
    headers = {str(name).lower(): str(value).lower() for name, value in record.http_headers}
    return decoded_body(content, headers, max_page_bytes)


def _content_type(record: Any) -> tuple[str, str | None, int | None]:
    if not record.is_http:
        declared = str(record.headers.get("Content-Type") or "")
        return declared.split(";")[0].strip().lower(), None, None
    declared = str(record.http_content_type or "")
    status = record.http_headers.status_code if record.http_headers is not None else None
    charset = str(record.http_charset) if record.http_charset else None
    return declared.split(";")[0].strip().lower(), charset, status


# Metadata of crawls


def _wat_records(file: SourceFile, url_reason: UrlRule) -> Iterator[RawRecord | Refusal]:
    """One record per HTML response: its `title`, `description`, `keywords` and `url` as fields.

    The text is made of them by the source's template; where that names none of them (the default is
    the field `text`), it is title and description.
    """
    from fastwarc.warc import ArchiveIterator

    text_of = _template(file.spec.text)
    with open_span(file) as stream:
        for record in cast("Iterator[Any]", iter(ArchiveIterator(stream))):
            if not str(record.headers.get("Content-Type") or "").startswith("application/json"):
                continue
            url = str(record.headers.get("WARC-Target-URI") or "").strip("<> ")
            if reason := url_reason(url):
                yield Refusal(url, reason)
                continue
            try:
                fields = _wat_fields(json.loads(record.reader.read(MAX_ROW_BYTES)))
            except (ValueError, RecursionError):
                yield Refusal(url, "bad_record:is not JSON")
                continue
            if fields is not None:
                text = text_of({**fields, "url": url})
                yield Refusal(url, "no_text") if not text else RawRecord(url, text=text)


def _wat_fields(value: object) -> dict[str, str] | None:
    """Fields of a page's metadata; None for what is no page (requests, images, the crawl itself)."""
    for name in ("Envelope", "Payload-Metadata", "HTTP-Response-Metadata", "HTML-Metadata", "Head"):
        if not isinstance(value, dict) or name not in value:
            return None
        value = cast("dict[str, Any]", value)[name]
    head = cast("dict[str, Any]", value) if isinstance(value, dict) else {}
    fields = {"title": str(head.get("Title") or "")}
    metas = head.get("Metas")
    for meta in cast("list[Any]", metas) if isinstance(metas, list) else []:
        named = cast("dict[str, Any]", meta) if isinstance(meta, dict) else {}
        name = str(named.get("name") or named.get("property") or "").lower().removeprefix("og:")
        if name in ("description", "keywords") and named.get("content"):
            fields.setdefault(name, str(named["content"]))
    described = "\n".join(filter(None, (fields["title"], fields.get("description", ""))))
    return {"description": "", "keywords": "", **fields, "text": described}


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
    text_of = _template(field)
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


def _template(field: str) -> Callable[[Mapping[str, Any]], str | None]:
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
    for line in lines:
        if line.strip():
            block.append(line)
        elif block:
            yield "".join(block)
            block = []
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
            yield io.StringIO(decode(stream.read()), newline=None)


def _begins_as_utf8(head: bytes) -> bool:
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        # The piece may end within a character.
        return error.start > len(head) - 4 and error.end == len(head)
    return True
