"""What a source finds, in which landing, and what of it is identity."""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from conf.settings import SourceSpec
from storage import source as module
from storage.identity import fingerprint, hash_file
from storage.record import Record
from storage.source import HashCache, Source, SourceLedger, format_of, resolve
from storage.store import Store
from storage.world import World


@pytest.fixture
def look(tmp_path: Path) -> Callable[..., Source]:
    """Resolve specs below the test's folder with the test's ledger."""

    def resolved(*specs: SourceSpec, base: Path = tmp_path, appends: bool = True) -> Source:
        return resolve(
            specs or [SourceSpec(path="in/*")],
            artifacts={},
            base=base,
            ledger=tmp_path / "sources" / "extract.json",
            hashes=HashCache(tmp_path / "sources" / "hashes.sqlite"),
            appends=appends,
        )

    (tmp_path / "in").mkdir()
    return resolved


def write(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, "utf-8")
    return path


def names(source: Source) -> list[list[str]]:
    return [[file.name for file in landing.files] for landing in source.landings]


def test_the_first_look_is_one_landing_in_name_order(
    tmp_path: Path, look: Callable[..., Source]
) -> None:
    for name in ("b.jsonl", "a.jsonl", "中.jsonl", "B.jsonl"):
        write(tmp_path / "in" / name, name)
    assert names(look()) == [["B.jsonl", "a.jsonl", "b.jsonl", "中.jsonl"]]


def test_a_name_that_is_no_utf_8_is_read_as_old_chinese_systems_wrote_it(
    tmp_path: Path, look: Callable[..., Source]
) -> None:
    folder = os.fsencode(tmp_path / "in")
    long_ago = time.time() - 60
    for name in ("甲.txt".encode("gbk"), b"\xff\xfe.txt"):
        file = Path(os.fsdecode(folder + b"/" + name))
        file.write_bytes(name)
        os.utime(file, (long_ago, long_ago))
    for _ in range(2):  # the second time from the table of hashes
        (landing,) = look().landings
        assert [file.name for file in landing.files] == ["甲.txt", r"\xff\xfe.txt"]
        assert [file.path.read_bytes() for file in landing.files] == [
            "甲.txt".encode("gbk"),
            b"\xff\xfe.txt",
        ]


def test_a_file_that_appears_later_is_a_landing_of_its_own(
    tmp_path: Path, look: Callable[..., Source]
) -> None:
    write(tmp_path / "in" / "b.txt", "B")
    first = look().identity()
    write(tmp_path / "in" / "a.txt", "A")
    second = look()
    assert names(second) == [["b.txt"], ["a.txt"]]
    assert second.identity()[:1] == first
    assert look().identity() == second.identity()


def test_planning_does_not_write_the_ledger(tmp_path: Path, look: Callable[..., Source]) -> None:
    write(tmp_path / "in" / "a.txt", "A")
    planned = look(appends=False)
    write(tmp_path / "in" / "b.txt", "B")
    assert names(planned) == [["a.txt"]]
    assert names(look()) == [["a.txt", "b.txt"]]


def test_moved_and_renamed_files_keep_their_landing(
    tmp_path: Path, look: Callable[..., Source]
) -> None:
    write(tmp_path / "in" / "a.txt", "A")
    look()
    write(tmp_path / "in" / "b.txt", "B")
    before = look().identity()
    shutil.move(tmp_path / "in", tmp_path / "moved" / "in")
    (tmp_path / "moved" / "in" / "a.txt").rename(tmp_path / "moved" / "in" / "z.txt")
    after = look(base=tmp_path / "moved")
    assert names(after) == [["z.txt"], ["b.txt"]]
    assert after.identity() == before


def test_a_changed_file_is_new_and_a_lost_one_is_gone(
    tmp_path: Path, look: Callable[..., Source]
) -> None:
    for name in ("a", "b", "c"):
        write(tmp_path / "in" / f"{name}.txt", name)
    look()
    write(tmp_path / "in" / "a.txt", "changed")
    (tmp_path / "in" / "c.txt").unlink()
    assert names(look()) == [["b.txt"], ["a.txt"]]
    write(tmp_path / "in" / "c.txt", "c")
    assert names(look()) == [["b.txt", "c.txt"], ["a.txt"]]


def test_equal_files_are_counted(tmp_path: Path, look: Callable[..., Source]) -> None:
    write(tmp_path / "in" / "a.txt", "same")
    look()
    write(tmp_path / "in" / "b.txt", "same")
    found = look()
    assert names(found) == [["a.txt"], ["b.txt"]]
    assert found.identity()[0] == found.identity()[1]


