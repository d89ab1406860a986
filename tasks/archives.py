"""Archives of crawls: WARC, WET and WAT, and the older ARC; plain or compressed record by record."""

import json
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any, cast

from storage.source import SourceFile
from tasks.charset import decode
from tasks.http_body import CodingError, decoded_body
from tasks.raw_record import RawRecord, Refusal, UrlRule
from tasks.rows import MAX_ROW_BYTES, open_span, open_text, text_template

MAX_RESYNCS = 1000
"""Damaged places of one archive after which the rest of it is given up, and that told."""
_HTML_TYPES = ("text/html", "application/xhtml+xml")
_RECORD_START = re.compile(rb"\r\n\r\nWARC/1\.[01]\r\nWARC-")
_MEMBER_STARTS = {True: b"\x1f\x8b\x08", False: b"WARC/1."}
_ARC_HEAD = re.compile(rb"(\S+) [\d.:a-f]+ \d{14} (\S+)(?: .*)? (\d+)\r?\n", re.IGNORECASE)
"""Address, type and length of an ARC record; version 2 has further fields between the two."""
_ARC_HEAD_BYTES = 1 << 16
_BLANK_LINE = re.compile(rb"\r?\n\r?\n")


def archive_records(
    file: SourceFile, url_reason: UrlRule, max_page_bytes: int
) -> Iterator[RawRecord | Refusal]:
    """The pages and texts of a WARC, WET or ARC archive, and what it holds instead."""
    with open_text(file.path) if file.span is None else open_span(file) as stream:
        is_arc = _begins_arc(stream)
    if is_arc:
        return _arc_records(file, url_reason, max_page_bytes)
    return _warc_records(file, url_reason, max_page_bytes)


def _begins_arc(stream: IO[bytes]) -> bool:
    try:
        return stream.read(11) == b"filedesc://"
    except (OSError, EOFError, zlib.error):
        return False


# WARC


def _warc_records(
    file: SourceFile, url_reason: UrlRule, max_page_bytes: int
) -> Iterator[RawRecord | Refusal]:
    from fastwarc.warc import ArchiveIterator

    start, told = 0, -1
    for _ in range(MAX_RESYNCS):
        position, count, record = start, 0, None
        with open_span(file) as stream:
            stream.seek(start)
            records = cast("Iterator[Any]", iter(ArchiveIterator(stream, parse_http=True)))
            while True:
                record = None
                try:
                    record = next(records)
                    count += 1
                    position = int(record.stream_pos)  # counted from the begin of the stream
                    found = _warc_record(record, url_reason, max_page_bytes)
                except StopIteration:
                    if _is_cut_off(file, position):
                        yield Refusal("", "damaged_record:cut_off")
                    return
                except (OSError, ValueError, EOFError) as error:
                    # An archive is a row of members: reading goes on at the next one. That may be the
                    # damaged one, which has been told of then.
                    if count or start != told:
                        yield Refusal("", f"damaged_record:{type(error).__name__}")
                    break
                if found is not None:
                    yield found
        following = _next_member(file, position + 1)
        if following is None:
            return
        start, told = following, following if count and record is None else -1
    yield Refusal("", "damaged_file:too_many_places")


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
    answer = Answer(url, *_content_type(record))
    return document_of(answer, lambda: _body(record, max_page_bytes), url_reason, max_page_bytes)


@dataclass(frozen=True)
class Answer:
    """What a server's answer says of itself."""

    url: str
    content_type: str
    charset: str | None
    status: int | None


def document_of(
    answer: Answer, read: Callable[[], bytes], url_reason: UrlRule, max_page_bytes: int
) -> RawRecord | Refusal:
    """The page or text of an answer, whose body is read only where the rest allows it."""
    url = answer.url
    if answer.status is not None and answer.status != 200:
        return Refusal(url, f"status:{answer.status}")
    is_page = answer.content_type in _HTML_TYPES
    if not is_page and answer.content_type != "text/plain":
        return Refusal(url, f"type:{answer.content_type or 'none'}"[:60])
    if reason := url_reason(url):
        return Refusal(url, reason)
    try:
        content = read()
    except CodingError:
        return Refusal(url, "coding")
    if is_page:
        return RawRecord(url, page=content, charset=answer.charset)
    if len(content) > max_page_bytes:
        return Refusal(url, "large")
    return RawRecord(url, text=decode(content, answer.charset))


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


# ARC


def _arc_records(
    file: SourceFile, url_reason: UrlRule, max_page_bytes: int
) -> Iterator[RawRecord | Refusal]:
    """Pages and texts of an ARC archive. Behind a head that is none, it goes on at the next one."""
    with open_text(file.path) as stream:
        is_lost = False
        while line := stream.readline(_ARC_HEAD_BYTES):
            head = _ARC_HEAD.fullmatch(line)
            if head is None:
                # Each record ends with an empty line.
                if line.strip() and not is_lost:
                    is_lost = True
                    yield Refusal("", "damaged_record:no head")
                continue
            is_lost = False
            length = int(head[3])
            content = stream.read(min(length, max_page_bytes + _ARC_HEAD_BYTES))
            _pass_over(stream, length - len(content))
            url = head[1].decode("utf-8", "replace")
            if url.startswith(("http://", "https://")):
                yield _arc_record(url, content, url_reason, max_page_bytes)


def _pass_over(stream: IO[bytes], count: int) -> None:
    while count > 0 and (piece := stream.read(min(count, 1 << 20))):
        count -= len(piece)


def _arc_record(
    url: str, content: bytes, url_reason: UrlRule, max_page_bytes: int
) -> RawRecord | Refusal:
    blank = _BLANK_LINE.search(content)
    head, start = (content[: blank.start()], blank.end()) if blank else (content, len(content))
    status_line, *lines = head.decode("latin-1").splitlines() or [""]
    fields = (line.partition(":") for line in lines)
    headers = {name.strip().lower(): value.strip() for name, _, value in fields}
    status = re.match(r"HTTP/\S+ (\d{3})", status_line)
    if status is None:
        return Refusal(url, "bad_record:no status")
    content_type, _, parameters = headers.get("content-type", "").partition(";")
    charset = re.search(r"charset=[\"']?([\w.:-]+)", parameters, re.IGNORECASE)
    answer = Answer(
        url, content_type.strip().lower(), charset[1] if charset else None, int(status[1])
    )
    lowered = {name: value.lower() for name, value in headers.items()}
    return document_of(
        answer,
        lambda: decoded_body(content[start:], lowered, max_page_bytes)[: max_page_bytes + 1],
        url_reason,
        max_page_bytes,
    )


# Metadata of crawls


def wat_records(file: SourceFile, url_reason: UrlRule) -> Iterator[RawRecord | Refusal]:
    """One record per HTML response: its `title`, `description`, `keywords` and `url` as fields.

    The text is made of them by the source's template; where that names none of them (the default is
    the field `text`), it is title and description.
    """
    from fastwarc.warc import ArchiveIterator

    text_of = text_template(file.spec.text)
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
