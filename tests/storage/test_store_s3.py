"""What only a store on S3 has: copies, several machines, leases that run out."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from storage import lease as leases
from storage import lease_s3
from storage.bucket import Bucket
from storage.errors import BucketAway, DamagedArtifact
from storage.identity import fingerprint
from storage.store import Store
from tests.storage.making import claimed, make, record_of


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


def test_a_keeper_goes_on_through_an_outage_until_the_lease_has_run_out(
    s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = tmp_path / "x.lock"
    lease = leases.acquire(lock)
    assert lease is not None
    bucket = Bucket(f"{s3_server}/{tmp_path.name}")
    etag = bucket.put(lease_s3.key_of("x"), b'{"holder": "h"}', if_absent=True)
    task = {"fingerprint": "x", "lock": str(lock), "etag": etag or ""}
    long_ago = time.monotonic() - lease_s3.BEAT_SECONDS - 1
    beaten = {"x": long_ago}

    def cut_off(key: str) -> None:
        raise ConnectionError(key)

    with monkeypatch.context() as outage:
        outage.setattr(bucket, "get", cut_off)
        assert lease_s3._beat_through_outages(bucket, task, beaten)
        assert beaten == {"x": long_ago}
        expired = {"x": long_ago - lease_s3.LEASE_SECONDS}
        assert not lease_s3._beat_through_outages(bucket, task, expired)
    assert lease_s3._beat_through_outages(bucket, task, beaten)
    assert task["etag"] != etag  # rewritten, so that its age is young again
    assert beaten["x"] > long_ago
    lease.release()
    assert not lease_s3._beat_through_outages(bucket, task, beaten)
    assert bucket.get(lease_s3.key_of("x")) is None


def test_a_beat_whose_answer_was_lost_keeps_the_lease(
    s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = tmp_path / "x.lock"
    lease = leases.acquire(lock)
    bucket = Bucket(f"{s3_server}/{tmp_path.name}")
    etag = bucket.put(lease_s3.key_of("x"), b'{"holder": "h"}', if_absent=True)
    task = {"fingerprint": "x", "lock": str(lock), "etag": etag or ""}
    put = bucket.put

    def twice(key: str, content: bytes, **condition: str) -> str | None:
        """The client's second try meets what its first one wrote."""
        put(key, content, **condition)  # pyright: ignore[reportArgumentType]
        return put(key, content, **condition)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(bucket, "put", twice)
    monkeypatch.setattr(lease_s3, "BEAT_SECONDS", 0.0)
    for _ in range(2):
        assert lease_s3._beat(bucket, task, {"x": time.monotonic() - 1})
    assert lease


def test_a_lease_that_cannot_be_freed_harms_nothing(s3_server: str, tmp_path: Path) -> None:
    store = Store(f"{s3_server}/{tmp_path.name}", cache=tmp_path / "cache")
    claim = claimed(store, "work")
    assert store._remote is not None

    def cut_off(key: str) -> None:
        raise ConnectionError(key)

    get, store._remote.bucket.get = store._remote.bucket.get, cut_off  # type: ignore[method-assign]
    claim.release()
    store._remote.bucket.get = get  # type: ignore[method-assign]
    claimed(store, "work").release()


def test_gc_of_one_machine_leaves_the_work_of_another(s3_server: str, tmp_path: Path) -> None:
    url = f"{s3_server}/{tmp_path.name}"
    here, there = (Store(url, cache=tmp_path / name) for name in ("here", "there"))
    done, unneeded = make(here, "done"), make(here, "unneeded")
    here.note_run("home of here", "1", [done])
    with claimed(here, fingerprint({"name": "whole"})) as claim:
        part = make(here, "part", kind="part")
        for _ in range(2):
            there.gc(there.noted_by_others("home of there"), dry_run=False)
        assert here.find(part)
        assert here.find(done)
        assert here.find(unneeded) is None
        assert claim.is_held
        record = record_of({"name": "whole"}, [part])
        here.commit(claim, record)
    assert there.find(record.fingerprint)
    removed = there.gc([done], dry_run=False)
    assert {r.fingerprint for r in removed if r.what == "artifact"} == {part, record.fingerprint}


def test_what_another_machine_commits_while_gc_goes_on_stays(
    s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{s3_server}/{tmp_path.name}"
    here, there = (Store(url, cache=tmp_path / name) for name in ("here", "there"))
    part = make(there, "part", kind="part")
    record = record_of({"name": "trained for hours"}, [part])
    claim = claimed(there, record.fingerprint)
    assert here._remote is not None
    fingerprints = here._remote.fingerprints

    def meanwhile() -> list[str]:
        there.commit(claim, record)
        claim.release()
        return fingerprints()

    monkeypatch.setattr(here._remote, "fingerprints", meanwhile)
    assert here.gc([], dry_run=False) == []
    assert there.verify(record.fingerprint) == []


def test_a_server_that_does_not_answer_is_one_error_whatever_was_asked(
    tmp_path: Path, away: str
) -> None:
    (tmp_path / "a").write_bytes(b"a")
    bucket = Bucket(away)
    asked: list[Callable[[], object]] = [
        lambda: bucket.get("a"),
        lambda: bucket.put("a", b"a", if_absent=True),
        lambda: bucket.delete(["a"]),
        lambda: bucket.objects("a/"),
        lambda: bucket.names("a/"),
        lambda: bucket.upload(tmp_path, ["a"], "b/"),
        lambda: bucket.download("b/", ["a"], tmp_path / "c"),
        lambda: bucket.hash("a"),
    ]
    for ask in asked:
        with pytest.raises(BucketAway, match=r"cannot be reached: .*; what was built is kept"):
            ask()
    assert issubclass(BucketAway, OSError)  # as what a folder that is away raises
