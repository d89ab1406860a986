"""Two hundred damaged crawls, tables and tars: the run ends, what is bad is told, the rest is there."""

import gzip
import io
import json
import random
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conf.extract import ExtractConfig, PageConfig
from storage.corpus import Corpus
from storage.identity import hash_file
from storage.store_local import read_record
from tasks.extract import extract
from tests.tasks.corpus_runs import run_stage, spec, texts

RECORDS = 4
FILES = 200
Damage = Callable[[random.Random, bytes], bytes]


def text(file: int, number: int) -> str:
    # Every record says something of its own, in one of two languages.
    if number % 2:
        return f"第{file}号文件的第{number}个故事：狐狸住在山洞里，每天早上吃蜂蜜，中午睡觉。"
    return f"Story {number} of file {file}: the fox lives in the cave and eats honey every day."


def page(body: str) -> bytes:
    return f"<html><body><main><p>{body}</p></main></body></html>".encode()


def record(body: bytes, length: int | None = None) -> bytes:
    http = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n" + body
    head = (
        "WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: http://a.example/\r\n"
        "WARC-Date: 2020-01-01T00:00:00Z\r\nWARC-Record-ID: <urn:uuid:1>\r\n"
        f"Content-Type: application/http; msgtype=response\r\n"
        f"Content-Length: {len(http) if length is None else length}\r\n\r\n"
    )
    return head.encode() + http + b"\r\n\r\n"


# Damage to the bytes of one record


def flipped(rng: random.Random, content: bytes) -> bytes:
    damaged = bytearray(content)
    for _ in range(8):
        damaged[rng.randrange(len(damaged))] ^= rng.randrange(1, 256)
    return bytes(damaged)


def cut(rng: random.Random, content: bytes) -> bytes:
    return content[: rng.randrange(1, len(content))]


def stuffed(rng: random.Random, content: bytes) -> bytes:
    at = rng.randrange(len(content))
    return content[:at] + rng.randbytes(300) + content[at:]


def zeroed(rng: random.Random, content: bytes) -> bytes:
    at = rng.randrange(len(content))
    return content[:at] + bytes(len(content) - at)


DAMAGES: Sequence[Damage] = (flipped, cut, stuffed, zeroed)
BODIES: Sequence[Damage] = (
    lambda rng, body: bytes(30_000_000),  # a bomb, once compressed
    lambda rng, body: b"<div>" * 40_000,
    lambda rng, body: rng.randbytes(5_000),
    lambda rng, body: body.decode().encode("utf-16-le")[1:],
    lambda rng, body: b"<p>&#x110000;&#xD800;\x00</p>",
)


# One damaged file of each layout: its bytes, and which of its records must still be there


def warc_file(rng: random.Random, file: int, hit: int) -> tuple[bytes, set[int]]:
    members = [gzip.compress(record(page(text(file, n))), mtime=0) for n in range(RECORDS)]
    how = rng.randrange(3)
    if how == 0:
        members[hit] = rng.choice(DAMAGES)(rng, members[hit])
    elif how == 1:
        members[hit] = gzip.compress(record(rng.choice(BODIES)(rng, page("x"))), mtime=0)
    else:
        wrong = rng.choice([0, 7, 10**6, 10**15])
        members[hit] = gzip.compress(record(page(text(file, hit)), wrong), mtime=0)
    return b"".join(members), set(range(RECORDS)) - {hit}


def plain_warc_file(rng: random.Random, file: int, hit: int) -> tuple[bytes, set[int]]:
    members = [record(page(text(file, n))) for n in range(RECORDS)]
    members[hit] = rng.choice(DAMAGES)(rng, members[hit])
    # A record that is too short takes the head of the next one with it.
    return b"".join(members), set(range(RECORDS)) - {hit, hit + 1}


def lines_file(rng: random.Random, file: int, hit: int) -> tuple[bytes, set[int]]:
    lines = [
        json.dumps({"text": text(file, n)}, ensure_ascii=False).encode() for n in range(RECORDS)
    ]
    bad = (
        rng.choice(DAMAGES)(rng, lines[hit]).replace(b"\n", b" "),
        b"[" * 100_000,
        b'{"text": "\xff\xfe' + lines[hit][10:],
        b'{"text": "' + b"\xe7\x8b\x90" * 4_000_000,
        b'{"text": {"a": 1}}',
    )
    lines[hit] = rng.choice(bad)
    return b"\n".join(lines), set(range(RECORDS)) - {hit}


