"""ARC archives: the same pages as in a WARC, damage told and passed over."""

import gzip
from pathlib import Path

import pytest

from storage.source import SourceFile
from tasks import archives
from tasks.raw_record import RawRecord, Refusal
from tasks.records import read_records
from tests.tasks.corpus_runs import spec

VERSION_1 = b"1 1 InternetArchive\nURL IP-address Archive-date Content-type Archive-length\n"
PAGE = "<html><body><p>狐是红色的，住在山洞里。</p></body></html>"


def arc_record(url: str, content: bytes, *, kind: str = "text/html", version: int = 1) -> bytes:
    more = " 200 checksum - 1234 a.arc" if version == 2 else ""
    return f"{url} 10.0.0.1 20080430204825 {kind}{more} {len(content)}\n".encode() + content + b"\n"


def answer(body: bytes, *, status: str = "200 OK", kind: str = "text/html") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nServer: a: b\r\n\r\n".encode() + body


def records_of(path: Path) -> list[RawRecord | Refusal]:
    file = SourceFile(path, path.name, path.stat().st_size, "", "warc", spec(path), 0)
    found = read_records(
        file,
        text_documents="file",
        url_reason=lambda url: "blocked" if "bad" in url else None,
        max_page_bytes=100_000,
    )
    return list(found)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("name", ["a.arc", "a.arc.gz"])
def test_pages_and_texts_of_an_arc(tmp_path: Path, name: str, version: int) -> None:
    gbk = "text/html; charset=GBK"
    records = [
        arc_record("filedesc://a.arc", VERSION_1, kind="text/plain"),
        arc_record("dns:a", b"a. 589 IN A 10.0.0.1", kind="text/dns"),
        arc_record("http://a/1", answer(PAGE.encode("gbk"), kind=gbk), version=version),
        arc_record("http://a/2", answer(b"", status="404 Not Found"), version=version),
        arc_record("http://a/robots.txt", answer(b"some text", kind="text/plain")),
        arc_record("http://bad/", answer(PAGE.encode()), version=version),
        arc_record("http://a/3", answer(b"\x89PNG", kind="image/png"), version=version),
        arc_record("http://a/4", b"no answer at all", version=version),
        arc_record("http://a/5", answer(b"x" * 300_000), version=version),
    ]
    packed = map(gzip.compress, records) if name.endswith("gz") else records
    (tmp_path / name).write_bytes(b"".join(packed))
    found = records_of(tmp_path / name)
    assert found[:2] == [
        RawRecord("http://a/1", page=PAGE.encode("gbk"), charset="GBK"),
        Refusal("http://a/2", "status:404"),
    ]
    assert found[2:] == [
        RawRecord("http://a/robots.txt", text="some text"),
        Refusal("http://bad/", "blocked"),
        Refusal("http://a/3", "type:image/png"),
        Refusal("http://a/4", "bad_record:no status"),
        RawRecord("http://a/5", page=b"x" * 100_001),  # one byte behind the bound: refused later
    ]


def test_a_wrong_length_costs_its_record(tmp_path: Path) -> None:
    good = [arc_record(f"http://a/{n}", answer(PAGE.encode())) for n in range(4)]
    whole = arc_record("http://a/1", answer(PAGE.encode() + b"\nmore\n\nlines\n"))
    short = whole.replace(b"text/html 1", b"text/html ", 1)
    assert len(short) == len(whole) - 1
    begin = arc_record("filedesc://a.arc", VERSION_1, kind="text/plain")
    (tmp_path / "a.arc").write_bytes(begin + good[0] + short + good[2] + good[3])
    found = records_of(tmp_path / "a.arc")
    urls = [record.url for record in found if isinstance(record, RawRecord)]
    assert urls[0] == "http://a/0"
    assert urls[-2:] == ["http://a/2", "http://a/3"]
    assert Refusal("", "damaged_record:no head") in found


def test_a_broken_stream_is_told(tmp_path: Path) -> None:
    begin = gzip.compress(arc_record("filedesc://a.arc", VERSION_1, kind="text/plain"))
    page = gzip.compress(arc_record("http://a/0", answer(PAGE.encode())))
    (tmp_path / "a.arc.gz").write_bytes(begin + page + page[: len(page) // 2])
    found = records_of(tmp_path / "a.arc.gz")
    assert isinstance(found[0], RawRecord)
    assert found[1:] == [Refusal("", "damaged_file:EOFError")]


def test_an_archive_of_damage_alone_is_given_up_and_that_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "MAX_RESYNCS", 5)
    (tmp_path / "a.warc.gz").write_bytes(b"\x1f\x8b\x08 nothing" * 20)
    found = records_of(tmp_path / "a.warc.gz")
    assert len(found) == 6
    assert found[-1] == Refusal("", "damaged_file:too_many_places")


def test_a_real_arc(shared_data: Path) -> None:
    found = records_of(shared_data / "crawl/warc/aut/badexample.arc.gz")
    assert [record.url for record in found if isinstance(record, RawRecord)] == [
        "http://www.archive.org/robots.txt",
        "http://www.archive.org/",
    ]
