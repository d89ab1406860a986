"""A store that somebody else can write to: what lies in it must not lead, or run, anywhere else."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from storage.record import FileEntry, Record
from storage.store import Store
from tests.storage.conftest import store as store
from tests.storage.making import make, record_of

DEEP = b"[" * 100_000


def rewrite_record(store: Store, address: str, change: Any) -> None:
    """Change the record of an artifact where the store keeps it: bytes, or fields of it."""
    if store.is_remote:
        import s3fs

        system = s3fs.S3FileSystem()
        place = f"{store.url.removeprefix('s3://')}/artifacts/{address}/record.json"
        told = json.loads(system.cat_file(place))
        told["record"] |= change if isinstance(change, dict) else {}
        system.pipe_file(place, json.dumps(told).encode() if isinstance(change, dict) else change)
        return
    path = store.path_of(address) / "record.json"
    told = json.loads(path.read_bytes())
    path.write_bytes(json.dumps(told | change).encode() if isinstance(change, dict) else change)


@pytest.mark.parametrize("name", ["../../outside", "/etc/passwd", "a/../../b", "a//b", ".", ""])
def test_a_name_that_leads_out_is_no_name_of_a_file(name: str) -> None:
    with pytest.raises(ValueError, match="leads out of its folder"):
        FileEntry(name=name, size=1, xxh3="0")


@pytest.mark.parametrize("address", ["../up", "a/b", "", ".", "x\0y"])
def test_what_is_no_fingerprint_is_no_place_in_the_store(tmp_path: Path, address: str) -> None:
    with pytest.raises(ValueError, match="is no fingerprint"):
        Store(tmp_path).path_of(address)


@pytest.mark.parametrize(
    "change",
    [
        {"files": [{"name": "../../../secret", "size": 6, "xxh3": "0" * 32}]},
        {"parts": ["../../elsewhere"]},
        {"metrics": "none"},
        DEEP,
        b"\x80\x04K\x01.",
        b"",
    ],
)
def test_a_record_that_is_none_is_set_aside_and_built_anew(store: Store, change: Any) -> None:
    address = make(store, "one")
    rewrite_record(store, address, change)
    assert Store(store.url, cache=store.cache).record(address) is None
    assert store.find(address) is None
    assert make(store, "one") == address
    assert store.verify(address, full=True) == []


def test_a_place_without_a_record_is_set_aside_and_built_anew(tmp_path: Path) -> None:
    store = Store(tmp_path)
    address = make(store, "one")
    (store.path_of(address) / "record.json").unlink()
    assert make(store, "one") == address
    assert store.verify(address, full=True) == []
    assert store.set_aside == {address: "record.json: missing"}


@pytest.mark.parametrize("name", ["a.txt", "inner"])
def test_a_link_in_place_of_a_file_is_damage(tmp_path: Path, name: str) -> None:
    store = Store(tmp_path / "store")
    address = make(store, "one")
    place = store.path_of(address) / "files" / name
    # The very same bytes, but not the artifact's own.
    kept = place.rename(tmp_path / "elsewhere")
    place.symlink_to(kept)
    assert "a link or device found" in store.verify(address)[0]
    assert store.find(address) is None


def test_an_object_whose_name_leads_out_is_not_fetched(s3_server: str, tmp_path: Path) -> None:
    import s3fs

    url = f"{s3_server}/{tmp_path.name}"
    address = make(Store(url, cache=tmp_path / "here"), "one")
    system = s3fs.S3FileSystem()
    place = f"{url.removeprefix('s3://')}/artifacts/{address}"
    attempt = json.loads(system.cat_file(f"{place}/record.json"))["attempt"]
    system.pipe_file(f"{place}/{attempt}/logs/../../../../../planted", b"planted")
    there = Store(url, cache=tmp_path / "deep" / "down" / "there")
    assert there.find(address) is None
    assert "leads out of its folder" in there.set_aside[address]
    assert not list(tmp_path.rglob("planted*"))


class Planted:
    """Leaves a file where it is unpickled."""

    def __init__(self, place: Path) -> None:
        self._place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._place),)


def test_nothing_in_the_store_is_unpickled(tmp_path: Path) -> None:
    from storage.tokens import TokenFiles

    place = tmp_path / "ran"
    content = pickle.dumps(Planted(place))
    store = Store(tmp_path / "store")
    address = make(store, "one")
    for name in ("record.json", "files/meta.json", "files/web.train.bin", "files/web.train.idx"):
        (store.path_of(address) / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"meta|JSON|utf-8"):
        TokenFiles(store.path_of(address) / "files")
    assert store.find(address) is None
    assert not place.exists()


def test_a_record_is_what_it_was_after_being_read(tmp_path: Path) -> None:
    record = record_of({"name": "一"}, ["part-1", "work"])
    assert Record.model_validate_json(record.model_dump_json()) == record
