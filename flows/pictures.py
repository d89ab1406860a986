"""Curves and scores of a stage as images for pages that are not ours: Prefect's."""

import base64
from collections.abc import Iterator
from pathlib import Path

from conf.contract import METRICS
from flows import charts
from flows.page_parts import read_metrics, series_of
from storage.scores import Scores

CURVES = (("loss", "nats"), ("held_loss", "nats"), ("reward", ""))
SCORES = ("bits_per_byte", "accuracy", "wins", "wins_at_equal_length", "score", "consistent")
"""Kinds of figures of which each has one image."""
INK, FONT = "#808a94", "system-ui, 'Noto Sans CJK SC', sans-serif"
"""Readable on light and dark: an image knows nothing of the page around it."""


def pictures(node: str, path: Path) -> Iterator[tuple[str, str]]:
    """Title and `data:` address of each curve of the artifact at `path`, and of its scores by kind."""
    rows = read_metrics(path / "logs" / METRICS)
    for metric, up in CURVES if len(rows) > 1 else ():
        if series := series_of(metric, {node: rows}):
            title = metric.replace("_", " ")
            chart = charts.lines(series, title=title, across="step", up=up)
            yield title, _address(chart)
    for kind, intervals in _scores(path).items():
        title = kind.replace("_", " ")
        yield title, _address(charts.intervals(intervals, title=title, across="mark: chance"))


def _scores(path: Path) -> dict[str, list[charts.Interval]]:
    """By kind: `accuracy` of `exam_letter/accuracy`, `bits_per_byte` of `bits_per_byte/web`."""
    found: dict[str, list[charts.Interval]] = {}
    figures = Scores(path).figures() if (path / "files" / "scores.json").is_file() else {}
    for name, figure in figures.items():
        one, _, other = name.partition("/")
        for kind, who in ((one, other), (other, one)):
            if kind in SCORES and figure.n:
                row = (who.replace("_", " "), figure.value, figure.low, figure.high, figure.chance)
                found.setdefault(kind, []).append(row)
    return found


def _address(chart: str) -> str:
    image = chart.replace("currentColor", INK).replace("var(--font)", FONT)
    image = image.replace("<svg", '<svg width="640"', 1)
    return "data:image/svg+xml;base64," + base64.b64encode(image.encode("utf-8")).decode("ascii")
