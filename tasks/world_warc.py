"""WARC 1.1 records in gzip members whose bytes depend on nothing but their content."""

import base64
import hashlib
import struct
import uuid
import zlib

DATE = "2024-03-01T00:00:00Z"
GZIP_HEADER = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff"
STORED_BLOCK_BYTES = 0xFFFF


def gzip_member(content: bytes) -> bytes:
    """One gzip member of stored blocks.

    Not compressed: what a compressor writes depends on its version (zlib, zlib-ng), and the same seed
    must give the same bytes on every machine.
    """
    blocks: list[bytes] = []
    for start in range(0, max(1, len(content)), STORED_BLOCK_BYTES):
        block = content[start : start + STORED_BLOCK_BYTES]
        is_last = start + STORED_BLOCK_BYTES >= len(content)
        blocks += [struct.pack("<BHH", is_last, len(block), len(block) ^ 0xFFFF), block]
    trailer = struct.pack("<II", zlib.crc32(content), len(content) & 0xFFFFFFFF)
    return b"".join([GZIP_HEADER, *blocks, trailer])


def warcinfo(name: str) -> bytes:
    """The record that opens a file."""
    body = b"software: bessemer demo world\r\nformat: WARC File Format 1.1\r\n"
    return _record("warcinfo", name, "application/warc-fields", body, extra={"WARC-Filename": name})


def response(
    url: str, payload: bytes, *, content_type: str, status: str = "200 OK", headers: str = ""
) -> bytes:
    """An HTTP exchange as a crawler stores it."""
    head = (
        f"HTTP/1.1 {status}\r\nServer: httpd\r\nContent-Type: {content_type}\r\n"
        f"{headers}Content-Length: {len(payload)}\r\n\r\n"
    )
    digest = base64.b32encode(hashlib.sha1(payload, usedforsecurity=False).digest()).decode()
    return _record(
        "response",
        url,
        "application/http; msgtype=response",
        head.encode() + payload,
        extra={"WARC-Target-URI": url, "WARC-Payload-Digest": f"sha1:{digest}"},
    )


def request(url: str) -> bytes:
    """What the crawler asked; a reader passes over it."""
    body = f"GET {url} HTTP/1.1\r\nUser-Agent: demo\r\n\r\n".encode()
    kind = "application/http; msgtype=request"
    return _record("request", url, kind, body, extra={"WARC-Target-URI": url})


def _record(
    kind: str, name: str, content_type: str, body: bytes, *, extra: dict[str, str]
) -> bytes:
    fields = {
        "WARC-Type": kind,
        "WARC-Record-ID": f"<urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, f'{kind} {name}')}>",
        "WARC-Date": DATE,
        **extra,
        "Content-Type": content_type,
        "Content-Length": str(len(body)),
    }
    head = "WARC/1.1\r\n" + "".join(f"{key}: {value}\r\n" for key, value in fields.items())
    return gzip_member(head.encode() + b"\r\n" + body + b"\r\n\r\n")
