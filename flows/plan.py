"""What a run would do: for each node HIT or MISS, why, and what it is expected to cost."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from flows.costs import Costs, costs_of
from flows.execution import Execution
from flows.lookup import Lookup
from flows.preparation import find, nearest
from flows.room import shortages
from storage.identity import differences
from storage.record import Record
from storage.store import Store

MOST_DIFFERENCES = 6


@dataclass(frozen=True)
class Planned:
    """One node of a plan."""

    node: str
    stage: str
    kind: str
    status: str
    """`hit` or `miss`."""
    why: str
    fingerprint: str | None = None
    digest: str | None = None
    path: str | None = None
    seconds: float | None = None
    """What the nearest artifact took to build."""
    expected: dict[str, float] = field(default_factory=dict[str, float])
    """Figures of `costs`: parameters, tokens, flops, memory_bytes, seconds, ..."""
    costs: Costs | None = None
    """Of a training stage, where they can be told beforehand."""
    shortage: str = ""
    """That it will find no room on the disk, in words."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """What speaks against running it as it is."""
        return (*(self.costs.warnings if self.costs else ()), *filter(None, [self.shortage]))


def plan(execution: Execution, base: Path, *, peak_flops: float = 0.0) -> list[Planned]:
    """Look every selected node up, in order. Writes nothing.

    `peak_flops` is what one device could do at best per second; 0 to go by what was measured.
    """
    lookup = Lookup(execution.graph, execution.lookup.store, base, execution.lookup.hashes, False)
    planned = [_planned(execution, lookup, name, peak_flops) for name in execution.selected]
    lacks = shortages(lookup, [item.node for item in planned if item.status == "miss"])
    return [replace(item, shortage=lacks.get(item.node, "")) for item in planned]


def contract(execution: Execution, planned: list[Planned]) -> dict[str, Any]:
    """What `plan --json` prints: as `run --json`, with `why` and `expected`."""
    keys = (
        "stage",
        "status",
        "why",
        "kind",
        "fingerprint",
        "digest",
        "path",
        "seconds",
        "expected",
    )
    stages = {
        item.node: {
            **{key: getattr(item, key) for key in keys},
            "warnings": list(item.warnings),
            "metrics": {},
            "error": None,
        }
        for item in planned
    }
    return {"recipe": execution.graph.recipe, "run_id": None, "report": None, "stages": stages}


def _planned(execution: Execution, lookup: Lookup, name: str, peak_flops: float) -> Planned:
    node = lookup.graph.nodes[name]
    missing = [other for other in node.upstream if other not in lookup.artifacts]
    close = nearest(lookup.store, node.spec.name, name)
    seconds = close[0].seconds if close else None
    costs = costs_of(lookup, node, close, peak_flops=peak_flops)
    known: dict[str, Any] = {
        "node": name, "stage": node.spec.name, "kind": node.spec.output.kind, "costs": costs,
        "expected": costs.figures() if costs else {},
    }  # fmt: skip
    if missing:
        return Planned(
            status="miss", why=f"waits for {', '.join(missing)}", seconds=seconds, **known
        )
    if name in execution.forced:
        return Planned(status="miss", why="forced", seconds=seconds, **known)
    if find(lookup, name):
        record = lookup.artifacts[name].record
        why = "pinned" if node.pin else f"built {record.created} in {record.seconds:.1f} s"
        return Planned(
            status="hit",
            why=why,
            fingerprint=record.fingerprint,
            digest=record.digest,
            path=str(lookup.artifacts[name].path),
            seconds=record.seconds,
            **known,
        )
    address = lookup.address(name)
    return Planned(
        status="miss",
        why=_why(lookup.store, address.identity, address.fingerprint, close),
        fingerprint=address.fingerprint,
        seconds=seconds,
        **known,
    )


def _why(store: Store, identity: dict[str, Any], fingerprint: str, close: list[Record]) -> str:
    """In which fields the node differs from the artifact that is most like it."""
    if store.record(fingerprint) is not None:
        return "its artifact, or a part of it, is damaged or missing"
    told = [
        [_readable(line) for line in differences(record.identity, identity)] for record in close
    ]
    if not told:
        return "never built"
    fewest = min(told, key=len)
    rest = len(fewest) - MOST_DIFFERENCES
    return "; ".join(fewest[:MOST_DIFFERENCES]) + (f"; and {rest} more" if rest > 0 else "")


def _readable(line: str) -> str:
    """A difference without the digits of digests, which say nothing to people."""
    place, _, change = line.partition(": ")
    if place.startswith("inputs."):
        is_new = change.startswith('"absent"')
        return f"{place}: {'new' if is_new else 'other content'}"
    if place.startswith("sources."):
        return f"{place}: other files"
    return f"{place}: {change}"
