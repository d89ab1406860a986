"""One suite for every store: what must hold on a local folder must hold on S3."""

import json
import os
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from storage import store_local
from storage.errors import DamagedArtifact
from storage.identity import fingerprint
from storage.record import Record
from storage.store import PARTS_BUILT, Claim, Store, open_store

SPAWN = get_context("spawn")


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return Store(tmp_path / "store")
    server = request.getfixturevalue("s3_server")
    return open_store(f"{server}/{tmp_path.name}", cache=tmp_path / "cache")


def record_of(identity: dict[str, object], parts: list[str] | None = None) -> Record:
    return Record(
        fingerprint=fingerprint(identity),
        kind="raw",
        stage="made",
        digest="",
        identity=identity,
        parts=parts or [],
        metrics={"n": 1},
    )


def claimed(store: Store, address: str) -> Claim:
    claim = store.claim(address)
    assert claim is not None
    return claim


def make(
    store: Store,
    name: str,
    content: str = "文字 text",
    *,
    parts: list[str] | None = None,
    replace: bool = False,
) -> str:
    """Commit an artifact of two files; its fingerprint."""
    record = record_of({"name": name}, parts)
    with claimed(store, record.fingerprint) as claim:
        (claim.path / "files" / "inner").mkdir(exist_ok=True)
        (claim.path / "files" / "a.txt").write_text(content, "utf-8")
        (claim.path / "files" / "inner" / "b.bin").write_bytes(bytes(range(256)))
        (claim.path / "logs" / "output.log").write_text("done\n")
        (claim.path / "state" / "checkpoint").write_text("scratch")
        store.commit(claim, record, replace=replace)
    return record.fingerprint


def elsewhere(store: Store, cache: Path) -> Store:
    """The same store as another machine sees it: for S3 with an empty cache of its own."""
    return Store(store.url, cache=cache) if store.is_remote else Store(store.url)


def damage(store: Store, address: str, name: str, change: str) -> None:
    """Delete or flip a byte of a committed file, at the store and in the cached copy."""
    path = store.path_of(address) / "files" / name
    if change == "delete":
        path.unlink()
    else:
        content = bytearray(path.read_bytes())
        content[0] ^= 1
        path.write_bytes(bytes(content))
    if store.is_remote:
        import s3fs

        system = s3fs.S3FileSystem()
        place = f"{store.url.removeprefix('s3://')}/artifacts/{address}"
        attempt = json.loads(system.cat_file(f"{place}/record.json"))["attempt"]
        target = f"{place}/{attempt}/files/{name}"
        system.rm_file(target) if change == "delete" else system.put_file(str(path), target)


def test_nothing_is_found_in_a_new_store(store: Store) -> None:
    address = fingerprint({"name": "never"})
    assert store.find(address) is None
    assert store.record(address) is None
    assert list(store.records()) == []
    assert store.gc([], dry_run=False) == []
    assert store.verify(address) != []


def test_a_commit_is_found_with_its_bytes_logs_and_record(store: Store) -> None:
    address = make(store, "one")
    path = store.find(address)
    assert path == store.root / "artifacts" / address
    assert (path / "files" / "a.txt").read_text("utf-8") == "文字 text"
    assert (path / "logs" / "output.log").read_text() == "done\n"
    assert not (path / "state").exists()
    record = store.record(address)
    assert record is not None
    # 文字 is 3 + 3 bytes in UTF-8, the rest is 5
    assert [(e.name, e.size) for e in record.files] == [("a.txt", 11), ("inner/b.bin", 256)]
    assert record.created
    assert store.verify(address, full=True) == []
    assert [r.fingerprint for r in store.records()] == [address]
    store.verify_input(address)


def test_the_digest_covers_the_files_and_nothing_else(store: Store, tmp_path: Path) -> None:
    first, again, other = (make(store, n, c) for n, c in (("x", "A"), ("y", "A"), ("z", "B")))
    digests = [r.digest for f in (first, again, other) if (r := store.record(f))]
    assert digests[0] == digests[1] != digests[2]


def test_an_artifact_without_files_is_an_artifact(store: Store) -> None:
    record = record_of({"name": "empty"})
    with claimed(store, record.fingerprint) as claim:
        store.commit(claim, record)
    assert store.find(record.fingerprint)
    assert store.verify(record.fingerprint, full=True) == []


def test_a_link_is_refused(store: Store, tmp_path: Path) -> None:
    record = record_of({"name": "link"})
    with claimed(store, record.fingerprint) as claim:
        (claim.path / "files" / "a").symlink_to(tmp_path)
        with pytest.raises(ValueError, match="not a plain file"):
            store.commit(claim, record)
    assert store.find(record.fingerprint) is None


def test_one_claim_at_a_time(store: Store) -> None:
    address = fingerprint({"name": "claimed"})
    with claimed(store, address):
        assert store.claim(address) is None
        assert store.is_claimed(address)
    assert not store.is_claimed(address)
    claimed(store, address).release()


