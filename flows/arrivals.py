"""What has arrived whole in a folder or below an S3 address, known by its content.

A file that is still being written must start no run. Whether it is whole is told by time (it has not
changed for a while), by a file `_SUCCESS` beside or above it, or by a manifest beside it: a file
`manifest.json`, {"files": [{"name": "a.warc.gz", "bytes": 123}, ..]}, names relative to its folder.
"""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Literal, Protocol

from pydantic import BaseModel, ValidationError

from storage.bucket import Bucket
from storage.fetched import SCHEME, Remote, fetched, list_remote
from storage.identity import hash_file
from storage.source import HashCache

Wholeness = Literal["stable", "success", "manifest"]
"""How a file is known to be whole."""
SUCCESS = "_SUCCESS"
MANIFEST = "manifest.json"
UNFINISHED = (".part", ".partial", ".tmp", ".crdownload", ".filepart", ".download", "~")
"""Ends of the names that programs give to what they have not finished."""

State = tuple[int, str]
"""Bytes of a file, and what changes when it does."""


class _ManifestLine(BaseModel):
    name: str
    bytes: int


class _Manifest(BaseModel):
    files: list[_ManifestLine]


class Place(Protocol):
    """Where files arrive; names are relative to it, with `/`."""

    def states(self) -> dict[str, State]:
        """Every file that is not hidden."""
        ...

    def read(self, name: str) -> bytes:
        """Content of a small file."""
        ...

    def digests(self, states: Mapping[str, State]) -> dict[str, str]:
        """Hash of the content of files, without those that have changed since they had that state."""
        ...


class Folder:
    """A folder of this machine, with all below it."""

    def __init__(self, path: Path, hashes: HashCache) -> None:
        self._path, self._hashes = path, hashes

    def states(self) -> dict[str, State]:
        """Every file that is not hidden, by name."""
        found: dict[str, State] = {}
        for path in self._path.rglob("*"):
            name = path.relative_to(self._path)
            if path.is_file() and not any(part.startswith(".") for part in name.parts):
                found[name.as_posix()] = self._state(path)
        return found

    def read(self, name: str) -> bytes:
        """Content of a file."""
        return (self._path / name).read_bytes()

    def digests(self, states: Mapping[str, State]) -> dict[str, str]:
        """xxh3-128 of files, without those that changed meanwhile."""
        names = list(states)
        hashed = self._hashes.digests([self._path / name for name in names])
        return {
            name: digest
            for name, (_, digest) in zip(names, hashed, strict=True)
            if self._state(self._path / name) == states[name]
        }

    @staticmethod
    def _state(path: Path) -> State:
        state = path.stat()
        return state.st_size, f"{state.st_mtime_ns}:{state.st_ino}"


class Objects:
    """All objects below an S3 address; each is whole once it is there."""

    def __init__(self, url: str, hashes: HashCache, copies: Path) -> None:
        self._url, self._hashes, self._copies = url, hashes, copies
        self._listed: dict[str, Remote] = {}

    def states(self) -> dict[str, State]:
        """Every object that is not hidden, by name."""
        self._listed = {remote.name: remote for remote in list_remote(self._url)}
        return {name: (remote.size, remote.etag) for name, remote in self._listed.items()}

    def read(self, name: str) -> bytes:
        """Content of an object. Raises FileNotFoundError where it is gone."""
        stored = Bucket(self._listed[name].root).get(name)
        if stored is None:
            raise FileNotFoundError(self._listed[name].url)
        return stored.content

    def digests(self, states: Mapping[str, State]) -> dict[str, str]:
        """xxh3-128 of objects; one that has not been seen yet is fetched once."""
        remotes = {self._listed[name].url: self._listed[name] for name in states}

        def measure(url: str) -> str:
            place = remotes[url].place(self._copies)
            with fetched(remotes[url], place):
                return hash_file(place)

        wanted = {url: remote.state for url, remote in remotes.items()}
        found = self._hashes.measured(wanted, measure)
        return {remote.name: found[url] for url, remote in remotes.items()}


def open_place(place: str, hashes: HashCache, home: Path) -> Place:
    """The folder, or what is below the `s3://` address."""
    if place.startswith(SCHEME):
        return Objects(place, hashes, home / "fetched")
    return Folder(Path(place), hashes)


class Arrivals:
    """A place that is looked at again and again."""

    def __init__(
        self,
        place: Place,
        wholeness: Wholeness,
        settle_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._place, self._wholeness, self._clock = place, wholeness, clock
        self._settle_seconds = settle_seconds
        self._since: dict[str, tuple[State, float]] = {}

    def look(self) -> dict[str, str]:
        """Every file that is whole now: name -> hash of its content."""
        try:
            states = self._place.states()
            named = {name: state for name, state in states.items() if _is_named_finished(name)}
            if self._wholeness == "stable":
                whole = self._stable(named)
            elif self._wholeness == "manifest":
                whole = self._listed(named)
            else:
                whole = {n for n in named if any(f"{f}{SUCCESS}" in states for f in _above(n))}
            return self._place.digests({name: named[name] for name in whole if name in named})
        except FileNotFoundError:
            return {}  # something left while it was looked at; the next look sees what is there

    def _stable(self, states: Mapping[str, State]) -> set[str]:
        now = self._clock()
        known = self._since
        self._since = {
            name: known[name] if name in known and known[name][0] == state else (state, now)
            for name, state in states.items()
        }
        return {
            name for name, (_, since) in self._since.items() if now - since >= self._settle_seconds
        }

    def _listed(self, states: Mapping[str, State]) -> set[str]:
        """Files of the manifests all of whose files are there in full."""
        whole: set[str] = set()
        for name in states:
            if PurePosixPath(name).name != MANIFEST:
                continue
            folder = name.removesuffix(MANIFEST)
            try:
                manifest = _Manifest.model_validate_json(self._place.read(name))
            except (ValidationError, json.JSONDecodeError):
                continue  # it may be half written itself
            lines = {f"{folder}{line.name}": line.bytes for line in manifest.files}
            if all(line in states and states[line][0] == size for line, size in lines.items()):
                whole |= set(lines)
        return whole


def _is_named_finished(name: str) -> bool:
    file = PurePosixPath(name).name
    return file != SUCCESS and not file.endswith(UNFINISHED)


def _above(name: str) -> list[str]:
    """The folders that a file lies in, the nearest first, each as a prefix of names."""
    return ["" if str(f) == "." else f"{f}/" for f in PurePosixPath(name).parents]
