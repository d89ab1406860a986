"""Outside files on S3: what a pattern names there, and copies of them on this machine.

A copy lies in one folder that all processes of the machine share, named by the object's address, tag
and size. Who reads it holds a lock on it; when room is needed, copies that nobody holds go, the longest
unused first. So they take what `FETCHED_BYTES` allows, or as much as the files in use together need.
"""

import fcntl
import os
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

import xxhash

from storage.bucket import Bucket
from storage.lease import is_at

SCHEME = "s3://"
FETCHED_BYTES = "BESSEMER_FETCHED_BYTES"
"""Environment variable: bytes that copies may take on this machine."""
DEFAULT_BYTES = 32 << 30
_GLOB_SIGNS = "*?["


@dataclass(frozen=True)
class Remote:
    """An object on S3 as it was listed."""

    root: str
    """`s3://bucket/prefix` that its name starts from."""
    name: str
    """Its path below `root`, with `/`."""
    size: int
    etag: str

    @property
    def url(self) -> str:
        """Its whole address."""
        return f"{self.root}/{self.name}" if self.name else self.root

    @property
    def state(self) -> str:
        """What changes when its content does."""
        return f"{self.etag}:{self.size}"

    def place(self, folder: Path) -> Path:
        """Where its copy lies; it keeps its name, which tells how to read it."""
        address = xxhash.xxh3_64_hexdigest(f"{self.url}\n{self.etag}".encode())
        return folder / f"{address}-{self.size}" / PurePosixPath(self.url).name


def list_remote(pattern: str) -> list[Remote]:
    """The objects that an address, a prefix (as a folder) or a glob names, in byte order of names.

    Raises ValueError where the S3 client is not installed.
    """
    parts = pattern.removeprefix(SCHEME).strip("/").split("/")
    fixed = next((i for i, p in enumerate(parts) if any(c in p for c in _GLOB_SIGNS)), len(parts))
    root, below = SCHEME + "/".join(parts[:fixed]), parts[fixed:]
    found = Bucket(root).objects("")
    if not below and "" in found:
        folder, _, name = root.rpartition("/")
        return [Remote(folder, name, *found[""])]
    names = sorted(
        (name for name in found if name and _is_wanted(name.split("/"), below)), key=os.fsencode
    )
    return [Remote(root, name, *found[name]) for name in names]


def _is_wanted(name: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether a glob names a file or, without `**`, a folder above it; what is hidden is not."""
    if any(part.startswith(".") for part in name) or not name[-1]:
        return False
    if "**" in pattern:
        return _fits(name, pattern)
    return len(name) >= len(pattern) and _fits(name[: len(pattern)], pattern)


def _fits(name: Sequence[str], pattern: Sequence[str]) -> bool:
    if not pattern:
        return not name
    if pattern[0] == "**":
        return any(_fits(name[start:], pattern[1:]) for start in range(len(name) + 1))
    return bool(name) and fnmatchcase(name[0], pattern[0]) and _fits(name[1:], pattern[1:])


@contextmanager
def fetched(remote: Remote, place: Path) -> Generator[None]:
    """Have the copy of an object at its `place`, as long as the context lasts.

    Raises FileNotFoundError where the object is gone or is no longer the one that was listed.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    while True:
        descriptor = os.open(place, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            if _is_held_whole(descriptor, place, remote):
                os.utime(place)
                yield
                break
        finally:
            os.close(descriptor)
    _make_room(place.parents[1])


def _is_held_whole(descriptor: int, place: Path, remote: Remote) -> bool:
    """Lock a copy against removal, fetching it first where it is not whole; False: to be tried again,
    because it was removed meanwhile."""
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    if os.fstat(descriptor).st_size != remote.size:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if is_at(descriptor, place) and os.fstat(descriptor).st_size != remote.size:
            _make_room(place.parents[1])
            _download(remote, descriptor)
        # Going from the one lock to the other, a file is free for a moment.
        fcntl.flock(descriptor, fcntl.LOCK_SH)
    return is_at(descriptor, place) and os.fstat(descriptor).st_size == remote.size


def _download(remote: Remote, descriptor: int) -> None:
    os.truncate(descriptor, 0)
    with os.fdopen(os.dup(descriptor), "wb") as stream:
        for chunk in Bucket(remote.root).chunks(remote.name, etag=remote.etag):
            stream.write(chunk)


def _make_room(folder: Path) -> None:
    """Remove copies that nobody holds until all, also those on their way, fit."""
    bound = int(os.environ.get(FETCHED_BYTES, DEFAULT_BYTES))
    sizes = {path: int(path.parent.name.split("-")[1]) for path in folder.glob("*/*")}
    total = sum(sizes.values())
    for path in sorted(sizes, key=_last_used):
        if total <= bound:
            return
        if _remove_unheld(path):
            total -= sizes[path]


def _last_used(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _remove_unheld(path: Path) -> bool:
    """Whether a copy is gone; one that somebody reads or fetches stays."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True