def test_identity_is_digest_format_and_spec(tmp_path: Path, look: Callable[..., Source]) -> None:
    page = write(tmp_path / "in" / "page.html", "<p>好</p>")
    book = write(tmp_path / "books" / "one.txt.zst", "not read here")
    found = look(SourceSpec(path="in"), SourceSpec(path="books/*", domain="books"))
    assert found.identity() == [[[hash_file(page), "html", 0], [hash_file(book), "text", 1]]]
    assert [file.spec.domain for file in found.files] == ["default", "books"]


def test_folders_globs_and_single_files(tmp_path: Path, look: Callable[..., Source]) -> None:
    write(tmp_path / "in" / "deep" / "er" / "x.jsonl", "1")
    write(tmp_path / "in" / "[odd].jsonl", "2")
    write(tmp_path / "in" / ".hidden.jsonl", "3")
    assert names(look(SourceSpec(path="in"), appends=False)) == [["[odd].jsonl", "deep/er/x.jsonl"]]
    assert names(look(SourceSpec(path="in/**/*.jsonl"), appends=False)) == [
        ["[odd].jsonl", "deep/er/x.jsonl"]
    ]
    assert names(look(SourceSpec(path="in/[odd].jsonl"), appends=False)) == [["[odd].jsonl"]]
    assert names(look(SourceSpec(path="in/de*"), appends=False)) == [["deep/er/x.jsonl"]]
    absolute = SourceSpec(path=str(tmp_path / "in" / "*.jsonl"))
    assert names(look(absolute, appends=False)) == [["[odd].jsonl"]]


def test_a_folder_with_glob_signs_in_its_name_is_only_a_folder(
    tmp_path: Path, look: Callable[..., Source]
) -> None:
    write(tmp_path / "odd [1]*" / "in" / "a.txt", "A")
    assert names(look(base=tmp_path / "odd [1]*")) == [["a.txt"]]


def test_a_path_above_the_base(tmp_path: Path, look: Callable[..., Source]) -> None:
    write(tmp_path / "in" / "a.txt", "A")
    (tmp_path / "project").mkdir()
    found = look(SourceSpec(path="../in/*.txt"), base=tmp_path / "project")
    assert names(found) == [["a.txt"]]


def test_no_match_is_an_error_that_names_the_pattern(look: Callable[..., Source]) -> None:
    with pytest.raises(ValueError, match=r"in/\*\.warc: no file found below .* is_optional"):
        look(SourceSpec(path="in/*.warc"))
    assert look(SourceSpec(path="in/*.warc", is_optional=True)) == Source()


def test_an_unknown_ending_needs_a_format(tmp_path: Path, look: Callable[..., Source]) -> None:
    write(tmp_path / "in" / "photo.png", "x")
    with pytest.raises(ValueError, match=r"photo\.png.*\.png.*format"):
        look()
    assert [f.format for f in look(SourceSpec(path="in", format="text")).files] == ["text"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.warc.gz", "warc"),
        ("a.WARC", "warc"),
        ("pages.tar.gz", "html"),
        ("x.y.jsonl.zst", "jsonl"),
        ("t.parquet", "parquet"),
        ("exam/val/地理_val.csv", "csv"),
        ("domains", "text"),
        ("README.md", "markdown"),
    ],
)
def test_the_layout_goes_by_the_name(name: str, expected: str) -> None:
    assert format_of(name, "auto") == expected
    assert format_of(name, "text") == "text"


