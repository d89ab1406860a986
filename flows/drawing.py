"""The graph of a run as an SVG drawing, from top to bottom, in the page's colours and fonts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

BOX_WIDTH, BOX_HEIGHT = 150.0, 40.0
GAP, LANE_WIDTH = 18.0, 10.0
"""Space between the cells of a row; width of a lane, in which edges pass a row."""
ROW_HEIGHT = 76.0
MARGIN = 8.0
SWEEPS = 12
LONGEST_NAME = 21
"""Signs of a name that fit into a box; a longer one is squeezed."""

Cell = tuple[str, int]
"""A node and a row: its box where the row is its own, else the lane of its edges past that row."""
Link = tuple[Cell, Cell]


@dataclass(frozen=True)
class Mark:
    """What a node's box shows."""

    note: str
    """Second line."""
    status: str
    """hit, built, failed, skipped, ...: its colour."""


def graph(edges: Sequence[tuple[str, str]], marks: Mapping[str, Mark]) -> str:
    """The nodes of `marks`, in topological order, as boxes, each below all that it reads.

    Rows by longest path, order within a row by the mean place of the neighbours (Sugiyama et al.
    1981); all edges of one node that go far share a lane.
    """
    depth: dict[str, int] = {}
    for name in marks:
        depth[name] = 1 + max((depth[a] for a, b in edges if b == name and a in depth), default=-1)
    links = _links(depth, edges)
    rows = _rows(depth, links)
    places = _places(rows, links, depth)
    width = max(x for x, _ in places.values()) + BOX_WIDTH / 2 + MARGIN
    height = (len(rows) - 1) * ROW_HEIGHT + BOX_HEIGHT + 2 * MARGIN
    lines = [_line(places[a], places[b], is_end=b[1] == depth[b[0]]) for a, b in links]
    boxes = [_box(name, mark, *places[name, depth[name]]) for name, mark in marks.items()]
    return (
        '<svg class="graph" role="img" aria-label="graph of the stages" '
        f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}">'
        f"{''.join(lines)}{''.join(boxes)}</svg>"
    )


def _links(depth: Mapping[str, int], edges: Sequence[tuple[str, str]]) -> list[Link]:
    """The edges cut into links from one row to the next."""
    links: dict[Link, None] = {}
    for start, end in edges:
        before = (start, depth[start])
        for row in range(depth[start] + 1, depth[end]):
            links[before, (start, row)] = None
            before = (start, row)
        links[before, (end, depth[end])] = None
    return list(links)


def _rows(depth: Mapping[str, int], links: Sequence[Link]) -> list[list[Cell]]:
    """The cells of each row, in an order in which few links cross."""
    cells = dict.fromkeys([*depth.items(), *(cell for link in links for cell in link)])
    rows: list[list[Cell]] = [[] for _ in range(max(depth.values()) + 1)]
    for cell in cells:
        rows[cell[1]].append(cell)
    above, below = _neighbours(links)
    for sweep in range(SWEEPS):
        is_down = sweep % 2 == 0
        near = above if is_down else below
        for row in rows if is_down else reversed(rows):
            order = {c: i / max(len(r) - 1, 1) for r in rows for i, c in enumerate(r)}
            means = {c: _mean([order[other] for other in near.get(c, ())], order[c]) for c in row}
            row.sort(key=means.__getitem__)
    return rows


def _neighbours(
    links: Sequence[Link],
) -> tuple[dict[Cell, list[Cell]], dict[Cell, list[Cell]]]:
    above: dict[Cell, list[Cell]] = {}
    below: dict[Cell, list[Cell]] = {}
    for start, end in links:
        above.setdefault(end, []).append(start)
        below.setdefault(start, []).append(end)
    return above, below


def _places(
    rows: Sequence[Sequence[Cell]], links: Sequence[Link], depth: Mapping[str, int]
) -> dict[Cell, tuple[float, float]]:
    """Middle of every cell: as near to its neighbours as the cells beside it allow."""

    def half(cell: Cell) -> float:
        return (BOX_WIDTH if depth[cell[0]] == cell[1] else LANE_WIDTH) / 2

    x: dict[Cell, float] = {}
    for row in rows:
        at = 0.0
        for cell in row:
            x[cell] = at + half(cell)
            at += 2 * half(cell) + GAP
        for cell in row:
            x[cell] -= (at - GAP) / 2
    above, below = _neighbours(links)
    for sweep in range(SWEEPS):
        near = above if sweep % 2 else below
        for row in rows:
            wanted = [_mean([x[other] for other in near.get(c, ())], x[c]) for c in row]
            x.update(zip(row, _spread(wanted, [half(c) for c in row]), strict=True))
    shift = MARGIN - min(x[cell] - half(cell) for cell in x)
    return {cell: (x[cell] + shift, MARGIN + BOX_HEIGHT / 2 + cell[1] * ROW_HEIGHT) for cell in x}


def _spread(wanted: Sequence[float], halves: Sequence[float]) -> list[float]:
    """Places in the same order, none nearer than allowed: the mean of pushing right and pushing left."""
    right = list(wanted)
    for i in range(1, len(right)):
        right[i] = max(right[i], right[i - 1] + halves[i - 1] + halves[i] + GAP)
    left = list(wanted)
    for i in range(len(left) - 2, -1, -1):
        left[i] = min(left[i], left[i + 1] - halves[i + 1] - halves[i] - GAP)
    return [(a + b) / 2 for a, b in zip(right, left, strict=True)]


def _mean(values: Sequence[float], default: float) -> float:
    return sum(values) / len(values) if values else default


def _line(start: tuple[float, float], end: tuple[float, float], *, is_end: bool) -> str:
    (x1, y1), (x2, y2) = start, end
    y1, y2 = y1 + BOX_HEIGHT / 2, y2 - BOX_HEIGHT / 2
    bend = (y2 - y1) * 0.55
    path = f"M{x1:.1f} {y1:.1f}C{x1:.1f} {y1 + bend:.1f} {x2:.1f} {y2 - bend:.1f} {x2:.1f} {y2:.1f}"
    if not is_end:
        path += f"V{y2 + BOX_HEIGHT:.1f}"
    arrow = f'<path class="arrow" d="M{x2 - 3.5:.1f} {y2 - 6:.1f}h7l-3.5 6z"/>' if is_end else ""
    return f'<path class="edge" d="{path}"/>{arrow}'


def _box(name: str, mark: Mark, x: float, y: float) -> str:
    squeeze = (
        f' textLength="{BOX_WIDTH - 12:.0f}" lengthAdjust="spacingAndGlyphs"'
        if len(name) > LONGEST_NAME
        else ""
    )
    return (
        f'<g class="node {escape(mark.status)}">'
        f'<rect x="{x - BOX_WIDTH / 2:.1f}" y="{y - BOX_HEIGHT / 2:.1f}" width="{BOX_WIDTH}" '
        f'height="{BOX_HEIGHT}" rx="6"/>'
        f'<text x="{x:.1f}" y="{y - 3:.1f}"{squeeze}>{escape(name)}</text>'
        f'<text class="note" x="{x:.1f}" y="{y + 12:.1f}">{escape(mark.note)}</text></g>'
    )