def array_file(rng: random.Random, file: int, hit: int) -> tuple[bytes, set[int]]:
    items = [json.dumps({"text": text(file, n)}).encode() for n in range(RECORDS)]
    items[hit] = b'{"text": "it breaks' + rng.choice([b"", b'", ,}', b'"}}', b'\xff"}'])
    # A text that never ends takes what stands up to the next quotation mark, at most one item.
    return b"[" + b",\n".join(items) + b"]", set(range(RECORDS)) - {hit, hit + 1}


def table_file(rng: random.Random, file: int, hit: int) -> tuple[bytes, set[int]]:
    stream = io.BytesIO()
    schema = pa.schema([("text", pa.string())])
    with pq.ParquetWriter(stream, schema, compression="snappy", use_dictionary=False) as writer:
        for n in range(RECORDS):
            writer.write_table(pa.table({"text": [text(file, n)]}, schema=schema))
    content = bytearray(stream.getvalue())
    column = pq.ParquetFile(io.BytesIO(content)).metadata.row_group(hit).column(0)
    first = column.data_page_offset
    for _ in range(12):
        at = rng.randrange(first, first + column.total_compressed_size)
        content[at] ^= rng.randrange(1, 256)
    return bytes(content), set(range(RECORDS)) - {hit}


def tar_file(rng: random.Random, file: int, hit: int) -> tuple[bytes, set[int]]:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for n in range(RECORDS):
            body = page(text(file, n)) if n != hit else rng.choice(BODIES)(rng, page(text(file, n)))
            member = tarfile.TarInfo(f"{n}.html")
            member.size = len(body)
            archive.addfile(member, io.BytesIO(body))
    return stream.getvalue(), set(range(RECORDS)) - {hit}


def cut_stream_file(rng: random.Random, file: int, hit: int) -> tuple[bytes, set[int]]:
    lines = [json.dumps({"text": text(file, n)}).encode() + b"\n" for n in range(RECORDS)]
    whole = gzip.compress(b"".join(lines[:hit])) + gzip.compress(b"".join(lines[hit:]))[:-12]
    return whole, set(range(hit))


LAYOUTS = {
    "warc.gz": warc_file,
    "warc": plain_warc_file,
    "jsonl": lines_file,
    "json": array_file,
    "parquet": table_file,
    "tar": tar_file,
    "jsonl.gz": cut_stream_file,
}


@pytest.mark.slow
def test_two_hundred_damaged_files_lose_what_is_damaged_and_nothing_else(tmp_path: Path) -> None:
    rng = random.Random(4)
    expected: list[set[str]] = []
    for file in range(FILES):
        ending = list(LAYOUTS)[file % len(LAYOUTS)]
        content, intact = LAYOUTS[ending](rng, file, rng.randrange(RECORDS))
        (tmp_path / f"{file:03d}.{ending}").write_bytes(content)
        expected.append({text(file, number) for number in intact})
    settings = ExtractConfig(
        sources=(spec("*.*"),), pages=PageConfig(cpu_seconds=5, max_bytes=1 << 22)
    )
    outcome = run_stage(extract, settings, {}, tmp_path, workers=2)
    metrics = outcome.record.metrics
    assert metrics["records"] == metrics["documents"] + sum(metrics["refused"].values())
    assert isinstance(outcome.artifact, Corpus)
    found = set(texts(outcome.artifact))
    assert [sorted(wanted - found) for wanted in expected if wanted - found] == []
    # What is missing is told, or stands there as a document with other letters.
    told = told_by_file(outcome.artifact)
    for file in range(FILES):
        missing = {text(file, number) for number in range(RECORDS)} - found
        path = next(tmp_path.glob(f"{file:03d}.*"))
        assert not missing or told[hash_file(path)] > 0, path.name


def told_by_file(corpus: Corpus) -> dict[str, int]:
    """Refusals and altered documents by digest of the file; tars share shards and are told together."""
    told: dict[str, int] = {}
    known = {text(file, number) for file in range(FILES) for number in range(RECORDS)}
    for shard in corpus.shards:
        part = read_record(shard.part_path)
        assert part is not None
        altered = sum(found not in known for found in shard.read(["text"])["text"])
        refused = sum(part.metrics["refused"].values())
        told |= {digest: refused + altered for digest, _ in part.identity["files"]}
    return told
