"""The artifact store: what exists is what it holds under a fingerprint.

Layout of a store's folder (its home)::

    artifacts/<fingerprint>/{files,logs,record.json}    committed; never changed in place
    attempts/<fingerprint>/<n>/{files,logs,state}       being built, or left by a failure, to be resumed
    leases/<fingerprint>.lock                           flock: who works on it
    quarantine/<fingerprint>.<id>/ (+ reason.txt)       damaged, kept to be looked at until gc
    sources/                                            ledgers of the landings of each source
    noted/<run>.<home>.json                             fingerprints of the newest runs of each home
    trash/                                              taken away, being removed

A store on S3 (`s3://bucket/prefix`) keeps `artifacts/<fingerprint>/<attempt>/...`, the record that
names the attempt, `leases/<fingerprint>.json`, `sources/` and `noted/`; its cache folder is a home of the
same layout in which everything is read and built. The connection is configured as for any S3 client
(`AWS_ENDPOINT_URL`, `AWS_ACCESS_KEY_ID`, ...).

Moving the folder or the bucket changes no fingerprint and no digest: nothing in a record is a path.
"""

import json
import logging
import threading
import uuid
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from storage import lease as leases
from storage import store_local as local
from storage.errors import DamagedArtifact
from storage.identity import fingerprint as fingerprint_of
from storage.lease_s3 import RemoteLease
from storage.record import FileEntry, Record
from storage.source import SourceLedger
from storage.store_s3 import Remote

PARTS_BUILT = "parts.txt"
"""In an attempt's `state/`: fingerprints of parts already committed for it, so that gc keeps them."""

NOTES = "noted"
NOTED_RUNS = 20
"""Runs of each home whose artifacts are kept by gc of the others that share the store."""
LOOK_THREADS = 16

_log = logging.getLogger("bessemer.store")
_verified: set[tuple[str, int, int, str]] = set()
_verified_lock = threading.Lock()


@dataclass(frozen=True)
class Removed:
    """Something that gc took away, or would take."""

    what: str
    """`artifact`, `attempt`, `quarantine`, `trash`, `upload` (S3) or `cached` (the copy of one)."""
    fingerprint: str
    kind: str
    size: int
    """Bytes."""


class Claim:
    """The right to build one fingerprint, and the attempt to build it in; leaving frees the lease."""

    def __init__(
        self,
        fingerprint: str,
        path: Path,
        lease: leases.FileLease,
        remote_lease: RemoteLease | None,
        *,
        is_resumed: bool,
    ) -> None:
        self.fingerprint = fingerprint
        self.path = path
        self.is_resumed = is_resumed
        """Whether the attempt was begun earlier, by someone who is gone."""
        self._lease = lease
        self._remote_lease = remote_lease

    @property
    def lease_fd(self) -> int | None:
        """Descriptor that holds the lease; a child that inherits it keeps the lease after us."""
        return self._lease.fd

    @property
    def is_held(self) -> bool:
        """Whether this process still holds its copy of the lease."""
        return self._lease.fd is not None

    def release(self) -> None:
        """Free the lease; the attempt stays, to be resumed, unless there is nothing in it."""
        if not self.is_held:
            return
        if self.path.is_dir() and not local.has_files(self.path):
            for name in ("files", "logs", "state"):
                local.remove_if_empty(self.path / name)
            local.remove_if_empty(self.path)
            local.remove_if_empty(self.path.parent)
        self._lease.release()
        if self._remote_lease:
            self._remote_lease.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def open_store(url: str, *, cache: Path | None = None) -> "Store":
    """The store at a folder, or at `s3://bucket/prefix` with `cache` as its local folder."""
    return Store(url, cache=cache)