def test_files_of_an_artifact_are_not_hashed_again(
    tmp_path: Path, look: Callable[..., Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "store")
    identity = {"stage": "world"}
    address = fingerprint(identity)
    with store.claim(address) or pytest.fail("no claim") as claim:
        page = write(claim.path / "files" / "crawl" / "p.warc.gz", "x")
        digest = hash_file(page)
        record = Record(
            fingerprint=address, kind="world", stage="world", digest="", identity=identity
        )
        artifact = World(store.commit(claim, record))
    monkeypatch.setattr(module, "hash_file", lambda path: pytest.fail(f"{path} was hashed"))
    found = resolve(
        [SourceSpec(path="crawl/*", node="world")],
        artifacts={"world": artifact},
        base=tmp_path,
        ledger=None,
        hashes=HashCache(),
    )
    assert found.identity() == [[[digest, "warc", 0]]]
    with pytest.raises(ValueError, match="node 'other' gave no artifact"):
        look(SourceSpec(path="crawl/*", node="other"))


def test_an_unchanged_file_costs_a_stat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.txt", "A")
    database = tmp_path / "hashes.sqlite"
    fresh = HashCache(database).digests([path])
    assert fresh == [(1, hash_file(path))]
    # a file that was only just written is not trusted: it may change within its time stamp
    monkeypatch.setattr(module, "SETTLED_NS", -1)
    HashCache(database).digests([path])
    monkeypatch.setattr(module, "hash_file", lambda path: pytest.fail(f"{path} was hashed"))
    assert HashCache(database).digests([path]) == fresh


def test_a_file_of_the_same_size_and_time_is_hashed_when_it_was_replaced(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "A")
    old = time.time() - 100
    os.utime(path, (old, old))
    hashes = HashCache(tmp_path / "hashes.sqlite")
    before = hashes.digests([path])
    other = write(tmp_path / "b.txt", "B")
    os.utime(other, (old, old))
    other.replace(path)
    assert hashes.digests([path]) != before


def test_a_ledger_reads_back_what_was_appended(tmp_path: Path, look: Callable[..., Source]) -> None:
    write(tmp_path / "in" / "a.txt", "A")
    found = look()
    ledger = SourceLedger(tmp_path / "sources" / "extract.json")
    assert [[list(key) for key in landing] for landing in ledger.read().known()] == found.identity()


def test_real_crawl_files_resolve(shared_data: Path, tmp_path: Path) -> None:
    found = resolve(
        [SourceSpec(path="crawl/pages_warc/*.warc.gz", domain="web")],
        artifacts={},
        base=shared_data,
        ledger=tmp_path / "ledger.json",
        hashes=HashCache(tmp_path / "hashes.sqlite"),
    )
    assert [file.format for file in found.files] == ["warc"] * 4
    assert [file.size for file in found.files] == [
        path.stat().st_size for path in sorted((shared_data / "crawl/pages_warc").iterdir())
    ]


def test_machines_that_share_a_store_share_the_landings(s3_server: str, tmp_path: Path) -> None:
    url = f"{s3_server}/{tmp_path.name}"
    write(tmp_path / "in" / "b.txt", "B")

    def look_from(machine: str) -> Source:
        return resolve(
            [SourceSpec(path="in/*")],
            artifacts={},
            base=tmp_path,
            ledger=Store(url, cache=tmp_path / machine).ledger("extract.json"),
            hashes=HashCache(),
        )

    first = look_from("here")
    write(tmp_path / "in" / "a.txt", "A")
    assert names(look_from("there")) == [["b.txt"], ["a.txt"]]
    assert look_from("here").identity()[:1] == first.identity()


def test_a_ledger_of_one_machine_goes_on_in_the_bucket(s3_server: str, tmp_path: Path) -> None:
    url = f"{s3_server}/{tmp_path.name}"
    here, there = (Store(url, cache=tmp_path / name).ledger("x.json") for name in ("h", "t"))

    def look(ledger: SourceLedger) -> Source:
        spec = SourceSpec(path="in/*")
        return resolve([spec], artifacts={}, base=tmp_path, ledger=ledger, hashes=HashCache())

    write(tmp_path / "in" / "b.txt", "B")
    look(SourceLedger(here.path))  # as before there were ledgers in buckets
    write(tmp_path / "in" / "a.txt", "A")
    assert names(look(here)) == names(look(there)) == [["b.txt"], ["a.txt"]]


def test_two_machines_that_append_at_once_agree(s3_server: str, tmp_path: Path) -> None:
    url = f"{s3_server}/{tmp_path.name}"
    here, there = (Store(url, cache=tmp_path / name).ledger("x.json") for name in ("h", "t"))
    write(tmp_path / "in" / "a.txt", "A")
    spec = SourceSpec(path="in/*")
    found = resolve([spec], artifacts={}, base=tmp_path, ledger=None, hashes=HashCache())
    files = list(found.files)
    unread = here.read()
    assert there.append(there.read(), files)
    assert not here.append(unread, files)
    assert len(here.read().landings) == 1


def test_a_domain_can_be_the_folder_and_is_then_identity(
    tmp_path: Path, look: Callable[..., Source]
) -> None:
    write(tmp_path / "in" / "books" / "a.jsonl", "A")
    write(tmp_path / "in" / "web" / "b.jsonl", "B")
    spec = SourceSpec(path="in/*/*", domain="{folder}")
    found = look(spec)
    assert [file.spec.domain for file in found.files] == ["books", "web"]
    (tmp_path / "in" / "web").rename(tmp_path / "in" / "news")
    assert look(spec).identity() != found.identity()
