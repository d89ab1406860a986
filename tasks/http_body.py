"""The body of a stored HTTP response without its transfer and content codings.

Most crawlers store bodies decoded but leave the headers that told the coding, so a coding is undone
only where the bytes have it.
"""

import re
import zlib

_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,8})[ \t]*(?:;[^\r\n]*)?\r?\n")
_GZIP = b"\x1f\x8b"


class CodingError(ValueError):
    """A body that cannot be decoded at all."""


def decoded_body(body: bytes, headers: dict[str, str], max_bytes: int) -> bytes:
    """The body as the browser sees it, at most `max_bytes` + 1 bytes of it (a bomb is cut off).

    `headers` has lower-case names. Raises CodingError for a coding that is broken from the start or
    not known (`br` without chunks is left to look like noise).
    """
    if "chunked" in headers.get("transfer-encoding", ""):
        body = _without_chunks(body)
    coding = headers.get("content-encoding", "")
    if body.startswith(_GZIP) and ("gzip" in coding or "gzip" in headers.get("content-type", "")):
        return _inflated(body, 31, max_bytes)
    if "deflate" in coding and body.lstrip()[:1] != b"<":
        return _inflated(body, 15 if body[:1] == b"\x78" else -15, max_bytes)
    return body


def _without_chunks(body: bytes) -> bytes:
    """The chunks joined; the body as it is when it does not begin with the size of a chunk.

    A chunk whose size is wrong is taken as far as there are bytes, what follows it as it is.
    """
    pieces: list[bytes] = []
    position = 0
    while match := _CHUNK.match(body, position):
        size = int(match.group(1), 16)
        if size == 0:
            return b"".join(pieces)
        position = match.end() + size
        pieces.append(body[match.end() : position])
        position += 2 if body[position : position + 2] == b"\r\n" else 1
    return b"".join([*pieces, body[position:]])


def _inflated(body: bytes, window_bits: int, max_bytes: int) -> bytes:
    engine = zlib.decompressobj(window_bits)
    found = bytearray()
    position = 0
    while position < len(body) and len(found) <= max_bytes and not engine.eof:
        piece = engine.unconsumed_tail or body[position : position + (1 << 16)]
        position += 0 if engine.unconsumed_tail else len(piece)
        try:
            found += engine.decompress(piece, max_bytes + 1 - len(found))
        except zlib.error as error:
            if found:
                break  # a body that was cut off or damaged later on keeps its beginning
            raise CodingError(f"content coding is broken: {error}") from error
    return bytes(found)
