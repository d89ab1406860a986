"""Whether what a stage will write fits on the store's disk; asked just before it begins, and foretold.

The estimate is rough and low rather than high: what it lets pass may still end in an error of the full disk,
after which a run resumes as after any other, but what it refuses would not have ended well.
"""

import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from flows.costs import Costs, Trained, costs_of
from flows.execution import Execution
from flows.graph import Node
from flows.lookup import Address, Lookup
from flows.show import human_bytes
from storage.artifact import Artifact
from storage.errors import NoRoom
from storage.store_local import bytes_under

_log = logging.getLogger("bessemer.run")
RESERVE = "BESSEMER_RESERVE_GB"
"""Environment variable: gigabytes that stay free on the disk, or `off` for no look at it; without it a
fiftieth of the disk, at most 1 GB."""
OFF = "off"
RESERVE_SHARE, MOST_RESERVE = 0.02, 1e9
WEIGHT_BYTES, CHECKPOINT_BYTES = 4, 12
"""Of one parameter in the finished model, and in a checkpoint, which has AdamW's two moments too."""
WRITTEN = {
    "extract": 0.35, "tokenize": 1.8, "dedup": 0.35, "chats": 0.5, "pairs": 0.5, "export": 1.0,
}  # fmt: skip
"""Bytes written for each that is read and new, as measured on 50 MB of texts (extract: of JSON lines, the
rest of compressed text); stages that are not named write a few hundredths."""


def check_room(lookup: Lookup, node: Node, address: Address, attempt: Path) -> None:
    """Refuse a stage that cannot fit. Raises NoRoom with what it needs and what is there.

    `attempt` is the folder that it will write to; what an earlier try has left there counts as written.
    """
    told = os.environ.get(RESERVE)
    if told == OFF:
        return
    needed = max(0, bytes_needed(lookup, node, address) - bytes_under(attempt))
    disk = shutil.disk_usage(attempt)
    reserve = _reserve(told, disk.total)
    if needed > max(0, disk.free - reserve):
        raise NoRoom(_words(lookup, node, needed, f"has {human_bytes(disk.free)} free", reserve))


def shortages(lookup: Lookup, names: Iterable[str]) -> dict[str, str]:
    """What of these nodes, built one after another, will find no room, in words; as far as sizes are known:
    of trainings, and of what reads files or artifacts that are there."""
    told = os.environ.get(RESERVE)
    if told == OFF:
        return {}
    root = lookup.store.root
    disk = shutil.disk_usage(next(path for path in (root, *root.parents) if path.exists()))
    reserve, free = _reserve(told, disk.total), disk.free
    found: dict[str, str] = {}
    for name in names:
        node = lookup.graph.nodes[name]
        is_known = all(other in lookup.artifacts for other in node.upstream)
        address = lookup.address(name) if is_known else None
        written = bytes_under(root / "attempts" / address.fingerprint) if address else 0
        needed = max(0, bytes_needed(lookup, node, address) - written)
        if needed > max(0, free - reserve):
            there = f"will then have {human_bytes(max(0, free))} free"
            found[name] = _words(lookup, node, needed, there, reserve)
        free -= max(0, _bytes_kept(lookup, node, address) - written)
    return found


def foretell(execution: Execution) -> list[str]:
    """What of a run that is about to begin will find no room. What else is wrong is told by its stages."""
    known = execution.lookup
    lookup = Lookup(known.graph, known.store, known.base, known.hashes, False)
    try:
        there = {name for name in execution.selected if lookup.find(name)} - execution.forced
        missing = [name for name in execution.selected if name not in there]
        return [*shortages(lookup, missing).values()]
    except (ValueError, OSError) as error:
        _log.debug("nothing can be foretold of the room: %s", error)
        return []


def bytes_needed(lookup: Lookup, node: Node, address: Address | None) -> int:
    """What a stage will have on the disk at its largest, in bytes; 0 where it cannot be told.

    That of a stage which trains nothing is known from its address.
    """
    if (costs := _trained(lookup, node)) and isinstance(node.settings, Trained):
        # The new checkpoint is written before the oldest is removed.
        checkpoints = node.settings.launch.checkpoints_kept + 1
        models = 2 if getattr(node.settings, "method", "") == "ppo" else 1
        each = WEIGHT_BYTES + checkpoints * CHECKPOINT_BYTES * models
        return costs.parameters * each
    share = WRITTEN.get(node.spec.name)
    return round(share * _new_bytes(lookup, node, address)) if share and address else 0


def _bytes_kept(lookup: Lookup, node: Node, address: Address | None) -> int:
    """What stays of it once the stage has ended."""
    if costs := _trained(lookup, node):
        return costs.parameters * WEIGHT_BYTES
    return bytes_needed(lookup, node, address)


def _trained(lookup: Lookup, node: Node) -> Costs | None:
    # Any peak: the time is not asked for.
    return costs_of(lookup, node, [], peak_flops=1.0)


def _new_bytes(lookup: Lookup, node: Node, address: Address) -> int:
    """Bytes that a stage reads and that its newest artifact with these settings has not read."""
    known = _known(lookup, node, address)
    sources = [file for source in address.sources.values() for file in source.files]
    size = sum(file.size for file in sources if file.digest not in known)
    for artifact in _inputs(address):
        size += sum(entry.size for entry in artifact.record.files)
        for part in set(artifact.record.parts) - known:
            record = lookup.store.record(part)
            size += sum(entry.size for entry in record.files) if record else 0
    return size


def _known(lookup: Lookup, node: Node, address: Address) -> set[str]:
    """Digests of source files and fingerprints of parts that need not be worked on again."""
    known: set[str] = set()
    same = ("stage", "version", "settings")  # parts have no stage in theirs
    for record in lookup.store.records():
        if any(record.identity.get(key) != address.identity[key] for key in same):
            continue
        for landings in record.identity.get("sources", {}).values():
            known |= {file[0] for landing in landings for file in landing}
        for entry in record.inputs.values():
            for read in entry.values() if isinstance(entry, Mapping) else (entry,):
                upstream = lookup.store.record(read.fingerprint)
                known |= set(upstream.parts) if upstream else set()
    return known


def _inputs(address: Address) -> Iterator[Artifact]:
    for value in address.inputs.values():
        yield from value.values() if isinstance(value, Mapping) else (value,)


def _reserve(told: str | None, total: int) -> int:
    """Raises ValueError where the variable is no number."""
    try:
        return round(
            min(RESERVE_SHARE * total, MOST_RESERVE) if told is None else float(told) * 1e9
        )
    except ValueError as error:
        mend = f"write gigabytes as 5 or 0.5, or {OFF}"
        raise ValueError(f"{RESERVE}={told} is no number of gigabytes; {mend}") from error


def _words(lookup: Lookup, node: Node, needed: int, there: str, reserve: int) -> str:
    return (
        f"{node.name} will write about {human_bytes(needed)}, and the disk of {lookup.store.root} {there}, "
        f"of which {human_bytes(reserve)} stay in reserve (${RESERVE}); remove what is not needed "
        f"(`bessemer gc --dry-run`), move the store (store=PATH), or {_smaller(node)}"
    )


def _smaller(node: Node) -> str:
    if isinstance(node.settings, Trained):
        return f"keep fewer checkpoints ({node.name}.launch.checkpoints_kept=1)"
    return "read less at once"
