"""Outside files: what a stage reads from beyond the store, as an ordered list of landings.

A landing is what arrived together. The first look at a source is one landing; files that appear later
are appended as further ones, recorded in the source's ledger, so that work done on earlier landings
stays valid. Files enter identity by content, format and place in the list, never by path or name.
"""

import itertools
import json
import os
import sqlite3
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conf.settings import SourceSpec
from storage import lease as leases
from storage.artifact import Artifact
from storage.bucket import Bucket
from storage.fetched import SCHEME, Remote, fetched, list_remote
from storage.identity import hash_file
from storage.store_local import write_atomically

_CODE = "py c h cc cpp hpp cs java kt scala go rs swift js mjs ts jsx tsx php rb pl lua r jl sh sql css vue"
FORMATS = {
    "warc": "warc", "arc": "warc", "html": "html", "htm": "html", "xhtml": "html", "tar": "html",
    "tgz": "html", "jsonl": "jsonl", "ndjson": "jsonl", "json": "json", "parquet": "parquet",
    "csv": "csv", "tsv": "csv", "txt": "text", "text": "text", "md": "markdown",
    "markdown": "markdown", "wet": "warc", "wat": "wat", "tex": "latex", "latex": "latex",
    **dict.fromkeys(_CODE.split(), "code"),
}  # fmt: skip
COMPRESSIONS = ("gz", "zst", "xz", "bz2")
LEDGER_WAIT_SECONDS = 60.0
FOLDER_DOMAIN = "{folder}"
SETTLED_NS = 2_000_000_000
"""A file changed less than this before it was hashed may change again within its time stamp."""
HASH_THREADS = 4
SAVED_TOGETHER = 256
"""Files that are hashed before their hashes are kept: a first look that is broken off loses no more."""

Key = tuple[str, str, int]
"""Digest, format and index of the spec: what of a file enters identity."""


@dataclass(frozen=True)
class SourceFile:
    """One outside file."""

    path: Path
    """Where it lies on this machine; for one on S3, where its copy does while it is `fetched`."""
    name: str
    """Its path below the folder or glob that named it, with `/`; for people."""
    size: int
    digest: str
    """xxh3-128 of its bytes, hexadecimal."""
    format: str
    """Layout, never `auto`."""
    spec: SourceSpec
    """How to read it; a domain that was `{folder}` is the name of the file's folder here."""
    spec_index: int
    """Place of `spec` among the source's specs."""
    has_folder_domain: bool = False
    """Whether the domain comes from the folder, and so is not told by the settings."""
    remote: Remote | None = None
    """The object on S3 that it is."""
    span: tuple[int, int] | None = None
    """The piece of it that is read: bytes, or row groups of Parquet; none: all of it."""

    @contextmanager
    def fetched(self) -> Generator[Path]:
        """Its place on this machine, as long as the context lasts; a file on S3 is copied there.

        Raises FileNotFoundError where it was replaced or removed since it was listed.
        """
        with fetched(self.remote, self.path) if self.remote else nullcontext():
            yield self.path

    @property
    def key(self) -> Key:
        """What of the file enters identity."""
        format_ = f"{self.format}@{self.spec.domain}" if self.has_folder_domain else self.format
        return self.digest, format_, self.spec_index


@dataclass(frozen=True)
class Landing:
    """Files that arrived together, in a fixed order."""

    files: tuple[SourceFile, ...]


@dataclass(frozen=True)
class Source:
    """Everything that one setting names, landing by landing."""

    landings: tuple[Landing, ...] = ()

    @property
    def files(self) -> Iterator[SourceFile]:
        """Every file, in landing order."""
        for landing in self.landings:
            yield from landing.files

    def identity(self) -> list[list[list[Any]]]:
        """Per landing, per file: digest, format, index of its spec."""
        return [[list(file.key) for file in landing.files] for landing in self.landings]


