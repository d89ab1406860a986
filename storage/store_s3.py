"""The store's steps on S3: upload under an own name, publish by one conditional put, fetch, check.

artifacts/<fingerprint>/<attempt>/{files,logs}/...    written before the record that names them
artifacts/<fingerprint>/record.json                   {"attempt": ..., "record": ...}; its put commits
leases/<fingerprint>.json                             see lease_s3
quarantine/<fingerprint>.<id>.json                    a damaged artifact's record, and the reason
"""

import json
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ValidationError

from storage import lease_s3
from storage import store_local as local
from storage.bucket import Bucket
from storage.lease_s3 import LeaseDesk, RemoteLease
from storage.record import FileEntry, Fingerprint, Record, inside

FETCH_TRIES = 3
FOLDERS = ("files", "logs")
"""What an artifact has beside its record."""
Found = tuple[str, str, str, int]


class _Envelope(BaseModel):
    """Content of record.json."""

    attempt: Fingerprint
    record: Record


@dataclass(frozen=True)
class StoredRecord:
    """A record, the attempt whose objects it names, and the etag to replace it by."""

    attempt: str
    record: Record
    etag: str

    @property
    def prefix(self) -> str:
        """Where the attempt's objects lie."""
        return f"artifacts/{self.record.fingerprint}/{self.attempt}/"


