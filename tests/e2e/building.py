"""Recipes built node by node, as a run does, without Prefect."""

from collections.abc import Iterable
from pathlib import Path

from flows.graph import load_graph
from flows.lookup import Lookup
from storage.artifact import Artifact
from storage.source import HashCache
from storage.store import Store
from tasks.stage import execute


def build(
    recipe: str, overrides: list[str], folder: Path, *, until: Iterable[str] = ()
) -> dict[str, Artifact]:
    """Every node of a recipe, or some and all that they read, in a store below the folder."""
    graph = load_graph(recipe, overrides, base=folder)
    wanted = graph.ancestors(until) if until else set(graph.nodes)
    lookup = Lookup(graph, Store(folder / "store"), folder, HashCache(), True)
    for name, node in graph.nodes.items():
        if name in wanted:
            address = lookup.address(name)
            outcome = execute(
                node.spec,
                node=name,
                settings=node.settings,
                inputs=address.inputs,
                sources=address.sources,
                store=lookup.store,
                workers=1,
            )
            lookup.artifacts[name] = outcome.artifact
    return lookup.artifacts
