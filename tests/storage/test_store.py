"""One suite for every store: what must hold on a local folder must hold on S3."""

import shutil
import time
from pathlib import Path

import pytest

from storage.errors import DamagedArtifact
from storage.identity import fingerprint
from storage.lease_s3 import LOOK_SECONDS
from storage.store import PARTS_BUILT, Store
from tests.storage.making import claimed, damage, elsewhere, make, record_of


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


def test_a_claim_that_fails_holds_nothing(store: Store) -> None:
    address = fingerprint({"name": "claimed"})
    in_the_way = store.root / "attempts" / address
    in_the_way.parent.mkdir(parents=True)
    in_the_way.touch()
    with pytest.raises(OSError, match=address):
        store.claim(address)
    in_the_way.unlink()
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


@pytest.fixture
def two_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.store.NOTED_RUNS", 2)


@pytest.mark.usefixtures("two_noted")
def test_gc_keeps_what_the_newest_runs_of_other_homes_have_noted(store: Store) -> None:
    mine, theirs, old = (make(store, name) for name in ("mine", "theirs", "old"))
    store.note_run("here", "20260101-1", [mine])
    store.note_run("there", "20260101-1", [old])
    for run_id in ("20260102-1", "20260102-2"):
        store.note_run("there", run_id, [theirs])
    assert store.noted_by_others("here") == {theirs}
    assert store.noted_by_others("there") == {mine}
    removed = store.gc(store.noted_by_others("here"), dry_run=False)
    assert {r.fingerprint for r in removed if r.what == "artifact"} == {mine, old}
    assert store.find(theirs)


@pytest.mark.usefixtures("two_noted")
def test_a_run_that_goes_on_behind_many_others_keeps_its_note(store: Store) -> None:
    for run_id in ("20260101-1", "20260102-1", "20260102-2"):
        store.note_run("there", run_id, [f"of {run_id}"], going={"20260101-1"})
    assert "of 20260101-1" in store.noted_by_others("here")
    store.note_run("there", "20260102-3", [])
    assert store.noted_by_others("here") == {"of 20260102-2"}


def test_what_a_file_manager_leaves_in_the_store_is_nothing_of_it(store: Store) -> None:
    address = make(store, "one")
    for name in ("artifacts", "attempts", "quarantine", "trash"):
        (store.root / name).mkdir(exist_ok=True)
        (store.root / name / ".DS_Store").touch()
    assert [record.fingerprint for record in store.records()] == [address]
    assert store.gc([address], dry_run=False) == []


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


def test_gc_keeps_roots_their_parts_and_work_in_progress(store: Store) -> None:
    part, stray = make(store, "part"), make(store, "stray")
    root = make(store, "root", parts=[part])
    early = make(store, "part of a job at work")
    working, failed = fingerprint({"name": "at work"}), fingerprint({"name": "failed"})
    with claimed(store, failed) as claim:
        (claim.path / "state" / "checkpoint").write_text("x")
    if store.is_remote:
        # Until the keeper of the leases has looked once more, they count as held now and then.
        time.sleep(1.5 * LOOK_SECONDS)
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


def test_an_address_that_is_no_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give the store a cache"):
        Store("s3://bucket/prefix")
    with pytest.raises(ValueError, match="is no store"):
        Store("ftp://somewhere")
    with pytest.raises(ValueError, match="no fingerprint"):
        Store(tmp_path).find("../etc")