class Remote:
    """A store at `s3://bucket/prefix`, with `home` as the folder in which its artifacts are read."""

    def __init__(self, url: str, home: Path, on_damage: Callable[[str, str], object]) -> None:
        """`on_damage` is told of a damaged artifact, its fingerprint and what is wrong, to set it aside."""
        self.bucket = Bucket(url)
        """All objects of the store."""
        self._home = home
        self._on_damage = on_damage
        self._desk = LeaseDesk(url, self.bucket, home)

    def record(self, fingerprint: str) -> StoredRecord | None:
        """The record of an artifact, None when there is none that can be read."""
        stored = self.bucket.get(_record_key(fingerprint))
        if stored is None:
            return None
        try:
            content = _Envelope.model_validate_json(stored.content)
        except ValidationError as error:
            self._on_damage(fingerprint, f"record.json is not a record: {error}")
            return None
        return StoredRecord(content.attempt, content.record, stored.etag)

    def fingerprints(self) -> list[str]:
        """Everything that has objects, committed or not."""
        return self.bucket.names("artifacts/")

    def acquire(self, fingerprint: str, lock: Path) -> RemoteLease | None:
        """Take the lease among machines; the caller holds the local lock."""
        return self._desk.acquire(fingerprint, lock)

    def is_claimed(self, fingerprint: str) -> bool:
        """Whether any machine holds the lease."""
        return lease_s3.is_held(self.bucket, fingerprint)

    def claimed(self) -> set[str]:
        """Everything of which any machine holds the lease."""
        names = (name.removesuffix(".json") for name in self.bucket.names("leases/"))
        return {name for name in names if self.is_claimed(name)}

    def fetch(self, fingerprint: str, path: Path) -> bool:
        """Have a sound copy of an artifact at `path`; False when the store has no sound one."""
        for _ in range(FETCH_TRIES):
            stored = self.record(fingerprint)
            if stored is None:
                return False
            if wrong := self._wrong_sizes(stored):
                self._on_damage(fingerprint, "; ".join(wrong))
                return False
            if _is_copy(path, stored.record):
                return True
            try:
                wrong = self._download(stored, path)
            except FileNotFoundError:
                continue  # replaced while we read; the new record names other objects
            if wrong:
                self._on_damage(fingerprint, "; ".join(wrong))
                return False
            return True
        raise FileNotFoundError(f"{fingerprint} was replaced {FETCH_TRIES} times while it was read")

    def publish(self, attempt: Path, record: Record, *, replace: bool) -> bool:
        """Upload an attempt and commit it; False when a sound artifact was there first."""
        mine = StoredRecord(uuid.uuid4().hex[:16], record, "")
        for part in FOLDERS:
            names = local.list_files(attempt / part)
            self.bucket.upload(attempt / part, names, f"{mine.prefix}{part}/")
        content = json.dumps(
            {"attempt": mine.attempt, "record": record.model_dump(mode="json")}, ensure_ascii=False
        ).encode()
        key = _record_key(record.fingerprint)
        while self.bucket.put(key, content, if_absent=True) is None:
            winner = self.record(record.fingerprint)
            if winner is None:
                continue
            if winner.attempt == mine.attempt:
                return True  # the client repeated a put whose answer was lost
            if replace:
                if self.bucket.put(key, content, if_etag=winner.etag):
                    self._delete(winner.prefix)
                    return True
            elif wrong := self._wrong_sizes(winner):
                self._on_damage(record.fingerprint, "; ".join(wrong))
            else:
                self._delete(mine.prefix)
                return False
        return True

    def wrong(self, fingerprint: str, *, full: bool) -> list[str]:
        """What is wrong with an artifact's objects, in words; `full` reads every byte."""
        stored = self.record(fingerprint)
        if stored is None:
            return ["record.json: missing"]
        wrong = self._wrong_sizes(stored)
        if not full:
            return wrong
        return wrong + [
            f"files/{entry.name}: hash {found} found, {entry.xxh3} expected"
            for entry in stored.record.files
            if not any(line.startswith(f"files/{entry.name}:") for line in wrong)
            and (found := self.bucket.hash(f"{stored.prefix}files/{entry.name}")) != entry.xxh3
        ]

    def quarantine(self, fingerprint: str, name: str, reason: str) -> None:
        """Take an artifact's record away, and keep it with the reason until gc."""
        stored = self.bucket.get(_record_key(fingerprint))
        if stored is None:
            return
        kept = {"reason": reason, "stored": stored.content.decode("utf-8", "backslashreplace")}
        self.bucket.put(f"quarantine/{name}.json", json.dumps(kept, ensure_ascii=False).encode())
        self.bucket.delete([_record_key(fingerprint)])

    def collect(self, marked: set[str], claimed: set[str], *, dry_run: bool) -> Iterator[Found]:
        """Remove what is not marked: artifacts, uploads that no record names, quarantine.

        `claimed` is what any machine worked on when gc began.
        """
        # Another machine notes the parts of its running jobs only in its own home.
        is_anyone_at_work = bool(claimed or self.claimed())
        for fingerprint in self.fingerprints():
            if fingerprint in claimed or self.is_claimed(fingerprint):
                continue
            stored = self.record(fingerprint)
            if stored and fingerprint not in marked:
                if is_anyone_at_work and stored.record.kind == "part":
                    continue
                yield self._remove("artifact", stored, dry_run=dry_run)
            yield from self._collect_uploads(fingerprint, stored, dry_run=dry_run)
        for name in self.bucket.names("quarantine/"):
            if not dry_run:
                self.bucket.delete([f"quarantine/{name}"])
            yield "quarantine", name.partition(".")[0], "", 0

    def _remove(self, what: str, stored: StoredRecord, *, dry_run: bool) -> Found:
        size = sum(self.bucket.sizes(stored.prefix).values())
        if not dry_run:
            self.bucket.delete([_record_key(stored.record.fingerprint)])
            self._delete(stored.prefix)
        return what, stored.record.fingerprint, stored.record.kind, size

    def _collect_uploads(
        self, fingerprint: str, stored: StoredRecord | None, *, dry_run: bool
    ) -> Iterator[Found]:
        for attempt in self.bucket.names(f"artifacts/{fingerprint}/"):
            if attempt == "record.json" or (stored and attempt == stored.attempt):
                continue
            prefix = f"artifacts/{fingerprint}/{attempt}/"
            size = sum(self.bucket.sizes(prefix).values())
            if not dry_run:
                self._delete(prefix)
            yield "upload", fingerprint, "", size

    def _wrong_sizes(self, stored: StoredRecord) -> list[str]:
        found = self.bucket.sizes(f"{stored.prefix}files/")
        return [
            line
            for entry in stored.record.files
            if (line := _size_line(entry, found.get(entry.name)))
        ]

    def _download(self, stored: StoredRecord, path: Path) -> list[str]:
        """Copy an artifact to `path`; what is wrong with the bytes, in words."""
        names = {part: list(self.bucket.sizes(f"{stored.prefix}{part}/")) for part in FOLDERS}
        if wrong := _leading_out([name for part in FOLDERS for name in names[part]]):
            return wrong
        incoming = self._home / "trash" / f"incoming-{uuid.uuid4().hex}"
        for part in FOLDERS:
            (incoming / part).mkdir(parents=True)
            self.bucket.download(f"{stored.prefix}{part}/", names[part], incoming / part)
        if wrong := local.wrong_bytes(incoming, stored.record.files):
            local.move_aside(incoming, self._home / "trash")
            return wrong
        local.write_atomically(
            incoming / local.RECORD, stored.record.model_dump_json(indent=1).encode("utf-8")
        )
        if path.exists() and not _is_copy(path, stored.record):
            local.move_aside(path, self._home / "trash")
        if not local.try_rename(incoming, path):
            local.move_aside(incoming, self._home / "trash")  # another process fetched it too
        return []

    def _delete(self, prefix: str) -> None:
        self.bucket.delete(f"{prefix}{name}" for name in self.bucket.sizes(prefix))


def _record_key(fingerprint: str) -> str:
    return f"artifacts/{fingerprint}/record.json"


def _leading_out(names: list[str]) -> list[str]:
    """What an object's name would write elsewhere, in words: a bucket may hold any name."""
    wrong: list[str] = []
    for name in names:
        try:
            inside(name)
        except ValueError as error:
            wrong.append(str(error))
    return wrong


def _is_copy(path: Path, record: Record) -> bool:
    """Whether the folder holds that artifact, by record, names and sizes."""
    try:
        found = local.read_record(path)
    except ValueError:
        return False
    return found == record and not local.wrong_names_and_sizes(path, record)


def _size_line(entry: FileEntry, found: int | None) -> str | None:
    if found is None:
        return f"files/{entry.name}: missing, {entry.size} bytes expected"
    if found != entry.size:
        return f"files/{entry.name}: {found} bytes found, {entry.size} expected"
    return None
