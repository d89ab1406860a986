"""Extract: raw files to documents; bad records are counted, nothing else is lost."""

import gzip
import io
import json
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import zstandard

from conf.extract import ExtractConfig, NormaliseConfig
from storage.bucket import Bucket
from storage.corpus import Corpus
from storage.fetched import FETCHED_BYTES
from storage.identity import hash_file
from tasks import rows
from tasks.extract import extract
from tasks.http_body import CodingError, decoded_body
from tasks.normalise import normalise
from tests.tasks.corpus_runs import run_stage, spec, texts

EN = "The fox is red and lives in the cave. It eats honey every morning, and it sleeps at noon."
ZH = "狐是红色的，住在山洞里。它每天早上吃蜂蜜，中午睡觉，下午到河边去玩。"


def html(body: str) -> bytes:
    return f"<html><body><main><p>{body}</p></main></body></html>".encode()


def warc(pages: Sequence[tuple[str, bytes]]) -> list[bytes]:
    """One gzip member per response record."""
    members: list[bytes] = []
    for url, body in pages:
        http = b"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\n\r\n" + body
        head = (
            f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: {url}\r\n"
            "WARC-Date: 2020-01-01T00:00:00Z\r\n"
            "WARC-Record-ID: <urn:uuid:00000000-0000-0000-0000-000000000000>\r\n"
            f"Content-Type: application/http; msgtype=response\r\nContent-Length: {len(http)}\r\n\r\n"
        )
        members.append(gzip.compress(head.encode() + http + b"\r\n\r\n", mtime=0))
    return members


def run(root: Path, *names: str, workers: int = 1, **fields: Any) -> Any:
    sources = tuple(spec(name) for name in names)
    settings = ExtractConfig(**{"sources": sources, **fields})
    return run_stage(extract, settings, {}, root, workers=workers)


def test_every_layout_gives_the_same_two_documents(tmp_path: Path) -> None:
    rows = [{"text": EN, "url": "http://a/"}, {"text": ZH, "url": "http://b/"}]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "a.warc.gz").write_bytes(
        b"".join(warc([("http://a/", html(EN)), ("http://b/", html(ZH))]))
    )
    (tmp_path / "b.jsonl").write_text(lines, "utf-8")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "d.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(lines.encode()))
    (tmp_path / "e.json").write_text(json.dumps(rows), "utf-8")
    (tmp_path / "f.txt").write_text(f"{EN}\n\n\n{ZH}\n", "utf-8")
    (tmp_path / "g.txt.zst").write_bytes(
        zstandard.ZstdCompressor().compress(f"{EN}\n\n{ZH}".encode())
    )
    (tmp_path / "h.csv").write_text(f'url,text\nhttp://a/,"{EN}"\nhttp://b/,"{ZH}"\n', "utf-8")
    pl = pytest.importorskip("polars")
    pl.DataFrame(rows).write_parquet(tmp_path / "i.parquet")
    with tarfile.open(tmp_path / "j.tar", "w") as archive:
        for name, body in (("1.html", html(EN)), ("2.html", html(ZH)), ("x.css", b"p {}")):
            member = tarfile.TarInfo(name)
            member.size = len(body)
            archive.addfile(member, io.BytesIO(body))
    for path in sorted(tmp_path.glob("[a-j].*")):
        outcome = run(tmp_path, path.name)
        assert sorted(texts(outcome.artifact)) == sorted([EN, ZH]), path.name
        assert outcome.record.metrics["languages"] == {"en": 1, "zh": 1}, path.name


def test_records_are_documents_or_refusals_with_a_reason(tmp_path: Path) -> None:
    rows = [
        json.dumps({"text": EN}),
        "{broken",
        json.dumps({"title": "no text"}),
        json.dumps({"text": "   "}),
        json.dumps({"text": "Der Fuchs ist rot und wohnt im Wald."}),
        json.dumps({"text": ZH, "url": "http://sub.bad.example/x"}),
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(rows), "utf-8")
    (tmp_path / "block.txt").write_text("bad.example\n", "utf-8")
    outcome = run(tmp_path, "a.jsonl", block_lists=(spec("block.txt"),))
    metrics = outcome.record.metrics
    assert texts(outcome.artifact) == [EN]
    assert (metrics["records"], metrics["documents"]) == (6, 1)
    assert metrics["refused"] == {
        "bad_record:is not JSON": 1,
        "blocked": 1,
        "empty": 1,
        "language:de": 1,
        "no_text": 1,
    }


