"""What a run would do: for each node HIT or MISS, why, and what it is expected to cost."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conf.shape import ShapeConfig
from flows.execution import Execution
from flows.graph import Node
from flows.lookup import Lookup
from flows.preparation import find, nearest
from storage.identity import differences
from storage.record import Record
from storage.store import Store

FLOPS_PER_PARAMETER = 6
"""Forward and backward pass, per parameter and token (Kaplan et al. 2020, section 2.1)."""
TRAINING_BYTES_PER_PARAMETER = 16
"""fp32 weights, gradients and AdamW's two moments; activations come on top."""
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
    """tokens, parameters, flops, memory_bytes, where they can be told beforehand."""


def plan(execution: Execution, base: Path) -> list[Planned]:
    """Look every selected node up, in order. Writes nothing."""
    lookup = Lookup(execution.graph, execution.lookup.store, base, execution.lookup.hashes, False)
    return [_planned(execution, lookup, name) for name in execution.selected]


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
        item.node: {**{key: getattr(item, key) for key in keys}, "metrics": {}, "error": None}
        for item in planned
    }
    return {"recipe": execution.graph.recipe, "run_id": None, "report": None, "stages": stages}


def _planned(execution: Execution, lookup: Lookup, name: str) -> Planned:
    node = lookup.graph.nodes[name]
    expected = _expected(lookup, node)
    missing = [other for other in node.upstream if other not in lookup.artifacts]
    close = nearest(lookup.store, node.spec.name, name)
    seconds = close[0].seconds if close else None
    known: dict[str, Any] = {
        "node": name, "stage": node.spec.name, "kind": node.spec.output.kind, "expected": expected,
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


def _expected(lookup: Lookup, node: Node) -> dict[str, float]:
    shape = getattr(node.settings, "shape", None)
    if not isinstance(shape, ShapeConfig):
        return {}
    vocabulary = _vocabulary(lookup, node)
    if not vocabulary:
        return {}
    parameters = shape.parameters(vocabulary)
    expected: dict[str, float] = {
        "parameters": parameters,
        "memory_bytes": parameters * TRAINING_BYTES_PER_PARAMETER,
    }
    if tokens := _tokens(lookup, node):
        expected |= {"tokens": tokens, "flops": FLOPS_PER_PARAMETER * parameters * tokens}
    return expected


def _vocabulary(lookup: Lookup, node: Node) -> int:
    """Size of the vocabulary that the node's token ids come from; 0 where it cannot be told."""
    for name in lookup.graph.ancestors([node.name]):
        other = lookup.graph.nodes[name]
        if other.spec.output.kind == "tokenizer":
            return int(getattr(other.settings, "vocabulary", 0))
    return 0


def _tokens(lookup: Lookup, node: Node) -> float:
    """Tokens that a pretraining reads; 0 before its data are there, where it goes by epochs."""
    asked = getattr(node.settings, "tokens", 0)
    if asked:
        return float(asked)
    files = next((target for name, target in node.links if name == "tokens"), None)
    if files is None or files not in lookup.artifacts:
        return 0.0
    meta = lookup.artifacts[files].record.metrics.get("tokens", 0)
    found = meta.get("train", 0) if isinstance(meta, dict) else meta
    epochs = float(getattr(node.settings, "epochs", 1.0))
    return float(found) * epochs if isinstance(found, int | float) else 0.0
