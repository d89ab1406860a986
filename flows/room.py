"""Whether what a stage will write fits on the store's disk; asked just before it begins.

The estimate is rough and low rather than high: what it lets pass may still end in an error of the full disk,
after which a run resumes as after any other, but what it refuses would not have ended well.
"""

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from flows.costs import Trained, costs_of
from flows.graph import Node
from flows.lookup import Address, Lookup
from flows.show import human_bytes
from storage.artifact import Artifact
from storage.errors import NoRoom
from storage.store_local import bytes_under

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
    if needed and needed > disk.free - reserve:
        raise NoRoom(
            f"{node.name} will write about {human_bytes(needed)}, and the disk of {lookup.store.root} has "
            f"{human_bytes(disk.free)} free, of which {human_bytes(reserve)} stay in reserve (${RESERVE}); remove what "
            f"is not needed (`bessemer gc --dry-run`), move the store (store=PATH), or {_smaller(node)}"
        )


def bytes_needed(lookup: Lookup, node: Node, address: Address) -> int:
    """What a stage will have on the disk at its largest, in bytes; 0 where it cannot be told."""
    # Any peak: the time is not asked for.
    costs = costs_of(lookup, node, [], peak_flops=1.0)
    if costs and isinstance(node.settings, Trained):
        # The new checkpoint is written before the oldest is removed.
        checkpoints = node.settings.launch.checkpoints_kept + 1
        models = 2 if getattr(node.settings, "method", "") == "ppo" else 1
        each = WEIGHT_BYTES + checkpoints * CHECKPOINT_BYTES * models
        return costs.parameters * each
    share = WRITTEN.get(node.spec.name)
    return round(share * _new_bytes(lookup, node, address)) if share else 0


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


def _smaller(node: Node) -> str:
    if isinstance(node.settings, Trained):
        return f"keep fewer checkpoints ({node.name}.launch.checkpoints_kept=1)"
    return "read less at once"
