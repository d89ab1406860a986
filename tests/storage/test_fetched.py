"""Sources on S3: found by pattern, known by content, copied to this machine in bounded room."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from conf.settings import SourceSpec
from storage import fetched as module
from storage.bucket import Bucket
from storage.fetched import FETCHED_BYTES, list_remote
from storage.lease import is_at
from storage.source import HashCache, Source, resolve

Put = Callable[[str, bytes], None]


@pytest.fixture
def url(s3_server: str, tmp_path: Path) -> str:
    return f"{s3_server}/{tmp_path.name}"


@pytest.fixture
def put(url: str) -> Put:
    bucket = Bucket(url)

    def written(key: str, content: bytes) -> None:
        bucket.put(key, content)

    return written


def look(home: Path, *paths: str) -> Source:
    """What a machine with a folder of its own finds."""
    return resolve(
        [SourceSpec(path=path) for path in paths],
        artifacts={},
        base=home,
        ledger=None,
        hashes=HashCache(home / "hashes.sqlite"),
    )


def contents(source: Source) -> list[bytes]:
    found: list[bytes] = []
    for file in source.files:
        with file.fetched() as path:
            found.append(path.read_bytes())
    return found


def copies(home: Path) -> set[str]:
    return {path.name for path in (home / "fetched").glob("*/*")}


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("", ["a.jsonl", "in/b.jsonl.gz", "in/deep/c.jsonl", "中 文.txt"]),
        ("/in", ["b.jsonl.gz", "deep/c.jsonl"]),
        ("/in/", ["b.jsonl.gz", "deep/c.jsonl"]),
        ("/*.jsonl", ["a.jsonl"]),
        ("/*", ["a.jsonl", "in/b.jsonl.gz", "in/deep/c.jsonl", "中 文.txt"]),
        ("/**/*.jsonl*", ["a.jsonl", "in/b.jsonl.gz", "in/deep/c.jsonl"]),
        ("/in/*.gz", ["b.jsonl.gz"]),
        ("/in/[a-c]*", ["b.jsonl.gz"]),
        ("/i", []),
        ("/in/b.jsonl.gz", ["b.jsonl.gz"]),
        ("/中 文.txt", ["中 文.txt"]),
    ],
)
def test_patterns_name_what_they_would_in_a_folder(
    url: str, put: Put, tmp_path: Path, pattern: str, expected: list[str]
) -> None:
    for key in ("a.jsonl", "in/b.jsonl.gz", "in/deep/c.jsonl", "in/.hidden", "中 文.txt"):
        put(key, key.encode())
        here = tmp_path / "folder" / key
        here.parent.mkdir(parents=True, exist_ok=True)
        here.write_bytes(key.encode())
    found = list_remote(url + pattern)
    assert [remote.name for remote in found] == expected
    if not expected:
        return
    local = look(tmp_path, str(tmp_path / "folder") + pattern)
    there = look(tmp_path, url + pattern)
    assert there.identity() == local.identity()
    assert contents(there) == contents(local)


def test_a_second_look_reads_nothing_but_the_listing(
    url: str, put: Put, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put("a.jsonl", b"1")
    put("b.jsonl", b"2")
    first = look(tmp_path, f"{url}/*.jsonl")
    monkeypatch.setattr(Bucket, "chunks", None)
    for path in (tmp_path / "fetched").glob("*/*"):
        path.unlink()
    assert look(tmp_path, f"{url}/*.jsonl").identity() == first.identity()


def test_a_replaced_object_is_another_file_and_one_that_vanishes_is_told(
    url: str, put: Put, tmp_path: Path
) -> None:
    put("a.jsonl", b"1")
    first = look(tmp_path, url)
    put("a.jsonl", b"2")
    second = look(tmp_path, url)
    assert second.identity() != first.identity()
    assert contents(second) == [b"2"]
    (tmp_path / "fetched").rename(tmp_path / "old")
    with pytest.raises(FileNotFoundError, match=r"a\.jsonl was replaced while it was read"):
        contents(first)
    Bucket(url).delete(["a.jsonl"])
    with pytest.raises(FileNotFoundError):
        contents(second)


def test_copies_take_bounded_room_and_those_in_use_stay(
    url: str, put: Put, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FETCHED_BYTES, "25")
    monkeypatch.setattr("storage.source.HASH_THREADS", 1)
    for name in "abcd":
        put(name, name.encode() * 10)
    a, b, c, d = look(tmp_path, url).files
    assert copies(tmp_path) == {"c", "d"}
    with a.fetched():
        assert len(copies(tmp_path)) == 2
        with b.fetched():
            assert copies(tmp_path) == {"a", "b"}
            with c.fetched():  # more than there is room for, and all of it in use
                assert copies(tmp_path) == {"a", "b", "c"}
            assert copies(tmp_path) == {"a", "b"}
        time.sleep(0.01)
        with d.fetched() as path:
            assert copies(tmp_path) == {"a", "d"}
            assert path.read_bytes() == b"d" * 10


def test_a_copy_that_was_broken_off_is_fetched_anew(url: str, put: Put, tmp_path: Path) -> None:
    put("a", b"0123456789")
    (file,) = look(tmp_path, url).files
    os.truncate(file.path, 4)
    assert contents(look(tmp_path, url)) == [b"0123456789"]


def test_a_copy_removed_while_it_is_asked_for_is_fetched_again(
    url: str, put: Put, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put("a", b"0123456789")
    (file,) = look(tmp_path, url).files
    calls: list[bool] = []

    def after_removal(descriptor: int, place: Path) -> bool:
        if not calls:
            place.unlink()
        calls.append(is_at(descriptor, place))
        return calls[-1]

    monkeypatch.setattr(module, "is_at", after_removal)
    with file.fetched() as path:
        assert path.read_bytes() == b"0123456789"
    assert calls[0] is False


def test_nothing_found_is_told(url: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no file found there"):
        look(tmp_path, f"{url}/none/*.jsonl")
