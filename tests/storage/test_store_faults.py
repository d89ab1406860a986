"""Racing, killed and concurrent users of one store leave it whole."""

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from storage import store_local
from storage.identity import fingerprint
from storage.store import Store
from tests.storage.making import claimed, make, record_of

SPAWN = get_context("spawn")


def race(url: str, cache: Path | None, number: int, go: Event) -> None:
    """Commit under one fingerprint without regard to the lease, as a writer that lost it would."""
    store = Store(url, cache=cache and cache.with_name(f"cache{number}"))
    record = record_of({"name": "raced"})
    path = store.root / "attempts" / record.fingerprint / str(number + 100)
    for name in ("files", "logs", "state"):
        (path / name).mkdir(parents=True)
    (path / "files" / "who.txt").write_text(str(number))
    entries = store_local.entries_of(path / "files")
    full = record.model_copy(
        update={"files": entries, "digest": store_local.digest_of(entries), "created": "now"}
    )
    store_local.write_atomically(path / "record.json", full.model_dump_json().encode())
    go.wait()
    store._publish(path, full, replace=False)


def test_of_racing_writers_one_wins_and_nothing_is_mixed(store: Store) -> None:
    go = SPAWN.Event()
    writers = [
        SPAWN.Process(target=race, args=(store.url, store.cache, number, go)) for number in range(4)
    ]
    for writer in writers:
        writer.start()
    time.sleep(2.0)
    go.set()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0] * 4
    address = fingerprint({"name": "raced"})
    assert store.verify(address, full=True) == []
    path = store.find(address)
    assert path is not None
    assert (path / "files" / "who.txt").read_text() in list("0123")
    assert store.gc([address], dry_run=True) == []


def commit_and_die_at(url: str, cache: Path | None, step: str) -> None:
    """Kill this process with SIGKILL when it comes to one step of the commit."""
    store = Store(url, cache=cache)

    def die(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    match step:
        case "build":
            claim = claimed(store, fingerprint({"name": "killed"}))
            (claim.path / "files" / "a.txt").write_text("half")
            (claim.path / "state" / "checkpoint").write_text("step 3")
            die()
        case "record":
            store_local.write_atomically = die
        case "state":
            store_local.move_aside = die
        case "rename":
            store_local.try_rename = die
        case _:
            assert store._remote is not None
            store._remote.bucket.put = die  # the objects are there, the record is not
    make(store, "killed")


@pytest.mark.parametrize("step", ["build", "record", "state", "rename", "put"])
def test_a_writer_killed_at_any_step_leaves_nothing_half_done(store: Store, step: str) -> None:
    if step == "put" and not store.is_remote:
        pytest.skip("only S3 puts a record")
    if step == "put":
        # the lease is a put too: take it here, and let the child die in the commit
        assert store._remote is not None
        record = record_of({"name": "killed"})
        claim = claimed(store, record.fingerprint)
        (claim.path / "files" / "a.txt").write_text("文字 text", "utf-8")

        def fail(*_: object, **__: object) -> str:
            raise ConnectionError("cut off")

        put, store._remote.bucket.put = store._remote.bucket.put, fail
        with pytest.raises(ConnectionError):
            store.commit(claim, record)
        store._remote.bucket.put = put
        claim.release()
    else:
        child = SPAWN.Process(target=commit_and_die_at, args=(store.url, store.cache, step))
        child.start()
        child.join(60)
        assert child.exitcode == -signal.SIGKILL
    address = fingerprint({"name": "killed"})
    found = store.find(address)
    assert found is None or store.verify(address, full=True) == []
    with claimed(store, address) as claim:
        if step == "build":
            assert claim.is_resumed
            assert (claim.path / "state" / "checkpoint").read_text() == "step 3"
        if step in ("state", "rename", "put"):
            assert store.find(address), "a complete attempt is committed by the next claim"
    make(store, "killed")
    assert store.verify(address, full=True) == []
    assert [r.what for r in store.gc([address], dry_run=False) if r.what == "artifact"] == []


def test_an_attempt_whose_record_is_damaged_goes_on(store: Store) -> None:
    address = fingerprint({"name": "torn"})
    with claimed(store, address) as claim:
        (claim.path / "state" / "checkpoint").write_text("step 3")
        (claim.path / "record.json").write_bytes(b'{"fingerprint": "\0')
    with claimed(store, address) as claim:
        assert claim.is_resumed
        assert (claim.path / "state" / "checkpoint").read_text() == "step 3"
    make(store, "torn")
    assert store.verify(address, full=True) == []


def replace_and_die(url: str, cache: Path | None) -> None:
    """Kill this process between taking the old artifact away and putting the new one there."""
    store_local.try_rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
    make(Store(url, cache=cache), "forced", "second", replace=True)


def test_a_replacement_killed_in_the_middle_is_finished_by_the_next_claim(store: Store) -> None:
    address = make(store, "forced", "first")
    child = SPAWN.Process(target=replace_and_die, args=(store.url, store.cache))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    claimed(store, address).release()
    path = store.find(address)
    assert path is not None
    assert (path / "files" / "a.txt").read_text() == "second"
    assert store.verify(address, full=True) == []


def test_a_reader_during_replacements_never_takes_one_for_damage(store: Store) -> None:
    address = make(store, "busy", "0")
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(
            lambda: [
                make(store, "busy", "x" * n, replace=True)
                for n in range(1, 6 if store.is_remote else 20)
            ]
        )
        while not writing.done():
            if path := store.find(address):
                assert path.name == address
    writing.result()
    assert not (store.root / "quarantine").exists()
    assert store.verify(address, full=True) == []


def test_many_threads_may_ask_at_once(store: Store) -> None:
    addresses = [make(store, f"thread {n}") for n in range(4)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(store.verify_input, addresses * 4)) == [None] * 16


def test_a_rename_stands_whoever_removes_the_empty_folder_behind_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = tmp_path / "attempts" / "1", tmp_path / "artifacts" / "x"
    source.mkdir(parents=True)
    flush = store_local.flush_folder

    def tidied_up(folder: Path) -> None:
        store_local.remove_if_empty(source.parent)  # as a writer does that came second
        flush(folder)

    monkeypatch.setattr(store_local, "flush_folder", tidied_up)
    assert store_local.try_rename(source, target)
    assert target.is_dir()


def test_the_size_of_a_folder_is_told_while_its_files_come_and_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "weights").write_bytes(bytes(100))
    checkpoint = tmp_path / "checkpoint"
    checkpoint.touch()

    def walk(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
        names = sorted(path.name for path in folder.iterdir())
        checkpoint.unlink()  # as a training does that keeps the newest alone
        yield str(folder), [], names

    monkeypatch.setattr(store_local.os, "walk", walk)
    assert store_local.bytes_under(tmp_path) == 100
