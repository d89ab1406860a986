"""The store's steps on a local folder: hash, check, flush, commit, move aside.

Each step is a rename or can be done again, so that a process killed between any two of them leaves
either the old state or an attempt that the next claim takes up.
"""

import hashlib
import os
import shutil
import stat
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from pydantic import ValidationError

from storage.identity import canonical_json, hash_file
from storage.record import FileEntry, Record

RECORD = "record.json"
HASH_THREADS = 4


def list_files(files: Path) -> list[str]:
    """Names of all files under a folder, relative, with `/`, sorted.

    Raises ValueError for a link or a device: what it points to is not in the artifact.
    """
    return sorted(name for name, _ in _walk(files))


def visible(folder: Path) -> list[Path]:
    """What lies in a folder, which need not be there, but for hidden files: file managers leave some."""
    if not folder.is_dir():
        return []
    return [path for path in folder.iterdir() if not path.name.startswith(".")]


def has_files(folder: Path) -> bool:
    """Whether anything but folders lies under a folder."""
    return any(names for _, _, names in os.walk(folder))


def entries_of(files: Path) -> list[FileEntry]:
    """Name, size and xxh3-128 of every file under a folder, sorted by name."""

    def entry(name: str) -> FileEntry:
        path = files / name
        return FileEntry(name=name, size=path.stat().st_size, xxh3=hash_file(path))

    with ThreadPoolExecutor(HASH_THREADS) as pool:
        return list(pool.map(entry, list_files(files)))


def digest_of(entries: Iterable[FileEntry]) -> str:
    """sha256 over the names, sizes and hashes of an artifact's files, in name order."""
    rows = sorted([entry.name, entry.size, entry.xxh3] for entry in entries)
    return hashlib.sha256(canonical_json(rows)).hexdigest()


def read_record(folder: Path) -> Record | None:
    """The record in a folder, None when there is none. Raises ValueError when it cannot be read."""
    try:
        text = (folder / RECORD).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        return Record.model_validate_json(text)
    except ValidationError as error:
        raise ValueError(f"{folder / RECORD} is not a record: {error}") from error


def wrong_names_and_sizes(folder: Path, record: Record) -> list[str]:
    """What differs between the record and the folder by names and sizes alone, in words."""
    wrong: list[str] = []
    for entry in record.files:
        try:
            status = (folder / "files" / entry.name).lstat()
        except (FileNotFoundError, NotADirectoryError):
            wrong.append(f"files/{entry.name}: missing, {entry.size} bytes expected")
            continue
        if not stat.S_ISREG(status.st_mode) or _is_below_link(folder / "files", entry.name):
            wrong.append(f"files/{entry.name}: a link or device found, a plain file expected")
        elif status.st_size != entry.size:
            wrong.append(f"files/{entry.name}: {status.st_size} bytes found, {entry.size} expected")
    return wrong


def _is_below_link(files: Path, name: str) -> bool:
    above = Path(name).parents
    return any((files / folder).is_symlink() for folder in above)


def wrong_bytes(folder: Path, entries: Iterable[FileEntry]) -> list[str]:
    """What differs between the entries and the bytes in the folder, in words."""

    def check(entry: FileEntry) -> str | None:
        try:
            found = hash_file(folder / "files" / entry.name)
        except (FileNotFoundError, NotADirectoryError):
            return f"files/{entry.name}: missing, {entry.size} bytes expected"
        if found == entry.xxh3:
            return None
        return f"files/{entry.name}: hash {found} found, {entry.xxh3} expected"

    with ThreadPoolExecutor(HASH_THREADS) as pool:
        return [line for line in pool.map(check, entries) if line]


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file in one step; after a crash it has its old or its new content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with fresh.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        fresh.replace(path)
    finally:
        # On a full disk the draft stays behind otherwise, and takes what is left of the room.
        fresh.unlink(missing_ok=True)
    flush_folder(path.parent)


def flush_tree(folder: Path) -> None:
    """Bring every file and folder under `folder` to the disk."""
    for place, _, names in os.walk(folder):
        for name in names:
            _fsync(Path(place) / name)
        flush_folder(Path(place))


def flush_folder(folder: Path) -> None:
    """Bring a folder's list of names to the disk."""
    _fsync(folder)


def try_rename(source: Path, target: Path) -> bool:
    """Rename a folder to a place where none is; False when one is there already."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        source.rename(target)
    except OSError as error:
        if target.exists():
            return False
        raise error
    flush_folder(target.parent)
    # Empty now, it may be gone: whoever else wrote there tidies up.
    with suppress(FileNotFoundError):
        flush_folder(source.parent)
    return True


def move_aside(folder: Path, trash: Path) -> None:
    """Take a folder away in one step, then remove it; what a crash leaves is removed by gc."""
    trash.mkdir(parents=True, exist_ok=True)
    aside = trash / uuid.uuid4().hex
    try:
        folder.rename(aside)
    except FileNotFoundError:
        return
    shutil.rmtree(aside)


def bytes_under(folder: Path) -> int:
    """Sum of the sizes of all files under a folder; what goes meanwhile, as old checkpoints do, is not there."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                total += (Path(place) / name).lstat().st_size
    return total


def empty_folder(folder: Path) -> None:
    """Remove everything in a folder, and leave or make the folder itself."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def remove_if_empty(folder: Path) -> None:
    """Remove a folder with nothing in it; leave any other."""
    try:
        folder.rmdir()
    except OSError:
        return


def _walk(files: Path) -> Iterator[tuple[str, Path]]:
    for place, folders, names in os.walk(files):
        for name in [*folders, *names]:
            path = Path(place) / name
            mode = path.lstat().st_mode
            if stat.S_ISDIR(mode):
                continue
            if not stat.S_ISREG(mode):
                raise ValueError(
                    f"{path} is not a plain file; an artifact holds only its own bytes"
                )
            yield path.relative_to(files).as_posix(), path


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