@dataclass
class HashCache:
    """Hashes of files by path, size, times and inode, so that an unchanged file costs one stat.

    Kept in one SQLite file, shared by processes; with no path it lives in memory.
    """

    path: Path | None = None
    _known: dict[str, tuple[str, str]] = field(default_factory=dict[str, tuple[str, str]])
    _is_loaded: bool = False

    def digests(self, paths: Sequence[Path]) -> list[tuple[int, str]]:
        """Size and xxh3-128 of every file, hashing only those that changed."""
        stats = {str(path): path.stat() for path in paths}
        now = time.time_ns()
        found = self.measured(
            {
                path: f"{s.st_size}:{s.st_mtime_ns}:{s.st_ctime_ns}:{s.st_ino}:{s.st_dev}"
                for path, s in stats.items()
            },
            lambda path: hash_file(Path(path)),
            is_settled=lambda path: (
                now - max(stats[path].st_mtime_ns, stats[path].st_ctime_ns) > SETTLED_NS
            ),
        )
        return [(stats[str(path)].st_size, found[str(path)]) for path in paths]

    def measured(
        self,
        states: Mapping[str, str],
        measure: Callable[[str], str],
        is_settled: Callable[[str], bool] = lambda place: True,
    ) -> dict[str, str]:
        """Digest of every place, by its state; measured where that is new, kept where it is settled."""
        self._load()
        found = {
            place: self._known[place][1]
            for place, state in states.items()
            if self._known.get(place, ("", ""))[0] == state
        }
        stale = [place for place in states if place not in found]
        with ThreadPoolExecutor(HASH_THREADS) as pool:
            for start in range(0, len(stale), SAVED_TOGETHER):
                places = stale[start : start + SAVED_TOGETHER]
                fresh = dict(zip(places, pool.map(measure, places), strict=True))
                found |= fresh
                self._save({p: (states[p], digest) for p, digest in fresh.items() if is_settled(p)})
        return found

    def _load(self) -> None:
        if self._is_loaded or self.path is None or not self.path.exists():
            return
        with closing(self._connect(self.path)) as connection:
            # As bytes: the name of a file may be no UTF-8.
            wanted = "select cast(path as blob), state, digest from hashes"
            rows = connection.execute(wanted).fetchall()
        self._known |= {os.fsdecode(path): (state, digest) for path, state, digest in rows}
        self._is_loaded = True

    def _save(self, fresh: Mapping[str, tuple[str, str]]) -> None:
        self._known |= fresh
        if self.path is None or not fresh:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with closing(self._connect(self.path)) as connection, connection:
            connection.executemany(
                "insert or replace into hashes values (cast(? as text), ?, ?)",
                [(os.fsencode(path), state, digest) for path, (state, digest) in fresh.items()],
            )

    @staticmethod
    def _connect(path: Path) -> sqlite3.Connection:
        connection = sqlite3.connect(path, timeout=30.0)
        connection.execute(
            "create table if not exists hashes (path text primary key, state text, digest text)"
        )
        return connection


@dataclass(frozen=True)
class Book:
    """What a ledger says, and the state in which it said so."""

    landings: list[list[dict[str, Any]]]
    etag: str | None = None

    def known(self) -> list[list[Key]]:
        """Digest, format and spec of the files of each landing."""
        return [
            [(e["digest"], e["format"], e["spec"]) for e in landing] for landing in self.landings
        ]


@dataclass(frozen=True)
class SourceLedger:
    """Which file came in which landing, by content: a JSON file in the store's folder `sources`.

    For a store on S3 it is an object that all machines share, written on condition that nobody else
    has; the file beside it then serves as this machine's lock.
    """

    path: Path
    bucket: Bucket | None = None
    key: str = ""

    def read(self) -> Book:
        """The landings so far; none before the first look."""
        if self.bucket and (stored := self.bucket.get(self.key)):
            return Book(json.loads(stored.content)["landings"], stored.etag)
        # Beside a bucket without one, a file is of a version that kept a ledger on each machine.
        if not self.path.exists():
            return Book([])
        return Book(json.loads(self.path.read_text("utf-8"))["landings"])

    def append(self, book: Book, files: Sequence[SourceFile]) -> bool:
        """Record files as a new landing; False when another machine wrote since `book` was read."""
        landing = [
            {
                "digest": file.digest,
                "format": file.format,
                "spec": file.spec_index,
                "name": file.name,
                "size": file.size,
            }
            for file in files
        ]
        landings = {"landings": [*book.landings, landing]}
        content = json.dumps(landings, ensure_ascii=False, indent=1).encode()
        if self.bucket is None:
            write_atomically(self.path, content)
            return True
        is_first = book.etag is None
        return self.bucket.put(self.key, content, if_absent=is_first, if_etag=book.etag) is not None


