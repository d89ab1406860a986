"""Who works on a fingerprint, seen by all machines that share a store on S3.

A lease is an object that its keeper rewrites every few seconds; one that has not been rewritten for
LEASE_SECONDS, by the server's clock, may be taken over. It only saves work that would be done twice:
the commit itself is decided by a conditional put.

The keeper is a process of its own, `python -m storage.lease_s3 s3://...`. It beats as long as anyone
holds the local lock of the same fingerprint, so that the lease outlives its flow where a supervisor
still works, and ends soon after the last holder.
"""

import json
import logging
import os
import select
import socket
import subprocess
import sys
import threading
import time
import traceback
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage import lease as leases
from storage.bucket import Bucket

LEASE_SECONDS = 60.0
BEAT_SECONDS = 10.0
LOOK_SECONDS = 1.0
_log = logging.getLogger("bessemer.store")


@dataclass(frozen=True)
class RemoteLease:
    """A lease that this machine holds."""

    bucket: Bucket
    fingerprint: str
    lock: Path
    """The local lock that its keeper watches."""
    holder: str

    def release(self) -> None:
        """Free it, unless a child on this machine still holds the local lock."""
        lock = leases.acquire(self.lock)
        if lock is None:
            return
        try:
            stored = self.bucket.get(key_of(self.fingerprint))
            if stored and json.loads(stored.content)["holder"] == self.holder:
                self.bucket.delete([key_of(self.fingerprint)])
        except Exception as error:  # noqa: BLE001 - an outage has many types, and what was built is there
            _log.warning("the lease of %s is left to run out: %s", self.fingerprint, error)
        finally:
            lock.release()


def key_of(fingerprint: str) -> str:
    """Where the lease of a fingerprint lies."""
    return f"leases/{fingerprint}.json"


def is_held(bucket: Bucket, fingerprint: str) -> bool:
    """Whether a living lease is there."""
    stored = bucket.get(key_of(fingerprint))
    return stored is not None and stored.age_seconds <= LEASE_SECONDS


class LeaseDesk:
    """Takes leases for one cache folder (`home`) and has them kept alive."""

    def __init__(self, url: str, bucket: Bucket, home: Path) -> None:
        self._url = url
        self._bucket = bucket
        self._home = home
        self._keeper: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def acquire(self, fingerprint: str, lock: Path) -> RemoteLease | None:
        """Take the lease; the caller holds the local lock. None when another machine holds it."""
        holder = uuid.uuid4().hex
        home = home_id(self._home)
        content = json.dumps(
            {"holder": holder, "home": home, "host": socket.gethostname(), "pid": os.getpid()}
        ).encode()
        key = key_of(fingerprint)
        etag = self._bucket.put(key, content, if_absent=True)
        if etag is None:
            stored = self._bucket.get(key)
            if stored is None:
                return None
            written: dict[str, Any] = json.loads(stored.content)
            if written["holder"] == holder:
                # The client repeated a put whose answer was lost: it is ours.
                etag = stored.etag
            elif written["home"] == home or stored.age_seconds > LEASE_SECONDS:
                # We hold this machine's lock, so the holder that shares our home is gone.
                etag = self._bucket.put(key, content, if_etag=stored.etag)
        if etag is None:
            return None
        self._keep({"fingerprint": fingerprint, "lock": str(lock), "etag": etag})
        return RemoteLease(self._bucket, fingerprint, lock, holder)

    def _keep(self, task: dict[str, str]) -> None:
        with self._lock:
            if self._keeper is None or self._keeper.poll() is not None:
                self._keeper = self._start_keeper()
            assert self._keeper.stdin is not None
            self._keeper.stdin.write(json.dumps(task) + "\n")
            self._keeper.stdin.flush()

    def _start_keeper(self) -> subprocess.Popen[str]:
        # Its output goes to a file: a pipe of ours that it inherited would stay open after us.
        with (self._home / "leases" / "keeper.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "storage.lease_s3", self._url],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                text=True,
                start_new_session=True,
                cwd=Path(__file__).parents[1],
            )


def main() -> None:
    """Beat for every lease told on standard input, until none is held and the input has ended."""
    bucket = Bucket(sys.argv[1])
    kept: dict[str, dict[str, str]] = {}
    beaten: dict[str, float] = {}
    pending = b""
    is_open = True
    while is_open or kept:
        if not is_open:
            time.sleep(LOOK_SECONDS)
        elif select.select([sys.stdin], [], [], LOOK_SECONDS)[0]:
            told = os.read(sys.stdin.fileno(), 1 << 16)
            is_open = bool(told)
            *lines, pending = (pending + told).split(b"\n")
            for task in map(json.loads, lines):
                kept[task["fingerprint"]] = task
                beaten[task["fingerprint"]] = time.monotonic()
        for fingerprint in list(kept):
            if not _beat_through_outages(bucket, kept[fingerprint], beaten):
                del kept[fingerprint]


def _beat_through_outages(bucket: Bucket, task: dict[str, str], beaten: dict[str, float]) -> bool:
    """Beat; while the server cannot be reached, try again until the lease has run out anyway."""
    try:
        return _beat(bucket, task, beaten)
    except Exception:  # noqa: BLE001 - an outage has many types; it is told in the keeper's log
        traceback.print_exc()
        return time.monotonic() - beaten[task["fingerprint"]] < LEASE_SECONDS


def _beat(bucket: Bucket, task: dict[str, str], beaten: dict[str, float]) -> bool:
    """Rewrite one lease when it is time; False when it has ended or is no longer ours."""
    fingerprint = task["fingerprint"]
    key = key_of(fingerprint)
    lock = leases.acquire(Path(task["lock"]))
    if lock is not None:
        try:
            stored = bucket.get(key)
            if stored and stored.etag == task["etag"]:
                bucket.delete([key])
        finally:
            lock.release()
        return False
    if time.monotonic() - beaten[fingerprint] < BEAT_SECONDS:
        return True
    stored = bucket.get(key)
    if stored is None or stored.etag != task["etag"]:
        return False
    fresh = json.dumps({**json.loads(stored.content), "beat": uuid.uuid4().hex}).encode()
    etag = bucket.put(key, fresh, if_etag=task["etag"])
    if etag is None and (stored := bucket.get(key)) and stored.content == fresh:
        etag = stored.etag  # the client repeated a put whose answer was lost: it is ours
    beaten[fingerprint] = time.monotonic()
    task["etag"] = etag or ""
    return etag is not None


def home_id(home: Path) -> str:
    """A name for a home, or the cache folder of one, that no other has; made on the first call."""
    path = home / "home.id"
    try:
        return path.read_text("utf-8")
    except FileNotFoundError:
        home.mkdir(parents=True, exist_ok=True)
        fresh = home / f".home.{uuid.uuid4().hex}"
        fresh.write_text(uuid.uuid4().hex, "utf-8")
        try:
            path.hardlink_to(fresh)
        except FileExistsError:
            pass
        finally:
            fresh.unlink()
        return path.read_text("utf-8")


if __name__ == "__main__":
    main()