class Store:
    """Artifacts by fingerprint; safe for any number of processes at once."""

    def __init__(self, root: str | Path, *, cache: Path | None = None) -> None:
        """Raises ValueError for an S3 address without a cache folder, or another kind of address."""
        self.url = str(root)
        self.cache = cache
        self._remote: Remote | None = None
        if self.url.startswith("s3://"):
            if cache is None:
                raise ValueError(f"{self.url} needs a local folder too; give the store a cache")
            self.root = cache.absolute()
            self._remote = Remote(self.url, self.root, self.quarantine)
        elif "://" in self.url:
            raise ValueError(f"{self.url} is no store; give a folder or s3://bucket/prefix")
        else:
            self.root = Path(root).expanduser().absolute()
            self.url = str(self.root)
        self._trash = self.root / "trash"
        self.set_aside: dict[str, str] = {}
        """Fingerprint -> why, of what this store object has found damaged and moved to quarantine."""

    def path_of(self, fingerprint: str) -> Path:
        """Where an artifact lies when it exists."""
        return self.root / "artifacts" / _checked(fingerprint)

    def ledger(self, name: str) -> SourceLedger:
        """The ledger of a source; on S3 one for all machines."""
        path = self.root / "sources" / name
        if self._remote:
            return SourceLedger(path, self._remote.bucket, f"sources/{name}")
        return SourceLedger(path)

    def find_all(self, fingerprints: Sequence[str]) -> list[Path | None]:
        """`find` for many, in order."""
        return list(self._each(self.find, list(fingerprints)))

    def find(self, fingerprint: str) -> Path | None:
        """Folder of a sound artifact, judged by names, sizes and the presence of its parts.

        One with missing or resized files goes to quarantine. One whose own files are sound but
        whose part is missing is only not found: when the part is rebuilt, it is whole again.
        """
        return self._find(fingerprint, set())

    def record(self, fingerprint: str) -> Record | None:
        """The record of an artifact, whatever state its files are in; None when there is none."""
        if self._remote:
            stored = self._remote.record(_checked(fingerprint))
            return stored.record if stored else None
        return self._read_record(fingerprint)

    def records(self) -> Iterator[Record]:
        """The record of every artifact, in no order."""
        if self._remote is None:
            yield from filter(None, map(self.record, self._fingerprints()))
            return
        with ThreadPoolExecutor(LOOK_THREADS) as pool:
            yield from filter(None, pool.map(self.record, self._fingerprints()))

    def claim(self, fingerprint: str) -> Claim | None:
        """Take the lease of a fingerprint, and its newest unfinished attempt or a fresh one.

        None when someone alive holds the lease. An attempt that was killed in the middle of its
        commit is committed first, so look with `find` again before building.
        """
        lease = leases.acquire(self._lease_path(fingerprint))
        if lease is None:
            return None
        remote_lease = None
        try:
            if self._remote:
                remote_lease = self._remote.acquire(fingerprint, self._lease_path(fingerprint))
                if remote_lease is None:
                    lease.release()
                    return None
            path = self._attempt(fingerprint)
        except BaseException:
            # Or this very process would wait for itself when it tries again.
            lease.release()
            if remote_lease:
                remote_lease.release()
            raise
        return Claim(fingerprint, path, lease, remote_lease, is_resumed=local.has_files(path))

    def commit(self, claim: Claim, record: Record, *, replace: bool = False) -> Path:
        """Make the attempt's `files` and `logs` the artifact, in one atomic step; the path of it.

        Fills `record.files` and `record.digest`. The first commit wins: where a sound artifact is
        there already, ours is dropped and the path of the winner returned, unless `replace`.
        Raises ValueError for a claim that was released, or another fingerprint's record.
        """
        if not claim.is_held:
            raise ValueError(f"the lease of {claim.fingerprint} was released; claim it to commit")
        if record.fingerprint != claim.fingerprint:
            raise ValueError(
                f"record of {record.fingerprint} for a claim of {claim.fingerprint}; commit each "
                "result under its own claim"
            )
        entries = local.entries_of(claim.path / "files")
        full = record.model_copy(
            update={
                "files": entries,
                "digest": local.digest_of(entries),
                "created": record.created or datetime.now(UTC).isoformat(timespec="seconds"),
            }
        )
        local.flush_tree(claim.path / "files")
        local.flush_tree(claim.path / "logs")
        # From here on the attempt counts as complete: a claim after a crash publishes it.
        local.write_atomically(
            claim.path / local.RECORD, full.model_dump_json(indent=1).encode("utf-8")
        )
        return self._publish(claim.path, full, replace=replace)

    def verify(self, fingerprint: str, full: bool = False) -> list[str]:
        """What is wrong with an artifact, in words; empty when it is sound.

        Names, sizes, the digest and the presence of its parts; with `full` every byte of its own
        files. The bytes of its parts belong to the parts, which are artifacts of their own.
        """
        record = self.record(fingerprint)
        if record is None:
            return ["record.json: missing; nothing is stored under this fingerprint"]
        wrong = self._wrong(record, full=full)
        if local.digest_of(record.files) != record.digest:
            wrong.append("record.json: its digest is not that of the files it lists")
        if record.identity and fingerprint_of(record.identity) != fingerprint:
            wrong.append("record.json: its identity does not have this fingerprint")
        wrong += [f"part {part}: missing" for part in record.parts if self.record(part) is None]
        return wrong

    def verify_input(self, fingerprint: str) -> None:
        """Check every byte of an artifact and its parts before a stage reads it.

        A file is hashed once per process, and again when its size or time changes. What is damaged
        goes to quarantine. Raises DamagedArtifact naming the files.
        """
        path = self.find(fingerprint)
        record = local.read_record(path) if path else None
        if path is None or record is None:
            raise DamagedArtifact(
                f"{fingerprint} is missing from the store, or a file or a part of it is; "
                "run again to rebuild it"
            )
        fresh = [entry for entry in record.files if _state(path, entry) not in _verified]
        if wrong := local.wrong_bytes(path, fresh):
            self._drop_damaged(fingerprint, "; ".join(wrong))
            raise DamagedArtifact(
                f"{record.stage} {fingerprint}: {'; '.join(wrong)}; it was moved to quarantine, "
                "run again to rebuild it"
            )
        with _verified_lock:
            _verified.update(_state(path, entry) for entry in fresh)
        for part in record.parts:
            self.verify_input(part)

    def quarantine(self, fingerprint: str, reason: str) -> Path:
        """Take a damaged artifact out of the store and keep it, with the reason; where it is now."""
        target = self.root / "quarantine" / f"{_checked(fingerprint)}.{uuid.uuid4().hex[:8]}"
        target.parent.mkdir(parents=True, exist_ok=True)
        if self._remote:
            self._remote.quarantine(fingerprint, target.name, reason)
        try:
            local.try_rename(self.path_of(fingerprint), target)
        except FileNotFoundError:
            # Only on S3, or somebody else was faster; the reason is kept in either case.
            target.mkdir(exist_ok=True)
        local.write_atomically(target / "reason.txt", f"{reason}\n".encode())
        self.set_aside[fingerprint] = reason
        _log.warning("artifact %s is damaged and was moved aside: %s", fingerprint, reason)
        return target

    def gc(self, keep: Iterable[str], *, dry_run: bool) -> list[Removed]:
        """Remove what neither `keep`, a part of it, nor work in progress needs; what was removed.

        Kept are the given artifacts with their parts, their attempts, every attempt whose lease is
        held, and the parts already committed for a kept attempt.
        """
        from storage.collect import collect

        return collect(self, keep, dry_run=dry_run)

    def note_run(
        self, home: str, run_id: str, fingerprints: Iterable[str], *, going: Container[str] = ()
    ) -> None:
        """Have gc by others who share the store keep what a run of a home has made or found; notes of older
        runs go, but for those of runs that are still `going`."""
        self._write_note(f"{run_id}.{home}.json", json.dumps(sorted(fingerprints)).encode())
        ours = sorted(name for name in self._notes() if name.endswith(f".{home}.json"))
        for name in ours[:-NOTED_RUNS]:
            if name.partition(".")[0] in going:
                continue
            if self._remote:
                self._remote.bucket.delete([f"{NOTES}/{name}"])
            else:
                (self.root / NOTES / name).unlink(missing_ok=True)

    def noted_by_others(self, home: str) -> set[str]:
        """Fingerprints that the newest runs of other homes have noted."""
        return {
            fingerprint
            for name in self._notes()
            if not name.endswith(f".{home}.json")
            for fingerprint in json.loads(self._read_note(name))
        }

    def _notes(self) -> list[str]:
        if self._remote:
            return self._remote.bucket.names(f"{NOTES}/")
        # A draft begins with a full stop.
        return [path.name for path in (self.root / NOTES).glob("[!.]*.json")]

    def _write_note(self, name: str, content: bytes) -> None:
        if self._remote:
            self._remote.bucket.put(f"{NOTES}/{name}", content)
        else:
            local.write_atomically(self.root / NOTES / name, content)

    def _read_note(self, name: str) -> bytes:
        """A note; an empty one where its home has just removed it."""
        if self._remote:
            stored = self._remote.bucket.get(f"{NOTES}/{name}")
            return stored.content if stored else b"[]"
        try:
            return (self.root / NOTES / name).read_bytes()
        except FileNotFoundError:
            return b"[]"

    @property
    def is_remote(self) -> bool:
        """Whether artifacts live on S3 and `root` only has copies of them."""
        return self._remote is not None

    @property
    def remote(self) -> Remote | None:
        """The objects of a store on S3, for gc."""
        return self._remote

    def is_claimed(self, fingerprint: str) -> bool:
        """Whether someone alive holds the lease of a fingerprint."""
        if leases.is_held(self._lease_path(fingerprint)):
            return True
        return self._remote is not None and self._remote.is_claimed(fingerprint)

    def _find(self, fingerprint: str, seen: set[str]) -> Path | None:
        path = self.path_of(fingerprint)
        if self._remote and not self._remote.fetch(fingerprint, path):
            return None
        record = self._read_record(fingerprint)
        if record is None:
            return None
        if wrong := local.wrong_names_and_sizes(path, record):
            if self._was_replaced(path, record):
                return self._find(fingerprint, seen)
            self.quarantine(fingerprint, "; ".join(wrong))
            return None
        seen.add(fingerprint)
        parts = [part for part in record.parts if part not in seen]
        return path if all(self._each(lambda part: self._find(part, seen), parts)) else None

    def _read_record(self, fingerprint: str) -> Record | None:
        """The record at an artifact's place. What lies there without a readable one is set aside: the
        place would stay taken otherwise."""
        path = self.path_of(fingerprint)
        try:
            record = local.read_record(path)
            # Looked at twice: it may have been committed between the two looks.
            if record or not path.is_dir() or (record := local.read_record(path)):
                return record
            reason = f"{local.RECORD}: missing"
        except ValueError as error:
            reason = str(error)
        self.quarantine(fingerprint, reason)
        return None

    def _was_replaced(self, path: Path, record: Record) -> bool:
        """Whether another artifact took the place while we looked; then nothing is damaged."""
        try:
            return local.read_record(path) != record
        except ValueError:
            return False

    def _each(self, look: Callable[[str], Path | None], parts: list[str]) -> Iterable[Path | None]:
        """What `look` gives for each part; on S3 many at once, since each waits for the server."""
        if self._remote is None or len(parts) < 2:
            return map(look, parts)
        with ThreadPoolExecutor(LOOK_THREADS) as pool:
            return list(pool.map(look, parts))

    def _wrong(self, record: Record, *, full: bool) -> list[str]:
        if self._remote:
            return self._remote.wrong(record.fingerprint, full=full)
        path = self.path_of(record.fingerprint)
        wrong = local.wrong_names_and_sizes(path, record)
        if full:
            sound = [e for e in record.files if not any(f"/{e.name}:" in line for line in wrong)]
            wrong += local.wrong_bytes(path, sound)
        return wrong

    def _publish(self, attempt: Path, record: Record, *, replace: bool) -> Path:
        """The last step of a commit; also done for an attempt whose process died before it."""
        target = self.path_of(record.fingerprint)
        local.move_aside(attempt / "state", self._trash)
        if self._remote:
            if not self._remote.publish(attempt, record, replace=replace):
                return self._yield_to_winner(attempt, record)
            local.move_aside(target, self._trash)
        elif replace:
            # Between these two renames a reader finds nothing and waits for our lease; killed
            # between them, the next claim publishes the attempt.
            local.move_aside(target, self._trash)
        while not local.try_rename(attempt, target):
            if self.find(record.fingerprint) or target.exists():
                return self._yield_to_winner(attempt, record)
        local.remove_if_empty(attempt.parent)
        return target

    def _yield_to_winner(self, attempt: Path, record: Record) -> Path:
        winner = self.record(record.fingerprint)
        if winner and winner.digest != record.digest:
            _log.warning(
                "%s %s was built twice with different bytes; the first stays",
                record.stage,
                record.fingerprint,
            )
        local.move_aside(attempt, self._trash)
        local.remove_if_empty(attempt.parent)
        return self.find(record.fingerprint) or self.path_of(record.fingerprint)

    def _drop_damaged(self, fingerprint: str, reason: str) -> None:
        if self._remote and not self._remote.wrong(fingerprint, full=True):
            # Only the cached copy is damaged: without it the next find fetches a sound one.
            local.move_aside(self.path_of(fingerprint), self._trash)
            return
        self.quarantine(fingerprint, reason)

    def _attempt(self, fingerprint: str) -> Path:
        """The newest unfinished attempt, or a fresh one; one that only lacks its commit gets it first."""
        attempts = self._attempts(fingerprint)
        try:
            if attempts and (record := local.read_record(attempts[-1])):
                self._publish(attempts[-1], record, replace=False)
                attempts = self._attempts(fingerprint)
        except ValueError as error:
            _log.warning("the attempt goes on as one without a record: %s", error)
            (attempts[-1] / local.RECORD).unlink()
        path = self.root / "attempts" / fingerprint / (attempts[-1].name if attempts else "1")
        for name in ("files", "logs", "state"):
            (path / name).mkdir(parents=True, exist_ok=True)
        return path

    def _attempts(self, fingerprint: str) -> list[Path]:
        """Attempts of a fingerprint, oldest first."""
        place = self.root / "attempts" / _checked(fingerprint)
        found = [path for path in local.visible(place) if path.name.isdigit()]
        return sorted(found, key=lambda path: int(path.name))

    def _fingerprints(self) -> list[str]:
        if self._remote:
            return self._remote.fingerprints()
        return [path.name for path in local.visible(self.root / "artifacts")]

    def _lease_path(self, fingerprint: str) -> Path:
        return self.root / "leases" / f"{_checked(fingerprint)}.lock"


def _checked(fingerprint: str) -> str:
    if not fingerprint or not all(c.isalnum() or c in "-_" for c in fingerprint):
        raise ValueError(f"{fingerprint!r} is no fingerprint; it is 64 hexadecimal digits")
    return fingerprint


def _state(path: Path, entry: FileEntry) -> tuple[str, int, int, str]:
    place = path / "files" / entry.name
    status = place.stat()
    return str(place), status.st_size, status.st_mtime_ns, entry.xxh3