def resolve(
    specs: Sequence[SourceSpec],
    *,
    artifacts: Mapping[str, Artifact],
    base: Path,
    ledger: SourceLedger | Path | None,
    hashes: HashCache,
    appends: bool = True,
) -> Source:
    """The files that the specs name, in the landings of the ledger; new ones make a new landing.

    A file is known again by its content, also under another name or in another folder. Without a
    ledger all files are one landing; with `appends` off (planning) the ledger is only read. Files
    that are gone leave their landing. Raises ValueError for a spec that matches no file.
    """
    files = [
        file
        for index, spec in enumerate(specs)
        for file in _files_of(spec, index, artifacts=artifacts, base=base, hashes=hashes)
    ]
    if ledger is None:
        return Source((Landing(tuple(files)),) if files else ())
    ledger = ledger if isinstance(ledger, SourceLedger) else SourceLedger(ledger)
    # Without the lock: a store that nobody may write to can be read.
    landings, new = _into_landings(files, ledger.read().known())
    if new and appends:
        with _only_writer(ledger.path):
            while new:
                book = ledger.read()
                landings, new = _into_landings(files, book.known())
                if new and ledger.append(book, new):
                    break
    if new:
        landings.append(new)
    return Source(tuple(Landing(tuple(landing)) for landing in landings if landing))


def format_of(name: str, declared: str) -> str:
    """Layout of a file: the declared one, or by its name when that is `auto`."""
    if declared != "auto":
        return declared
    endings = name.lower().split("/")[-1].split(".")[1:]
    while endings and endings[-1] in COMPRESSIONS:
        endings.pop()
    if not endings:
        return "text"
    if endings[-1] not in FORMATS:
        raise ValueError(
            f"{name}: no layout is known for .{endings[-1]}; give the source a `format`, or name "
            f"the files more closely (known: {', '.join(sorted(FORMATS))})"
        )
    return FORMATS[endings[-1]]


def _files_of(
    spec: SourceSpec,
    index: int,
    *,
    artifacts: Mapping[str, Artifact],
    base: Path,
    hashes: HashCache,
) -> list[SourceFile]:
    found = (
        _remote_files(spec.path, hashes)
        if spec.path.startswith(SCHEME) and spec.node is None
        else _local_files(spec, artifacts=artifacts, base=base, hashes=hashes)
    )
    if not found and not spec.is_optional:
        outside = "there" if spec.path.startswith(SCHEME) else f"below {base}"
        where = f"in the files of node {spec.node!r}" if spec.node else outside
        raise ValueError(
            f"source {spec.path}: no file found {where}, at least one expected; correct the path, "
            "or set is_optional: true"
        )
    by_folder = spec.domain == FOLDER_DOMAIN
    return [
        SourceFile(
            path=place.path,
            name=place.name,
            size=place.size,
            digest=place.digest,
            format=format_of(place.name, spec.format),
            spec=spec.model_copy(update={"domain": place.folder}) if by_folder else spec,
            spec_index=index,
            has_folder_domain=by_folder,
            remote=place.remote,
        )
        for place in found
    ]


@dataclass(frozen=True)
class _Found:
    """A file that a spec names."""

    path: Path
    name: str
    size: int
    digest: str
    folder: str
    """Name of the folder that it lies in."""
    remote: Remote | None = None


