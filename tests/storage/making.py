"""Making small artifacts, and breaking them."""

import json
import time
from pathlib import Path

from storage.identity import fingerprint
from storage.record import Record
from storage.store import Claim, Store


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
    """A claim; the keeper of a lease on S3 holds the lock for a moment when it looks who works."""
    end = time.monotonic() + 10
    while (claim := store.claim(address)) is None:
        assert time.monotonic() < end
        time.sleep(0.05)
    return claim


def make(
    store: Store,
    name: str,
    content: str = "文字 text",
    *,
    parts: list[str] | None = None,
    replace: bool = False,
    kind: str = "raw",
) -> str:
    """Commit an artifact of two files; its fingerprint."""
    record = record_of({"name": name}, parts).model_copy(update={"kind": kind})
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
