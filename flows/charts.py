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

WIDTH = 3.8
"""Inches; the page scales a chart to its column, so a narrow one has large letters."""
BOTTOM, TOP, LINE = 0.46, 0.32, 0.17
"""Inches below and above the axes, and of a line of the legend."""
TICK = 0.55
"""Inches that the number at a tick may take."""
LONGEST_LEGEND = 20
"""Signs of a name from which a legend has one column."""

Interval = tuple[str, float, float, float, float | None]
"""Name, value, ends of its interval, chance."""
Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]


def lines(series: Series, *, title: str, across: str, up: str, is_log: bool = False) -> str:
    """Curves over a common axis; one name, x and y a curve."""
    rows, columns = _legend_grid(list(series)) if len(series) > 1 else (0, 1)
    figure, axes = _canvas(
        2.4 + LINE * rows,
        ", ".join(filter(None, (title, up))),
        left=0.62,
        bottom=BOTTOM + LINE * rows,
    )
    for (name, (x, y)), colour in zip(series.items(), _colours(len(series)), strict=True):
        marker = "o" if len(x) == 1 else None
        axes.plot(x, y, label=name, color=colour, linewidth=1.5, marker=marker, markersize=4)
    if is_log:
        _log_scale(axes)
    axes.set_xlabel(across)
    if rows:
        _legend(figure, axes, columns)
    return _svg(figure, title)


def bars(labels: Sequence[str], values: Sequence[float], *, title: str, across: str) -> str:
    """One horizontal bar a label, its number beside it."""
    height = 0.25 * len(labels) + BOTTOM + TOP + 0.1
    figure, axes = _canvas(height, title, left=_room(labels))
    places = range(len(labels))
    axes.barh(places, values, color=PALETTE[0], height=0.62)
    axes.set_yticks(places, labels)
    axes.invert_yaxis()
    axes.set_xlabel(across)
    for place, value in zip(places, values, strict=True):
        shown = f" {value:,.0f}" if value >= 100 else f" {value:,.3g}"
        axes.annotate(shown, (value, place), va="center", color=INK, fontsize=8, clip_on=False)
    axes.margins(x=0.2)
    return _svg(figure, title)


def intervals(rows: Sequence[Interval], *, title: str, across: str) -> str:
    """Values with their 95 % intervals; a tick where chance lies."""
    labels = [row[0] for row in rows]
    figure, axes = _canvas(0.25 * len(rows) + BOTTOM + TOP + 0.15, title, left=_room(labels))
    for place, (_, value, low, high, chance) in enumerate(rows):
        axes.plot([low, high], [place, place], color=PALETTE[0], linewidth=2)
        axes.plot([value], [place], "o", color=PALETTE[0], markersize=6)
        if chance is not None:
            axes.plot([chance], [place], "|", color=PALETTE[1], markersize=14, markeredgewidth=2)
    axes.set_yticks(range(len(rows)), labels)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel(across)
    return _svg(figure, title)


def _colours(count: int) -> list[str]:
    return [PALETTE[index % len(PALETTE)] for index in range(count)]


def _room(labels: Sequence[str]) -> float:
    """Inches that the longest label takes; a Chinese sign is twice as wide."""
    widest = max(sum(2 if ord(sign) > 0x2E80 else 1 for sign in label) for label in labels)
    return min(0.25 + 0.068 * widest, WIDTH / 2)


def _canvas(
    height: float, title: str, *, left: float, bottom: float = BOTTOM
) -> tuple["Figure", "Axes"]:
    """Axes with margins in inches: letting matplotlib measure every label takes twice as long."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    mpl.rcParams["text.parse_math"] = False  # a name with two dollar signs is no formula
    figure = Figure(figsize=(WIDTH, height))
    area = (left / WIDTH, bottom / height, 1 - (left + 0.16) / WIDTH, 1 - (bottom + TOP) / height)
    axes = figure.add_axes(area)
    figure.text(0.1 / WIDTH, 1 - 0.2 / height, title, fontsize=10, color=INK)
    axes.set_facecolor("none")
    axes.grid(visible=True, color=PALETTE[7], alpha=0.25, linewidth=0.6)
    axes.tick_params(colors=INK, labelsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(int((WIDTH - left) / TICK)))
    axes.xaxis.label.set_color(INK)
    axes.xaxis.label.set_fontsize(8)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(PALETTE[7])
    return figure, axes


def _log_scale(axes: "Axes") -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:g}")


def _legend_grid(names: Sequence[str]) -> tuple[int, int]:
    columns = 1 if max(map(len, names)) > LONGEST_LEGEND else 2
    return -(-len(names) // columns), columns


def _legend(figure: "Figure", axes: "Axes", columns: int) -> None:
    """Below the curves, where it hides none of them."""
    legend = figure.legend(
        *axes.get_legend_handles_labels(),
        loc="lower left",
        fontsize=7.5,
        frameon=False,
        ncols=columns,
        handlelength=1.4,
        labelspacing=0.35,
        borderaxespad=0.2,
    )
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
