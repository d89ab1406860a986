"""The short form of the fault suite: a store by itself, on a full disk, a fixed one, a failing S3."""

import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

from conf.settings import SourceSpec
from storage.source import HashCache, resolve
from storage.store import Store
from tests.faults.disks import mount, mounted
from tests.faults.faulty_s3 import faulty_s3
from tests.storage.making import claimed, make, record_of

Result = TypeVar("Result")


def test_a_commit_that_finds_no_room_leaves_everything_as_it_was(tmp_path: Path) -> None:
    with mounted(tmp_path / "small", 256 << 10):
        store = Store(tmp_path / "small" / "store")
        first = make(store, "first")
        with pytest.raises(OSError, match="No space left") as caught:
            make(store, "second", "x" * (1 << 20))
        assert caught.value.errno == errno.ENOSPC
        assert [(r.what, r.size > 0) for r in store.gc([first], dry_run=False)] == [
            ("attempt", True)
        ]
        # Now the record of an attempt that is whole finds no room.
        record = record_of({"name": "third"})
        claim = claimed(store, record.fingerprint)
        (claim.path / "files" / "a.txt").write_text("whole")
        room = shutil.disk_usage(store.root).free
        (store.root / "ballast").write_bytes(bytes(room))
        with pytest.raises(OSError, match="No space left"):
            store.commit(claim, record)
        assert {path.name for path in claim.path.iterdir()} == {"files", "logs", "state"}
        claim.release()
        (store.root / "ballast").unlink()
        with claimed(store, record.fingerprint) as claim:
            assert claim.is_resumed
            store.commit(claim, record)
        for address in (first, record.fingerprint):
            assert store.find(address)
            assert store.verify(address, full=True) == []


def test_a_read_only_store_is_read(tmp_path: Path) -> None:
    with mounted(tmp_path / "fixed", 1 << 20):
        root = tmp_path / "fixed" / "store"
        address = make(Store(root), "one")
        (tmp_path / "one.txt").write_text("文字 text", "utf-8")
        landed = landings(tmp_path, Store(root))
        mount("-o", "remount,ro", tmp_path / "fixed")
        store = Store(root)
        assert store.find(address)
        store.verify_input(address)
        assert store.verify(address, full=True) == []
        with pytest.raises(OSError, match="Read-only") as caught:
            make(store, "two")
        assert caught.value.errno == errno.EROFS
        assert landings(tmp_path, store) == landed
        (tmp_path / "two.txt").write_text("new", "utf-8")
        with pytest.raises(OSError, match="Read-only"):
            landings(tmp_path, store)


def landings(folder: Path, store: Store) -> list[list[list[object]]]:
    """The text files of a folder, by the store's ledger."""
    spec = SourceSpec(path="*.txt")
    ledger = store.ledger("raw.json")
    found = resolve([spec], artifacts={}, base=folder, ledger=ledger, hashes=HashCache())
    return found.identity()


def again_and_again(work: Callable[[], Result]) -> Result:
    """What a user does: run it again."""
    for _ in range(3):
        try:
            return work()
        except OSError:
            continue
    return work()


def test_a_store_on_s3_lives_through_errors_lost_answers_and_slow_ones(
    s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    url = f"{s3_server}/{tmp_path.name}"
    with faulty_s3(0.2, seed=7, slow_seconds=0.2) as (address, faulty):
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        s3fs.S3FileSystem.clear_instance_cache()
        here, there = (Store(url, cache=tmp_path / name) for name in ("here", "there"))
        part = again_and_again(lambda: make(here, "part"))
        whole = again_and_again(lambda: make(there, "whole", parts=[part]))
        assert again_and_again(lambda: here.find(whole)) == here.path_of(whole)
        assert again_and_again(lambda: there.verify(part, full=True)) == []
        assert again_and_again(lambda: here.verify(whole, full=True)) == []
        assert again_and_again(lambda: here.gc([whole], dry_run=False)) is not None
    s3fs.S3FileSystem.clear_instance_cache()
    assert all(faulty.faults.values()), faulty.faults
    monkeypatch.undo()
    s3fs.S3FileSystem.clear_instance_cache()
    sound = Store(url, cache=tmp_path / "third")
    assert {record.fingerprint for record in sound.records()} == {part, whole}
    assert sound.set_aside == here.set_aside == there.set_aside == {}