def test_a_commit_needs_its_own_held_claim(store: Store) -> None:
    record = record_of({"name": "mine"})
    claim = claimed(store, record.fingerprint)
    with pytest.raises(ValueError, match="under its own claim"):
        store.commit(claim, record_of({"name": "yours"}))
    claim.release()
    with pytest.raises(ValueError, match="was released"):
        store.commit(claim, record)


def test_an_unfinished_attempt_is_resumed(store: Store) -> None:
    address = fingerprint({"name": "long"})
    with claimed(store, address) as claim:
        assert not claim.is_resumed
        (claim.path / "state" / "checkpoint").write_text("step 7")
        first = claim.path
    with claimed(store, address) as claim:
        assert claim.is_resumed
        assert claim.path == first
        assert (claim.path / "state" / "checkpoint").read_text() == "step 7"


def test_an_empty_attempt_leaves_nothing(store: Store) -> None:
    address = fingerprint({"name": "looked only"})
    with claimed(store, address) as claim:
        path = claim.path
    assert not path.parent.exists()


def test_the_first_commit_wins(store: Store, tmp_path: Path) -> None:
    address = make(store, "twice", "first")
    assert make(store, "twice", "second") == address
    path = store.find(address)
    assert path is not None
    assert (path / "files" / "a.txt").read_text() == "first"
    far = elsewhere(store, tmp_path / "far").find(address)
    assert far is not None
    assert (far / "files" / "a.txt").read_text() == "first"
    assert not (store.root / "attempts" / address).exists()


def test_replace_puts_the_new_bytes_in_its_place(store: Store, tmp_path: Path) -> None:
    address = make(store, "again", "first")
    make(store, "again", "second", replace=True)
    for seen in (store, elsewhere(store, tmp_path / "far")):
        path = seen.find(address)
        assert path is not None
        assert (path / "files" / "a.txt").read_text() == "second"
        assert seen.verify(address, full=True) == []
    assert not any((store.root / "trash").iterdir())


def test_a_reader_of_a_copy_sees_what_replaced_it(store: Store, tmp_path: Path) -> None:
    address = make(store, "copy", "first")
    far = elsewhere(store, tmp_path / "far")
    assert far.find(address)
    make(store, "copy", "second", replace=True)
    path = far.find(address)
    assert path is not None
    assert (path / "files" / "a.txt").read_text() == "second"


def test_a_deleted_file_is_noticed_by_find(store: Store) -> None:
    address = make(store, "deleted")
    damage(store, address, "inner/b.bin", "delete")
    assert any("inner/b.bin" in line for line in store.verify(address))
    assert store.find(address) is None
    assert store.record(address) is None
    reasons = list((store.root / "quarantine").glob("*/reason.txt"))
    assert ["inner/b.bin" in reason.read_text() for reason in reasons] == [True]
    assert make(store, "deleted") == address
    assert store.verify(address, full=True) == []


def test_a_flipped_byte_is_found_by_full_verify(store: Store) -> None:
    address = make(store, "flipped")
    store.verify_input(address)
    damage(store, address, "a.txt", "flip")
    assert store.find(address) is not None  # names and sizes are as before
    assert store.verify(address) == []
    assert [line.split(":")[0] for line in store.verify(address, full=True)] == ["files/a.txt"]


def test_a_flipped_byte_never_reaches_a_reader(store: Store) -> None:
    address = make(store, "input")
    store.verify_input(address)
    damage(store, address, "a.txt", "flip")
    with pytest.raises(DamagedArtifact, match=r"files/a\.txt"):
        store.verify_input(address)
    assert store.find(address) is None


def test_a_flipped_byte_in_a_part_costs_that_part_alone(store: Store) -> None:
    part = make(store, "part")
    whole = make(store, "whole", parts=[part])
    damage(store, part, "a.txt", "flip")
    with pytest.raises(DamagedArtifact, match=part):
        store.verify_input(whole)
    assert store.find(whole) is None
    assert store.verify(whole) == [f"part {part}: missing"]
    make(store, "part")
    assert store.find(whole) is not None  # whole again, nothing was rebuilt but the part
    store.verify_input(whole)


def test_a_torn_record_counts_as_damage(tmp_path: Path) -> None:
    store = Store(tmp_path)
    address = make(store, "torn")
    (store.path_of(address) / "record.json").write_text('{"fingerprint":')
    assert store.find(address) is None
    assert list(store.records()) == []


def test_a_record_for_another_identity_is_told(tmp_path: Path) -> None:
    store = Store(tmp_path)
    address = make(store, "honest")
    path = store.path_of(address) / "record.json"
    path.write_text(path.read_text().replace("honest", "forged"))
    assert any("identity" in line for line in store.verify(address))


def test_a_damaged_copy_is_fetched_again(s3_server: str, tmp_path: Path) -> None:
    store = Store(f"{s3_server}/{tmp_path.name}", cache=tmp_path / "cache")
    address = make(store, "copy")
    copy = store.path_of(address) / "files" / "a.txt"
    copy.write_bytes(b"x" * 11)
    with pytest.raises(DamagedArtifact):
        store.verify_input(address)
    assert store.find(address) is not None
    assert copy.read_text("utf-8") == "文字 text"
    copy.unlink()
    assert store.find(address) is not None
    assert copy.exists()


