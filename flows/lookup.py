"""Which artifact each node of a graph has in the store; used to plan and to run."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conf.settings import SourceSpec
from flows.graph import REFERENCE, Graph, Node
from storage.artifact import Artifact
from storage.identity import canonical_json, fingerprint
from storage.source import HashCache, Source, SourceLedger, resolve
from storage.store import Store
from tasks.stage import Inputs, identity_of


@dataclass(frozen=True)
class Address:
    """Where a node's artifact is, or would be."""

    identity: dict[str, Any]
    fingerprint: str
    inputs: Inputs
    sources: Mapping[str, Source]


@dataclass
class Lookup:
    """Artifacts found or built so far, and the addresses that follow from them."""

    graph: Graph
    store: Store
    base: Path
    """Folder that relative paths of sources start from."""
    hashes: HashCache
    appends: bool
    """Whether new files are recorded as a landing; planning only looks."""
    artifacts: dict[str, Artifact] = field(default_factory=dict[str, Artifact])

    def address(self, name: str) -> Address:
        """Identity and fingerprint of a node whose upstream artifacts are all known.

        Raises ValueError for a source without files or a reference to what is not stored.
        """
        node = self.graph.nodes[name]
        sources = {
            setting: resolve(
                specs,
                artifacts=self.artifacts,
                base=self.base,
                ledger=ledger_of(self.store, node.name, setting, specs),
                hashes=self.hashes,
                appends=self.appends,
            )
            for setting, specs in node.sources
        }
        inputs = self._inputs(node)
        identity = identity_of(node.spec, node.settings, inputs, sources)
        return Address(identity, fingerprint(identity), inputs, sources)

    def find(self, name: str) -> Artifact | None:
        """A node's artifact where it is stored, which is then known to the nodes below.

        None also where something above is not known. Raises ValueError as `address` does.
        """
        node = self.graph.nodes[name]
        if any(other not in self.artifacts for other in node.upstream):
            return None
        artifact = self.pinned(name)
        if artifact is None and (path := self.store.find(self.address(name).fingerprint)):
            artifact = node.spec.output(path)
        if artifact is not None:
            self.artifacts[name] = artifact
        return artifact

    def pinned(self, name: str) -> Artifact | None:
        """The artifact that a node is pinned to; None when it runs as usual."""
        node = self.graph.nodes[name]
        if node.pin is None:
            return None
        return self._stored(node.pin, (node.spec.output,), f"stages.{name}.pin")

    def _inputs(self, node: Node) -> Inputs:
        def one(name: str, target: str) -> Artifact:
            if not target.startswith(REFERENCE):
                return self.artifacts[target]
            kinds = node.spec.inputs[name].kinds
            place = f"stages.{node.name}.from.{name}"
            return self._stored(target.removeprefix(REFERENCE), kinds, place)

        return {
            name: one(name, link)
            if isinstance(link, str)
            else {key: one(name, target) for key, target in link.items()}
            for name, link in node.inputs.items()
        }

    def _stored(self, address: str, kinds: tuple[type[Artifact], ...], place: str) -> Artifact:
        path = self.store.find(address)
        record = self.store.record(address)
        if path is None or record is None:
            raise ValueError(
                f"{place}: artifact {address} is not stored any more, or is damaged; name another, "
                "or remove the pin and build it again"
            )
        for kind in kinds:
            if kind.kind == record.kind:
                return kind(path)
        expected = " or ".join(kind.kind for kind in kinds)
        raise ValueError(
            f"{place}: artifact {address} is a {record.kind}, a {expected} is needed; name another"
        )


def ledger_of(store: Store, node: str, setting: str, specs: tuple[SourceSpec, ...]) -> SourceLedger:
    """What records the landings of one source.

    Named by what the recipe says of the source, so that recipes which read the same files through
    a node of the same name share it, and another data folder begins a history of its own.
    """
    said = canonical_json([spec.model_dump(mode="json") for spec in specs])
    digest = hashlib.sha256(said).hexdigest()[:12]
    name = re.sub(r"[^\w.-]", "_", f"{node}.{setting}")
    return store.ledger(f"{name}.{digest}.json")
