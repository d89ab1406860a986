"""What an artifact was made from."""

from collections.abc import Iterator
from typing import Any

from rich.tree import Tree

from storage.record import InputEntry, Record
from storage.store import Store

SHORT = 12


def ancestry(record: Record, store: Store) -> dict[str, Any]:
    """The artifact and, nested, its inputs; an input that is gone has only its fingerprint."""
    return {
        "fingerprint": record.fingerprint,
        "stage": record.stage,
        "node": record.node,
        "kind": record.kind,
        "digest": record.digest,
        "created": record.created,
        "source_files": _source_files(record),
        "inputs": {
            name: ancestry(found, store)
            if (found := store.record(entry.fingerprint))
            else {"fingerprint": entry.fingerprint, "digest": entry.digest}
            for name, entry in _inputs(record)
        },
    }


def tree(record: Record, store: Store, label: str = "") -> Tree:
    """The same as a tree for the terminal."""
    files = _source_files(record)
    text = f"{label}{record.node} [dim]{record.kind} {record.fingerprint[:SHORT]} {record.created}"
    branch = Tree(f"{text}[/]" + (f" reads {files} files" if files else ""))
    for name, entry in _inputs(record):
        found = store.record(entry.fingerprint)
        if found:
            branch.add(tree(found, store, f"{name}: "))
        else:
            branch.add(f"{name}: [red]{entry.fingerprint[:SHORT]} is not stored any more[/]")
    return branch


def _inputs(record: Record) -> Iterator[tuple[str, InputEntry]]:
    for name, entry in record.inputs.items():
        if isinstance(entry, InputEntry):
            yield name, entry
        else:
            yield from ((f"{name}.{key}", item) for key, item in entry.items())


def _source_files(record: Record) -> int:
    """Number of outside files, or files of another node, that it read."""
    sources = record.identity.get("sources", {})
    return sum(len(landing) for landings in sources.values() for landing in landings)
