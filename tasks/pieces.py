"""Where a large file may be cut: pieces that are read apart, so that all cores and a resume serve it.

A piece is told by its content: a file that others were appended to keeps its earlier pieces.
"""

import itertools
import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import xxhash

from storage.source import COMPRESSIONS, SourceFile
from tasks.fanout import PartItem, fan_out
from tasks.rows import is_lines, open_span, skip_line
from tasks.stage import Job

PIECES = "pieces.json"
"""Start and end of each piece (bytes; of Parquet, row groups), its size in bytes and its digest."""
READ_BYTES = 1 << 20
_WARC_START = b"\r\n\r\nWARC/1."
_GZIP_START = b"\x1f\x8b\x08"
_HEAD_BYTES = 1 << 12


def cut(job: Job, files: Sequence[SourceFile], piece_bytes: int) -> list[SourceFile]:
    """The files in order, each large one as its pieces. Where to cut one is found once."""
    large = [file for file in files if _is_large(file, piece_bytes)]
    items = [
        PartItem(
            {"file": [file.digest, file.format], "bytes": piece_bytes},
            (file, piece_bytes),
            f"pieces of {file.name}",
        )
        for file in large
    ]
    parts = fan_out(job, build_pieces, items) if items else []
    pieces = {
        file.key: json.loads((part.files / PIECES).read_text("utf-8"))
        for file, part in zip(large, parts, strict=True)
    }
    return [piece for file in files for piece in _pieces_of(file, pieces.get(file.key, []))]


def build_pieces(files: Path, file: SourceFile, piece_bytes: int) -> dict[str, Any]:
    """Write `pieces.json`: pieces of at least `piece_bytes`, the last one excepted."""
    files.mkdir(parents=True, exist_ok=True)
    with file.fetched():
        pieces = (
            _row_groups(file, piece_bytes)
            if file.format == "parquet"
            else [
                [start, end, end - start, _digest(replace(file, span=(start, end)))]
                for start, end in itertools.pairwise(_bounds(file, piece_bytes))
            ]
        )
    (files / PIECES).write_text(json.dumps(pieces), "utf-8")
    return {"pieces": len(pieces)}


def _is_large(file: SourceFile, piece_bytes: int) -> bool:
    """Whether a file is to be cut. What is compressed as a whole can only be read from its begin."""
    compression = file.path.suffix.removeprefix(".")
    is_plain = compression not in COMPRESSIONS
    can_cut = {
        "jsonl": is_plain,
        "parquet": True,
        "warc": is_plain or compression == "gz",
        "wat": is_plain or compression == "gz",
    }
    return file.size > piece_bytes and can_cut.get(file.format, False)


def _pieces_of(file: SourceFile, pieces: Sequence[tuple[int, int, int, str]]) -> list[SourceFile]:
    if len(pieces) < 2:
        return [file]
    return [
        replace(file, digest=digest, size=size, span=(start, end))
        for start, end, size, digest in pieces
    ]


def _row_groups(file: SourceFile, piece_bytes: int) -> list[list[Any]]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(file.path) as table:
        sizes = [
            sum(group.column(column).total_compressed_size for column in range(group.num_columns))
            for group in map(table.metadata.row_group, range(table.num_row_groups))
        ]
    pieces: list[list[Any]] = []
    start = 0
    for end in range(1, len(sizes) + 1):
        held = sum(sizes[start:end])
        if held >= piece_bytes or end == len(sizes):
            digest = xxhash.xxh3_128_hexdigest(f"{file.digest}:{start}:{end}".encode())
            pieces.append([start, end, held, digest])
            start = end
    return pieces


def _bounds(file: SourceFile, piece_bytes: int) -> list[int]:
    """Begin of each piece, and the file's end."""
    following = _next_line if file.format == "jsonl" else _next_record
    if file.format == "jsonl" and not is_lines(file):
        return [0, file.size]
    bounds = [0]
    while (wanted := bounds[-1] + piece_bytes) < file.size:
        bounds.append(min(following(file, wanted), file.size))
    return bounds if bounds[-1] == file.size else [*bounds, file.size]


def _next_line(file: SourceFile, position: int) -> int:
    """Where the first line begins at or behind a position."""
    with file.path.open("rb") as stream:
        stream.seek(position - 1)
        skip_line(stream)
        return stream.tell()


def _next_record(file: SourceFile, position: int) -> int:
    """Where the first record of an archive begins at or behind a position; else the file's end."""
    if file.path.suffix == ".gz":
        return _search(file, position, _GZIP_START, _begins_record)
    found = _search(file, position - len(b"\r\n\r\n"), _WARC_START)
    return min(found + len(b"\r\n\r\n"), file.size)


def _begins_record(head: bytes) -> bool:
    """Whether compressed bytes are the begin of a record; its mark may also stand within one."""
    try:
        return zlib.decompressobj(31).decompress(head, 16).startswith(b"WARC/1.")
    except zlib.error:
        return False


def _search(
    file: SourceFile,
    position: int,
    mark: bytes,
    is_wanted: Callable[[bytes], bool] = lambda head: True,
) -> int:
    """Where a mark first stands at or behind a position, with a wanted head; else the file's end."""
    with file.path.open("rb") as stream:
        stream.seek(position)
        held = b""
        while chunk := stream.read(READ_BYTES):
            held += chunk
            found = held.find(mark)
            while found >= 0:
                here = stream.tell()
                stream.seek(position + found)
                if is_wanted(stream.read(_HEAD_BYTES)):
                    return position + found
                stream.seek(here)
                found = held.find(mark, found + 1)
            position += max(0, len(held) - len(mark) + 1)
            held = held[-len(mark) + 1 :]
    return file.size


def _digest(file: SourceFile) -> str:
    digest = xxhash.xxh3_128()
    with open_span(file) as stream:
        while chunk := stream.read(READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