def test_gc_keeps_roots_their_parts_and_work_in_progress(store: Store) -> None:
    part, stray = make(store, "part"), make(store, "stray")
    root = make(store, "root", parts=[part])
    early = make(store, "part of a job at work")
    working, failed = fingerprint({"name": "at work"}), fingerprint({"name": "failed"})
    with claimed(store, failed) as claim:
        (claim.path / "state" / "checkpoint").write_text("x")
    with claimed(store, working) as claim:
        (claim.path / "state" / PARTS_BUILT).write_text(f"{early}\n")
        planned = store.gc([root], dry_run=True)
        assert {r.fingerprint for r in planned} == {stray, failed}
        assert all(store.find(a) for a in (root, part, early, stray))
        done = store.gc([root], dry_run=False)
        assert [(r.what, r.fingerprint) for r in done] == [(r.what, r.fingerprint) for r in planned]
        # a.txt has 11 bytes, b.bin 256, the log 5, the record some more
        assert all(r.size >= 272 for r in done if r.what == "artifact")
        assert store.find(stray) is None
        assert all(store.find(a) for a in (root, part, early))
        assert claim.path.exists()
    assert store.gc([root, failed], dry_run=False)
    assert store.find(early) is None
    assert store.find(root)


def test_gc_keeps_the_attempt_of_a_root(store: Store) -> None:
    address = fingerprint({"name": "to be resumed"})
    with claimed(store, address) as claim:
        (claim.path / "state" / "checkpoint").write_text("x")
    assert store.gc([address], dry_run=False) == []
    assert claim.path.exists()


def test_gc_empties_quarantine(store: Store) -> None:
    address = make(store, "bad")
    place = store.quarantine(address, "looked odd")
    assert (place / "reason.txt").read_text() == "looked odd\n"
    assert {r.what for r in store.gc([], dry_run=False)} >= {"quarantine"}
    assert not place.exists()
    assert store.gc([], dry_run=False) == []


def test_a_moved_folder_keeps_every_fingerprint(tmp_path: Path) -> None:
    store = Store(tmp_path / "here")
    part = make(store, "part")
    whole = make(store, "whole", parts=[part])
    record = store.record(whole)
    shutil.move(tmp_path / "here", tmp_path / "there")
    moved = Store(tmp_path / "there")
    assert moved.find(whole) == tmp_path / "there" / "artifacts" / whole
    assert moved.record(whole) == record
    assert moved.verify(whole, full=True) == []
    assert make(moved, "whole", "other bytes", parts=[part]) == whole


def test_another_machine_finds_what_was_committed(s3_server: str, tmp_path: Path) -> None:
    url = f"{s3_server}/{tmp_path.name}"
    here, there = (Store(url, cache=tmp_path / name) for name in ("here", "there"))
    part = make(here, "part")
    whole = make(here, "whole", parts=[part])
    path = there.find(whole)
    assert path == tmp_path / "there" / "artifacts" / whole
    assert (path.parent / part / "files" / "inner" / "b.bin").read_bytes() == bytes(range(256))
    with claimed(here, "busy"):
        assert there.claim("busy") is None
    claimed(there, "busy").release()


def test_a_dead_machines_lease_is_taken_over(
    s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from storage import lease_s3

    url = f"{s3_server}/{tmp_path.name}"
    here, there = (Store(url, cache=tmp_path / name) for name in ("here", "there"))
    assert here._remote is not None
    monkeypatch.setattr(here._remote._desk, "_keep", lambda task: None)  # its keeper died with it
    lost = claimed(here, "work")
    assert there.claim("work") is None
    monkeypatch.setattr(lease_s3, "LEASE_SECONDS", 0.5)
    time.sleep(2.1)  # the server's clock has whole seconds
    claim = claimed(there, "work")
    lost.release()  # a late release does not free the new holder's lease
    monkeypatch.setattr(lease_s3, "LEASE_SECONDS", 60.0)
    assert there.is_claimed("work")
    claim.release()


def test_a_lease_on_s3_outlives_the_flow_while_a_child_holds_the_lock(
    s3_server: str, tmp_path: Path
) -> None:
    url = f"{s3_server}/{tmp_path.name}"
    here, there = (Store(url, cache=tmp_path / name) for name in ("here", "there"))
    claim = claimed(here, "long-job")
    assert claim.lease_fd is not None
    copy = os.dup(claim.lease_fd)
    claim.release()
    assert there.claim("long-job") is None
    os.close(copy)
    deadline = time.monotonic() + 20
    while (taken := there.claim("long-job")) is None:
        assert time.monotonic() < deadline, "the keeper did not free the lease"
        time.sleep(0.2)
    taken.release()


def test_an_address_that_is_no_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give the store a cache"):
        Store("s3://bucket/prefix")
    with pytest.raises(ValueError, match="is no store"):
        Store("ftp://somewhere")
    with pytest.raises(ValueError, match="no fingerprint"):
        Store(tmp_path).find("../etc")


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
