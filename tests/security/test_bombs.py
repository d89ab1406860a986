"""Files that are small and unfold without bound are refused in bounded time and memory."""

import gzip
import json
import resource
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GOOD = "Foxes live in the hills and eat honey. 狐狸住在山洞里，每天早上吃蜂蜜，喝泉水。" * 20
MEGABYTE = 1 << 20
EXTRACT = """
import json, sys
from pathlib import Path
from conf.extract import ExtractConfig, PageConfig
from tasks.extract import extract
from tests.tasks.corpus_runs import run_stage, spec
if __name__ == "__main__":
    root = Path(sys.argv[1])
    fields = json.loads(sys.argv[2])
    page = PageConfig(cpu_seconds=2)
    settings = ExtractConfig(sources=(spec(root / "raw" / "*", **fields),), pages=page)
    record = run_stage(extract, settings, {}, root).record
    print(json.dumps(record.metrics))
"""


def bomb(piece: bytes, megabytes: int, head: bytes = b"") -> bytes:
    """One gzip member of the head and so many megabytes of a piece, each compressed alike."""
    block = piece * (MEGABYTE // len(piece))
    engine = zlib.compressobj(9, wbits=-15)
    begin = engine.compress(head) + engine.flush(zlib.Z_FULL_FLUSH)
    same = engine.compress(block) + engine.flush(zlib.Z_FULL_FLUSH)
    check = zlib.crc32(head)
    for _ in range(megabytes):
        check = zlib.crc32(block, check)
    size = len(head) + megabytes * len(block)
    tail = struct.pack("<II", check, size & 0xFFFFFFFF)
    return gzip.compress(b"")[:10] + begin + same * megabytes + engine.flush() + tail


def warc(block_bytes: int, head: bytes = b"") -> bytes:
    lines = (
        b"WARC/1.0",
        b"WARC-Type: response",
        b"WARC-Record-ID: <urn:uuid:1>",
        b"WARC-Target-URI: http://a.example/",
        b"WARC-Date: 2026-01-01T00:00:00Z",
        b"Content-Type: application/http; msgtype=response",
        b"Content-Length: %d" % (block_bytes + len(head)),
        b"\r\n",
    )
    return b"\r\n".join(lines) + head


HTTP = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n%s\r\n"
PAGE = f"<html><body><article><p>{GOOD}</p></article></body></html>".encode()


def extract(folder: Path, megabytes: int, seconds: int, **fields: object) -> dict[str, object]:
    """Metrics of the stage on the folder's files, in a process that may have so much of both."""

    def bound() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (megabytes << 20, megabytes << 20))
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))

    ended = subprocess.run(
        [sys.executable, "-c", EXTRACT, str(folder), json.dumps(fields)],
        cwd=ROOT,
        preexec_fn=bound,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    return json.loads(ended.stdout.splitlines()[-1])


def write(folder: Path, files: dict[str, bytes]) -> None:
    (folder / "raw").mkdir()
    for name, content in files.items():
        (folder / "raw" / name).write_bytes(content)


def test_small_files_that_unfold_are_refused_and_the_others_are_read(tmp_path: Path) -> None:
    answer = HTTP % b""
    bodies = bomb(b"<", 300)
    row = json.dumps({"text": GOOD}).encode()
    write(
        tmp_path,
        {
            "tags.html": b"<div>" * 1_000_000,
            "deeper.html": b"<i>" * 30_000 + PAGE,
            "deep.jsonl": b"[" * 100_000 + b"\n" + b'{"text":' * 100_000 + b"\n" + row,
            "deep.json": b"[" * 100_000,
            "line.jsonl.gz": bomb(b"a", 300),
            "body.warc.gz": bomb(b"a", 300, warc(300 * MEGABYTE, answer)),
            "head.warc.gz": bomb(b"a", 300, b"WARC/1.0\r\nWARC-Type: "),
            "field.warc.gz": bomb(b"a", 300, warc(300 * MEGABYTE, b"HTTP/1.1 200 OK\r\nX: ")),
            "coding.warc.gz": gzip.compress(
                warc(len(bodies), HTTP % b"Content-Encoding: gzip\r\n") + bodies + b"\r\n\r\n"
            ),
            "good.warc.gz": gzip.compress(warc(len(PAGE), answer) + PAGE + b"\r\n\r\n"),
        },
    )
    metrics = extract(tmp_path, megabytes=2500, seconds=60)
    assert metrics["documents"] == 3
    assert metrics["refused"] == {
        "elements": 1,
        "bad_record:is JSON nested too deeply": 2,
        "bad_record:is not JSON": 2,
        "damaged_record:OSError": 2,
        "large": 2,
    }


@pytest.mark.soak
def test_texts_that_unfold_are_refused_and_the_others_are_read(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "line.txt.gz": bomb(b"a", 1024),
            "lines.txt.gz": bomb(b"a" * 63 + b"\n", 1024),
            "coding.txt.gz": bomb(b"a", 1024, b"\xb0\xa1\xff"),
            "good.txt": GOOD.encode(),
        },
    )
    metrics = extract(tmp_path, megabytes=3000, seconds=120)
    assert metrics["documents"] == 1
    # A line, or lines without a blank one between them, come in pieces that are refused each.
    assert metrics["refused"] == {"damaged_file:ValueError": 1, "large": 6}
