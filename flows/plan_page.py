"""The graph of a plan as a page: what is in the store, what would be built, and what each node reads."""

from collections.abc import Sequence
from pathlib import Path

from flows import drawing
from flows.graph import Graph
from flows.page_parts import Section, Table, write_page
from flows.plan import Planned

COLUMNS = ("node", "stage", "status", "why", "seconds")


def write_plan(graph: Graph, planned: Sequence[Planned], target: Path) -> Path:
    """Write the page of a plan. Raises ValueError where its folder is missing."""
    if not target.parent.is_dir():
        raise ValueError(f"{target.parent} is no folder; make it, or name another file")
    marks = {item.node: drawing.Mark(_note(item), item.status) for item in planned}
    edges = [
        (source, name) for name in marks for source in graph.nodes[name].upstream if source in marks
    ]
    rows = [(item.node, item.stage, item.status, item.why, item.seconds or "") for item in planned]
    misses = sum(item.status == "miss" for item in planned)
    section = Section(
        "graph",
        "The graph",
        wide=[drawing.graph(edges, marks)] if marks else [],
        tables=[Table("", COLUMNS, rows)],
    )
    subtitle = f"{len(planned)} stages, {len(planned) - misses} in the store, {misses} to be built"
    return write_page(target, f"{graph.recipe}: the plan", subtitle, [section])


def _note(item: Planned) -> str:
    return "in the store" if item.status == "hit" else "to be built"
