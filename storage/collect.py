"""Garbage collection of a store: mark from the roots and from work in progress, then take away."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from storage import lease as leases
from storage import store_local as local

if TYPE_CHECKING:
    from storage.store import Removed, Store


def collect(store: "Store", keep: Iterable[str], *, dry_run: bool) -> "list[Removed]":
    """Remove what nothing needs; see Store.gc."""
    from storage.store import Removed

    # First: what takes long, and is committed while gc goes on, was claimed before.
    claimed = store.remote.claimed() if store.remote else set[str]()
    roots = set(keep)
    busy = {fp for fp in _attempted(store.root) if fp in roots or store.is_claimed(fp)}
    marked = _with_parts(store, roots | busy | set(_parts_built(store.root, busy)))
    removed: list[Removed] = []
    for what, fingerprint, kind, folder in [
        *_dead_artifacts(store, marked),
        *_dead_attempts(store.root, busy),
        *_set_aside(store.root),
    ]:
        size = local.bytes_under(folder) if folder.exists() else 0
        if dry_run or _take_away(store, what, fingerprint, folder):
            removed.append(Removed(what=what, fingerprint=fingerprint, kind=kind, size=size))
    if not dry_run:
        _remove_free_locks(store.root / "leases")
    # S3 needs more than its cache folder does.
    far = store.remote.collect(marked, claimed, dry_run=dry_run) if store.remote else ()
    return removed + [
        Removed(what, fingerprint, kind, size) for what, fingerprint, kind, size in far
    ]


def _attempted(root: Path) -> set[str]:
    return {path.name for path in local.visible(root / "attempts")}


def _parts_built(root: Path, fingerprints: Iterable[str]) -> Iterator[str]:
    from storage.store import PARTS_BUILT

    for fingerprint in fingerprints:
        for listing in (root / "attempts" / fingerprint).glob(f"*/state/{PARTS_BUILT}"):
            yield from listing.read_text("utf-8").split()


def _with_parts(store: "Store", roots: set[str]) -> set[str]:
    marked: set[str] = set()
    waiting = list(roots)
    while waiting:
        fingerprint = waiting.pop()
        if fingerprint in marked:
            continue
        marked.add(fingerprint)
        if record := store.record(fingerprint):
            waiting += record.parts
    return marked


Found = tuple[str, str, str, Path]


def _dead_artifacts(store: "Store", marked: set[str]) -> Iterator[Found]:
    for folder in sorted(local.visible(store.root / "artifacts")):
        if folder.name not in marked:
            record = store.record(folder.name)
            yield (
                "cached" if store.is_remote else "artifact",
                folder.name,
                record.kind if record else "",
                folder,
            )


def _dead_attempts(root: Path, busy: set[str]) -> Iterator[Found]:
    for fingerprint in sorted(_attempted(root) - busy):
        yield "attempt", fingerprint, "", root / "attempts" / fingerprint


def _set_aside(root: Path) -> Iterator[Found]:
    for what in ("quarantine", "trash"):
        for folder in sorted(local.visible(root / what)):
            yield what, folder.name.partition(".")[0], "", folder


def _take_away(store: "Store", what: str, fingerprint: str, folder: Path) -> bool:
    """Remove one folder unless someone has begun to work on it meanwhile."""
    if what in ("quarantine", "trash"):
        local.move_aside(folder, store.root / "trash")
        return True
    lease = leases.acquire(store.root / "leases" / f"{fingerprint}.lock")
    if lease is None:
        return False
    try:
        local.move_aside(folder, store.root / "trash")
    finally:
        lease.release()
    return True


def _remove_free_locks(place: Path) -> None:
    for path in place.glob("*.lock"):
        lease = leases.acquire(path)
        if lease:
            # Removed while held: whoever waits on the old file sees that it is gone and asks anew.
            path.unlink()
            lease.release()
