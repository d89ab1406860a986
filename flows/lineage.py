"""What an artifact was made from: its inputs, and the nodes whose files it read as a source."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.tree import Tree

from flows.runs import Home
from storage.record import InputEntry, Record
from storage.store import Store

SHORT = 12

Read = Mapping[str, Mapping[str, str]]


def nodes_read(home: Home) -> Read:
    """Fingerprint -> node -> fingerprint of that node's artifact, as the runs tell, newest first."""
    found: dict[str, dict[str, str]] = {}
    for run in home.records():
        for stage in run.stages.values():
            if stage.fingerprint:
                above = {name: run.stages[name].fingerprint for name in stage.reads}
                known = {name: address for name, address in above.items() if address}
                found.setdefault(stage.fingerprint, known)
    return found


def ancestry(record: Record, store: Store, read: Read) -> dict[str, Any]:
    """The artifact and, nested, what it was made from; what is gone has only its fingerprint."""
    return {
        "fingerprint": record.fingerprint,
        "stage": record.stage,
        "node": record.node,
        "kind": record.kind,
        "digest": record.digest,
        "created": record.created,
        "source_files": _source_files(record),
        "inputs": {
            name: ancestry(found, store, read)
            if (found := store.record(address))
            else {"fingerprint": address}
            for name, address in _inputs(record, read)
        },
    }


def tree(record: Record, store: Store, read: Read, label: str = "") -> Tree:
    """The same as a tree for the terminal."""
    files = _source_files(record)
    text = f"{label}{record.node} [dim]{record.kind} {record.fingerprint[:SHORT]} {record.created}"
    branch = Tree(f"{text}[/]" + (f" reads {files} files" if files else ""))
    for name, address in _inputs(record, read):
        found = store.record(address)
        if found:
            branch.add(tree(found, store, read, f"{name}: "))
        else:
            branch.add(f"{name}: [red]{address[:SHORT]} is not stored any more[/]")
    return branch


def _inputs(record: Record, read: Read) -> Iterator[tuple[str, str]]:
    named: set[str] = set()
    for name, entry in record.inputs.items():
        entries = {name: entry} if isinstance(entry, InputEntry) else entry
        for key, item in entries.items():
            named.add(item.fingerprint)
            yield (key if key == name else f"{name}.{key}"), item.fingerprint
    for node, address in read.get(record.fingerprint, {}).items():
        if address not in named:
            yield f"files of {node}", address


def _source_files(record: Record) -> int:
    """Number of outside files, or files of another node, that it read."""
    sources = record.identity.get("sources", {})
    return sum(len(landing) for landings in sources.values() for landing in landings)