def test_a_damaged_archive_loses_the_damaged_record_only(tmp_path: Path) -> None:
    sentences = [f"{EN} This is page number {n} of the archive." for n in range(5)]
    members = warc([(f"http://a/{n}", html(text)) for n, text in enumerate(sentences)])
    members[2] = members[2][:40] + b"\xff" * 60 + members[2][100:]
    (tmp_path / "a.warc.gz").write_bytes(b"".join(members))
    outcome = run(tmp_path, "a.warc.gz")
    assert [text[-15:] for text in texts(outcome.artifact)] == [
        f"{n} of the archive."[-15:] for n in (0, 1, 3, 4)
    ]
    assert sum(n for r, n in outcome.record.metrics["refused"].items() if "damaged" in r) >= 1


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.warc.gz", b""),
        ("empty.jsonl", b""),
        ("empty.parquet", b""),
        ("noise.parquet", b"\x00\x01" * 500),
        ("noise.warc.gz", b"\x1f\x8b" + b"\x07" * 300),
        ("noise.jsonl.gz", b"\x1f\x8b" + b"\x07" * 300),
        ("noise.jsonl.zst", b"\x28\xb5\x2f\xfd" + b"\x07" * 300),
        ("noise.tar", b"\x07" * 3000),
        ("noise.html", b"\xff\xfe\x00" * 300),
        ("cut.json", b'[{"text": "a'),
        ("nul.csv", b"text\n\x00\x00\n"),
    ],
)
def test_a_file_of_nothing_or_noise_ends_no_run(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    outcome = run(tmp_path, name)
    assert texts(outcome.artifact) == []
    assert outcome.record.metrics["documents"] == 0


def test_archives_on_s3_give_the_corpus_that_a_folder_gives(
    s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FETCHED_BYTES, "1")  # room for what is being read, no more
    pages = [(f"http://a/{i}", html(f"{i} {EN * 3}")) for i in range(4)]
    archives = {
        "a.warc.gz": b"".join(warc(pages[:2])),
        "b.warc.gz": b"".join(warc(pages[2:])),
        "c.jsonl.gz": gzip.compress(json.dumps({"text": ZH}).encode(), mtime=0),
    }
    bucket = Bucket(f"{s3_server}/{tmp_path.name}")
    for name, content in archives.items():
        bucket.put(f"crawl/{name}", content)
        path = tmp_path / "crawl" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    near = run(tmp_path, "crawl")
    far = run(tmp_path, f"{s3_server}/{tmp_path.name}/crawl/*.gz")
    assert far.artifact.record.metrics["documents"] == 5
    assert far.artifact.record.fingerprint == near.artifact.record.fingerprint
    (tmp_path / "store").rename(tmp_path / "other")
    again = run(tmp_path, f"{s3_server}/{tmp_path.name}/crawl/*.gz")
    assert again.status == "built"
    assert again.artifact.record.digest == near.artifact.record.digest
    assert len(list((tmp_path / "fetched").glob("*/*"))) == 0


def test_no_files_give_an_empty_corpus(tmp_path: Path) -> None:
    outcome = run_stage(extract, ExtractConfig(), {}, tmp_path)
    assert texts(outcome.artifact) == []
    assert outcome.record.metrics["records"] == 0


def test_twice_gives_the_same_bytes_with_any_number_of_workers(tmp_path: Path) -> None:
    for root, workers in (("one", 1), ("two", 2)):
        folder = tmp_path / root
        folder.mkdir()
        for name in ("a", "b"):
            (folder / f"{name}.warc.gz").write_bytes(
                b"".join(warc([(f"http://{name}/", html(EN)), (f"http://{name}/z", html(ZH))]))
            )
        outcome = run(folder, "*.warc.gz", workers=workers)
        assert outcome.status == "built"
        assert run(folder, "*.warc.gz").status == "hit"
    digests = [
        {
            path.relative_to(tmp_path / root).as_posix(): hash_file(path)
            for path in (tmp_path / root / "store" / "artifacts").rglob("files/*")
        }
        for root in ("one", "two")
    ]
    assert digests[0] == digests[1]
    assert len(digests[0]) == 5


def test_a_new_file_is_a_new_landing_and_costs_one_shard(tmp_path: Path) -> None:
    for name in ("b", "c"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": f"{EN} {name}."}), "utf-8")
    run(tmp_path, "*.jsonl")
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": ZH}), "utf-8")
    outcome = run(tmp_path, "*.jsonl")
    assert outcome.record.metrics["shards"] == {"built": 1, "reused": 2}
    assert isinstance(outcome.artifact, Corpus)
    assert [shard.landing for shard in outcome.artifact.shards] == [0, 0, 1]
    assert texts(outcome.artifact)[-1] == ZH


def test_small_files_share_a_shard_and_a_renamed_file_changes_nothing(tmp_path: Path) -> None:
    for number in range(6):
        (tmp_path / f"{number}.html").write_bytes(html(f"{EN} Number {number} of them."))
    outcome = run(tmp_path, "*.html")
    assert isinstance(outcome.artifact, Corpus)
    assert [shard.rows for shard in outcome.artifact.shards] == [6]
    (tmp_path / "3.html").rename(tmp_path / "9.html")
    assert run(tmp_path, "*.html").status == "hit"


def test_the_source_decides_domain_language_split_and_template(tmp_path: Path) -> None:
    row = {"title": "狐", "body": "x = {y}", "text": EN}
    (tmp_path / "a.jsonl").write_text(json.dumps(row), "utf-8")
    source = spec(
        "a.jsonl", domain="books", language="zh", split="held", text="{title}\n{body} {title}"
    )
    both = run(tmp_path, sources=(source, spec("a.jsonl", domain="books"))).artifact.documents()
    assert [(d["text"], d["source"]) for d in both] == [
        ("狐\nx = {y} 狐", "books"),
        (EN, "books-2"),
    ]
    documents = list(run(tmp_path, sources=(source,), held_share=0.0).artifact.documents())
    assert [
        (d["text"], d["domain"], d["language"], d["split"], d["source"]) for d in documents
    ] == [("狐\nx = {y} 狐", "books", "zh", "held", "books")]


def test_normalisation_by_hand() -> None:
    raw = "\ufeffa\u200b b\r\n\r\n\r\n\r\nc \t\r\nｄ\u0000e\u0301\ud800"
    assert normalise(raw, NormaliseConfig()) == "a b\n\nc\nｄ\u00e9\ufffd"
    assert normalise("Ａ１", NormaliseConfig(unicode_form="NFKC")) == "A1"
    assert normalise("哈哈！！！！！！", NormaliseConfig(max_punctuation_run=3)) == "哈哈！！！"
    assert normalise("a" + " " * 200_000 + "b", NormaliseConfig()).startswith("a ")


def test_width_and_punctuation_by_hand() -> None:
    half = NormaliseConfig(width="half")
    assert normalise("Ａｂ９，ｘ！", half) == "Ab9，x！"
    marks = NormaliseConfig(punctuation="by_script")
    assert normalise("你好,世界.真的吗?好!", marks) == "你好，世界。真的吗？好！"
    assert normalise("Hello，world。 3：5 Really？", marks) == "Hello,world. 3:5 Really?"
    # A file name, a number, a mark before Han text and an ellipsis stay as they are.
    kept = "见图.png 共3。第二 用Python，很好 等等..."
    assert normalise(kept, marks) == kept
    assert normalise("你好,世界", NormaliseConfig()) == "你好,世界"


@pytest.mark.slow
def test_real_archives_survive(shared_data: Path, tmp_path: Path) -> None:
    source = spec(shared_data / "crawl" / "warc" / "**" / "*.warc*", format="warc", domain="web")
    metrics = run(tmp_path, sources=(source,), workers=2).record.metrics
    # Pages of the same archives counted once by hand: 181 in a language that is kept
    assert metrics["documents"] >= 175
    assert metrics["records"] == metrics["documents"] + sum(metrics["refused"].values())
    assert not [reason for reason in metrics["refused"] if reason.startswith(("crash", "error"))]


def test_a_long_text_is_cut_at_paragraph_ends(tmp_path: Path) -> None:
    # 60 characters a paragraph: a piece of at most 130 holds two, and ends where the second does.
    paragraphs = [
        f"{number} " + "The fox eats honey in the cave. It sleeps at noon today."[:58]
        for number in range(5)
    ]
    assert {len(paragraph) for paragraph in paragraphs} == {58}
    (tmp_path / "book.jsonl").write_text(json.dumps({"text": "\n\n".join(paragraphs)}), "utf-8")
    whole = run(tmp_path, "book.jsonl").artifact
    cut = run(tmp_path, "book.jsonl", max_document_chars=130).artifact
    assert texts(whole) == ["\n\n".join(paragraphs)]
    assert texts(cut) == ["\n\n".join(paragraphs[i : i + 2]) for i in (0, 2, 4)]
    assert len({document["url"] for document in cut.documents()}) == 3


def test_metadata_of_a_crawl_gives_title_and_description(tmp_path: Path) -> None:
    head = {"Title": "Foxes", "Metas": [{"name": "description", "content": EN}]}
    wat = {
        "Envelope": {
            "Payload-Metadata": {"HTTP-Response-Metadata": {"HTML-Metadata": {"Head": head}}}
        }
    }
    bodies = [json.dumps(wat), json.dumps({"Envelope": {"Payload-Metadata": {}}}), "{broken"]
    (tmp_path / "a.warc.wat.gz").write_bytes(
        b"".join(
            gzip.compress(
                b"WARC/1.0\r\nWARC-Type: metadata\r\nWARC-Target-URI: http://a/\r\n"
                b"WARC-Record-ID: <urn:uuid:1>\r\nContent-Type: application/json\r\n"
                + f"Content-Length: {len(body)}\r\n\r\n{body}\r\n\r\n".encode()
            )
            for body in bodies
        )
    )
    outcome = run(tmp_path, "a.warc.wat.gz")
    assert texts(outcome.artifact) == [f"Foxes\n{EN}"]
    assert outcome.record.metrics["refused"] == {"bad_record:is not JSON": 1}
    described = run(tmp_path, sources=(spec("a.warc.wat.gz", text="{description} ({url})"),))
    assert texts(described.artifact) == [f"{EN} (http://a/)"]


def test_code_and_latex_are_a_document_a_file(tmp_path: Path) -> None:
    code = "def eat(honey):\n    return honey\n\n\nprint(eat(1))"
    (tmp_path / "fox.py").write_text(code, "utf-8")
    (tmp_path / "fox.tex").write_text(f"\\section{{Fox}}\n\n{EN}\n", "utf-8")
    outcome = run(tmp_path, "fox.*")
    assert sorted(texts(outcome.artifact)) == sorted(
        ["def eat(honey):\n    return honey\n\nprint(eat(1))", f"\\section{{Fox}}\n\n{EN}"]
    )
    assert {document["language"] for document in outcome.artifact.documents()} == {"en"}


def test_a_broken_array_costs_its_broken_item(tmp_path: Path) -> None:
    items = [json.dumps({"text": f"{EN} Row {number}."}) for number in range(4)]
    items[1] = '{"text": oops}'
    (tmp_path / "a.json").write_text(f"[{', '.join(items)}]", "utf-8")
    outcome = run(tmp_path, "a.json")
    assert [text[-6:] for text in texts(outcome.artifact)] == ["Row 0.", "Row 2.", "Row 3."]
    assert outcome.record.metrics["refused"] == {"bad_record:is not JSON": 1}


def test_a_large_array_is_read_item_by_item(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "WHOLE_BYTES", 64)
    items = [{"text": f"{ZH}{number}", "n": [number, {"a": "],["}]} for number in range(50)]
    (tmp_path / "a.json").write_text(json.dumps(items, ensure_ascii=False, indent=1), "utf-8")
    assert texts(run(tmp_path, "a.json").artifact) == [item["text"] for item in items]
    (tmp_path / "b.json").write_bytes(b'[{"text": "\xff"},\n' + json.dumps(items[:2]).encode()[1:])
    outcome = run(tmp_path, "b.json")
    assert texts(outcome.artifact) == [item["text"] for item in items[:2]]
    assert outcome.record.metrics["refused"] == {"bad_record:is not UTF-8": 1}


def test_codings_of_a_response_are_undone_where_the_bytes_have_them() -> None:
    body = html(EN)
    zipped = gzip.compress(body)
    half = len(body) // 2
    chunked = b"".join(
        f"{len(piece):x}\r\n".encode() + piece + b"\r\n"
        for piece in (body[:half], body[half:], b"")
    )
    gzipped = {"content-encoding": "gzip"}
    in_chunks = {"transfer-encoding": "chunked"}
    assert decoded_body(body, {}, 10**6) == body
    assert decoded_body(zipped, gzipped, 10**6) == body
    assert decoded_body(body, gzipped, 10**6) == body
    assert decoded_body(chunked, in_chunks, 10**6) == body
    assert decoded_body(body, in_chunks, 10**6) == body
    assert decoded_body(zlib.compress(body), {"content-encoding": "deflate"}, 10**6) == body
    assert body.startswith(decoded_body(zipped[:-20], gzipped, 10**6))
    assert len(decoded_body(gzip.compress(bytes(10**8)), gzipped, 10**6)) == 10**6 + 1
    with pytest.raises(CodingError, match="broken"):
        decoded_body(b"\x1f\x8b" + b"\x07" * 50, gzipped, 10**6)
