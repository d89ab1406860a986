"""Charts of the report as SVG text: they take the page's colours and fonts, so Chinese and dark mode work."""

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#010203"
"""Stands for the page's text colour; replaced by `currentColor` in the SVG."""
PALETTE = ("#3b7dd8", "#e07b39", "#3a9d5d", "#c4477f", "#8c6bb1", "#b8912c", "#4aa8a8", "#888888")

Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]


def lines(
    series: Series, *, title: str, across: str, up: str, is_log: bool = False, width: float = 5.2
) -> str:
    """Curves over a common axis; one name, x and y a curve."""
    figure, axes = _canvas(width, 2.9, title)
    for (name, (x, y)), colour in zip(series.items(), _colours(len(series)), strict=True):
        marker = "o" if len(x) == 1 else None
        axes.plot(x, y, label=name, color=colour, linewidth=1.5, marker=marker, markersize=4)
    if is_log:
        axes.set_yscale("log")
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    if len(series) > 1:
        _legend(axes)
    return _svg(figure, title)


def bars(labels: Sequence[str], values: Sequence[float], *, title: str, across: str) -> str:
    """One horizontal bar a label, its number beside it."""
    figure, axes = _canvas(5.2, 0.8 + 0.3 * len(labels), title)
    places = range(len(labels))
    axes.barh(places, values, color=PALETTE[0], height=0.62)
    axes.set_yticks(places, labels)
    axes.invert_yaxis()
    axes.set_xlabel(across)
    for place, value in zip(places, values, strict=True):
        axes.annotate(
            f" {value:,.4g}", (value, place), va="center", color=INK, fontsize=8, clip_on=False
        )
    axes.margins(x=0.16)
    return _svg(figure, title)


def intervals(
    rows: Sequence[tuple[str, float, float, float, float | None]], *, title: str, across: str
) -> str:
    """Values with their 95 % intervals; a tick where chance lies."""
    figure, axes = _canvas(5.2, 0.9 + 0.3 * len(rows), title)
    for place, (_, value, low, high, chance) in enumerate(rows):
        axes.plot([low, high], [place, place], color=PALETTE[0], linewidth=2)
        axes.plot([value], [place], "o", color=PALETTE[0], markersize=6)
        if chance is not None:
            axes.plot([chance], [place], "|", color=PALETTE[1], markersize=14, markeredgewidth=2)
    axes.set_yticks(range(len(rows)), [row[0] for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel(across)
    return _svg(figure, title)


def graph(
    depths: Mapping[str, int],
    edges: Sequence[tuple[str, str]],
    marks: Mapping[str, tuple[str, str]],
) -> str:
    """The stages as boxes, left to right; `marks` gives each its second line and its status."""
    columns: dict[int, list[str]] = {}
    for name, depth in depths.items():
        columns.setdefault(depth, []).append(name)
    tallest = max(len(names) for names in columns.values())
    figure, axes = _canvas(1.32 * len(columns) + 0.3, 0.62 * tallest + 0.5, "")
    axes.set_axis_off()
    place = {
        name: (float(index), (len(names) - 1) / 2 - row)
        for index, (_, names) in enumerate(sorted(columns.items()))
        for row, name in enumerate(names)
    }
    for start, end in edges:
        axes.annotate(
            "",
            xy=(place[end][0] - 0.43, place[end][1]),
            xytext=(place[start][0] + 0.43, place[start][1]),
            arrowprops={"arrowstyle": "-|>", "color": PALETTE[7], "linewidth": 0.8},
        )
    colours = {"hit": PALETTE[0], "built": PALETTE[2], "failed": "#d03b3b", "skipped": PALETTE[7]}
    for name, (x, y) in place.items():
        note, status = marks[name]
        box = {"boxstyle": "round,pad=0.3", "fc": "none", "ec": colours.get(status, PALETTE[7])}
        axes.text(
            x, y, f"{name}\n{note}", ha="center", va="center", fontsize=7, color=INK, bbox=box
        )
    axes.set_xlim(-0.6, len(columns) - 0.4)
    axes.set_ylim(-tallest / 2 - 0.2, tallest / 2 + 0.2)
    return _svg(figure, "graph")


def _colours(count: int) -> list[str]:
    return [PALETTE[index % len(PALETTE)] for index in range(count)]


def _canvas(width: float, height: float, title: str) -> tuple["Figure", "Axes"]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=10, color=INK, loc="left")
    axes.set_facecolor("none")
    axes.grid(visible=True, color=PALETTE[7], alpha=0.25, linewidth=0.6)
    axes.tick_params(colors=INK, labelsize=8)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_color(INK)
        label.set_fontsize(8)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(PALETTE[7])
    return figure, axes


def _legend(axes: "Axes") -> None:
    legend = axes.legend(fontsize=7, frameon=False, ncols=2)
    for text in legend.get_texts():
        text.set_color(INK)


def _svg(figure: "Figure", title: str) -> str:
    import matplotlib as mpl

    stream = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}), warnings.catch_warnings():
        # The page draws the glyphs with its own fonts; matplotlib only measures them.
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(
            stream,
            format="svg",
            transparent=True,
            metadata={"Date": None, "Creator": None, "Title": title},
        )
    text = stream.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    # The page's own fonts, which have Chinese glyphs; matplotlib names one of its own.
    text = re.sub(r"font-family: [^;\"]+", "font-family: var(--font)", text)
    return re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', 'class="chart"', text, count=1)