def _local_files(
    spec: SourceSpec, *, artifacts: Mapping[str, Artifact], base: Path, hashes: HashCache
) -> list[_Found]:
    known: dict[str, tuple[int, str]] = {}
    if spec.node is not None:
        if spec.node not in artifacts:
            raise ValueError(
                f"source {spec.path}: node {spec.node!r} gave no artifact; name a node of the recipe"
            )
        artifact = artifacts[spec.node]
        base = artifact.files
        known = {str(base / e.name): (e.size, e.xxh3) for e in artifact.record.files}
    root, paths = files_matching(spec.path, base)
    unknown = [path for path in paths if str(path) not in known]
    known |= {str(p): found for p, found in zip(unknown, hashes.digests(unknown), strict=True)}
    return [
        _Found(
            path,
            _readable(path.relative_to(root).as_posix()),
            *known[str(path)],
            _readable(path.parent.name),
        )
        for path in paths
    ]


def _readable(name: str) -> str:
    """A file's name as text: of bytes that are no UTF-8 in GB18030, as old Chinese systems wrote them, or
    with these bytes escaped."""
    content = os.fsencode(name)
    for encoding in ("utf-8", "gb18030"):
        with suppress(UnicodeDecodeError):
            return content.decode(encoding)
    return content.decode("utf-8", "backslashreplace")


def _remote_files(pattern: str, hashes: HashCache) -> list[_Found]:
    """Files on S3: the first look at one fetches it, to know it by its content; later ones cost a
    listing."""
    if hashes.path is None:
        raise ValueError(f"source {pattern}: S3 needs a folder for copies; give the hashes a path")
    folder = hashes.path.parent / "fetched"
    listed = {remote.url: remote for remote in list_remote(pattern)}

    def measure(url: str) -> str:
        place = listed[url].place(folder)
        with fetched(listed[url], place):
            return hash_file(place)

    digests = hashes.measured({url: remote.state for url, remote in listed.items()}, measure)
    return [
        _Found(
            remote.place(folder),
            remote.name,
            remote.size,
            digests[url],
            url.rsplit("/", 2)[1],
            remote,
        )
        for url, remote in listed.items()
    ]


def files_matching(pattern: str, base: Path) -> tuple[Path, list[Path]]:
    """The folder from which a path, folder or glob names files, and the files, by name."""
    parts = Path(pattern).expanduser().parts
    whole = base.absolute().joinpath(*parts)
    if whole.is_file():
        return whole.parent, [whole]
    if whole.is_dir():
        return whole, _sorted(whole, whole.rglob("*"))
    fixed = list(itertools.takewhile(lambda part: not any(c in "*?[" for c in part), parts))
    root = base.absolute().joinpath(*fixed)
    below = "/".join(parts[len(fixed) :])
    if not below or not root.is_dir():
        return root, []
    matches = list(root.glob(below))
    folders = [] if "**" in below else [match for match in matches if match.is_dir()]
    return root, _sorted(root, [*matches, *(f for folder in folders for f in folder.rglob("*"))])


def _sorted(root: Path, paths: Iterable[Path]) -> list[Path]:
    """Plain files that are not hidden, once each, in byte order of their names."""
    named = {path.relative_to(root).as_posix(): path for path in paths if path.is_file()}
    return [
        named[name]
        for name in sorted(named, key=os.fsencode)
        if not any(part.startswith(".") for part in name.split("/"))
    ]


def _into_landings(
    files: Sequence[SourceFile], book: Sequence[Sequence[Key]]
) -> tuple[list[list[SourceFile]], list[SourceFile]]:
    """Files by the ledger's landings and order, and those that the ledger does not know."""
    waiting: dict[Key, list[SourceFile]] = defaultdict(list)
    for file in files:
        waiting[file.key].append(file)
    landings = [[waiting[key].pop(0) for key in keys if waiting[key]] for keys in book]
    left = {id(file) for rest in waiting.values() for file in rest}
    return landings, [file for file in files if id(file) in left]


@contextmanager
def _only_writer(ledger: Path) -> Generator[None]:
    """Hold the ledger's lock, so that two runs cannot both append the same landing."""
    path = ledger.with_suffix(".lock")
    deadline = time.monotonic() + LEDGER_WAIT_SECONDS
    while (lease := leases.acquire(path)) is None:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path} has been held for {LEDGER_WAIT_SECONDS:.0f} s")
        time.sleep(0.02)
    try:
        yield
    finally:
        lease.release()
