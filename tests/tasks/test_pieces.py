"""Large files in pieces: the same documents, whatever the size of a piece."""

import gzip
import io
import json
import random
from pathlib import Path
from typing import Any

import pytest

from storage.corpus import Corpus
from storage.source import SourceFile
from tasks.extract import extract
from tasks.rows import open_span
from tests.tasks.corpus_runs import run_stage, spec, texts
from tests.tasks.test_extract import EN, ZH, ExtractConfig

TEXTS = [f"{number}. {(EN, ZH)[number % 2] * (1 + number % 5)}" for number in range(200)]


def lines(rows: list[str]) -> bytes:
    return "".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in rows).encode()


def parquet(rows: list[str]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    stream = io.BytesIO()
    pq.write_table(pa.table({"text": rows}), stream, row_group_size=20, compression="none")
    return stream.getvalue()


def wet_members(rows: list[str]) -> list[bytes]:
    def member(url: str, text: bytes) -> bytes:
        head = (
            f"WARC/1.0\r\nWARC-Type: conversion\r\nWARC-Target-URI: {url}\r\n"
            "WARC-Date: 2020-01-01T00:00:00Z\r\n"
            "WARC-Record-ID: <urn:uuid:00000000-0000-0000-0000-000000000000>\r\n"
            f"Content-Type: text/plain\r\nContent-Length: {len(text)}\r\n\r\n"
        )
        return head.encode() + text + b"\r\n\r\n"

    return [member(f"http://a/{number}", text.encode()) for number, text in enumerate(rows)]


def gzipped(members: list[bytes]) -> bytes:
    # Stored, not deflated: what looks like the begin of a member may then stand within one.
    return b"".join(gzip.compress(member, 0, mtime=0) for member in members)


def run(root: Path, name: str, content: bytes, shard_bytes: int, **fields: Any) -> Any:
    (root / name).write_bytes(content)
    settings = ExtractConfig(sources=(spec(name),), shard_bytes=shard_bytes, **fields)
    return run_stage(extract, settings, {}, root)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", lines(TEXTS)),
        ("a.parquet", parquet(TEXTS)),
        ("a.warc", b"".join(wet_members(TEXTS))),
        ("a.wet.gz", gzipped(wet_members(TEXTS))),
        ("a.wet.gz", gzipped(wet_members([f"{t}\x1f\x8b\x08 no member" for t in TEXTS]))),
    ],
    ids=["lines", "parquet", "warc", "wet.gz", "false begins"],
)
def test_pieces_give_the_documents_of_the_whole_file(
    tmp_path: Path, name: str, content: bytes
) -> None:
    whole = run(tmp_path, name, content, 1 << 20)
    cut = run(tmp_path, name, content, 5000)
    assert texts(cut.artifact) == texts(whole.artifact)
    assert len(texts(whole.artifact)) == len(TEXTS)
    figures = [outcome.artifact.record.metrics for outcome in (whole, cut)]
    for name_ in ("records", "documents", "chars", "languages", "refused"):
        assert figures[0][name_] == figures[1][name_]
    assert isinstance(cut.artifact, Corpus)
    assert len(whole.artifact.shards) == 1
    shards = cut.artifact.shards
    assert len(content) // 20_000 < len(shards) <= len(content) // 5000 + 1
    assert len({shard.entry.name for shard in shards}) == len(shards)


def test_a_file_that_grew_keeps_the_pieces_before_its_new_lines(tmp_path: Path) -> None:
    run(tmp_path, "a.jsonl", lines(TEXTS[:150]), 4096)
    grown = run(tmp_path, "a.jsonl", lines(TEXTS), 4096)
    whole = run(tmp_path, "a.jsonl", lines(TEXTS), 1 << 20)
    assert texts(grown.artifact) == texts(whole.artifact)
    shards = grown.artifact.record.metrics["shards"]
    # Anew: where to cut, the last old piece (it goes on), and the new ones.
    before = len(lines(TEXTS[:150])) // 4096
    assert shards["reused"] >= before - 2
    assert shards["reused"] + shards["built"] == len(grown.artifact.shards) + 1
    assert shards["built"] <= len(lines(TEXTS[150:])) // 4096 + 3


@pytest.mark.parametrize("name", ["a.jsonl", "a.warc", "a.wet.gz"])
def test_many_damaged_places_cost_what_they_hit_and_nothing_beside_it(
    tmp_path: Path, name: str
) -> None:
    members = wet_members(TEXTS)
    records, end = {
        "a.jsonl": ([lines([text]) for text in TEXTS], b"\n"),
        "a.warc": (members, b"\r\n\r\n"),
        "a.wet.gz": ([gzipped([member]) for member in members], b""),
    }[name]
    # Not the last: nothing behind it says that an uncompressed archive lacks its end.
    hit = set(random.Random(3).sample(range(len(TEXTS) - 1), 12))
    for number in hit:
        records[number] = records[number][: len(records[number]) // 2] + end
    for shard_bytes in (1 << 20, 4096):
        outcome = run(tmp_path, name, b"".join(records), shard_bytes)
        left = [text for number, text in enumerate(TEXTS) if number not in hit]
        assert texts(outcome.artifact) == left
        assert sum(outcome.artifact.record.metrics["refused"].values()) == len(hit)


def test_a_span_reads_as_a_file_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(bytes(range(100)))
    file = SourceFile(path, "a", 100, "", "jsonl", spec("a"), 0, span=(10, 40))
    with open_span(file) as stream:
        assert stream.read() == bytes(range(10, 40))
        assert stream.read(1) == b""
        assert stream.seek(5) == 5
        assert stream.read(4) == bytes(range(15, 19))
        assert stream.seek(-3, io.SEEK_END) == 27
        assert stream.read(10) == bytes(range(37, 40))
        assert stream.seek(-1, io.SEEK_CUR) == 29


def test_a_line_longer_than_pieces_is_in_one(tmp_path: Path) -> None:
    rows = [*TEXTS[:3], ZH * 2000, *TEXTS[3:60]]
    cut = run(tmp_path, "a.jsonl", lines(rows), 4096)
    assert texts(cut.artifact) == rows
