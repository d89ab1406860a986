"""Curves of a stage as images for pages that are not ours: Prefect's."""

import base64
from collections.abc import Iterator
from pathlib import Path

from conf.contract import METRICS
from flows import charts
from flows.page_parts import read_metrics, series_of

CURVES = (("loss", "nats"), ("held_loss", "nats"), ("reward", ""))
INK, FONT = "#808a94", "system-ui, 'Noto Sans CJK SC', sans-serif"
"""Readable on light and dark: an image knows nothing of the page around it."""


def pictures(node: str, path: Path) -> Iterator[tuple[str, str]]:
    """Title and `data:` address of each curve of the artifact at `path`; none where nothing was trained."""
    rows = read_metrics(path / "logs" / METRICS)
    for metric, up in CURVES if len(rows) > 1 else ():
        if series := series_of(metric, {node: rows}):
            title = metric.replace("_", " ")
            chart = charts.lines(series, title=title, across="step", up=up)
            yield title, _address(chart)


def _address(chart: str) -> str:
    image = chart.replace("currentColor", INK).replace("var(--font)", FONT)
    image = image.replace("<svg", '<svg width="640"', 1)
    return "data:image/svg+xml;base64," + base64.b64encode(image.encode("utf-8")).decode("ascii")
