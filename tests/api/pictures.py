"""Draws a dashboard's panels from a Prometheus, laid out as in Grafana: for the pictures in docs/monitoring.md."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from tests.api.prometheus import Prometheus, named
from tests.chart.queries import panels

Series = tuple[str, list[float], list[float]]  # legend, seconds, values
_ROW_INCHES, _COLUMN_INCHES = 0.26, 0.62
_FACTORS: Final = {"percentunit": (100.0, "%"), "bytes": (1 / (1 << 30), "GiB"), "s": (1.0, "s"), "h": (1.0, "h")}


def draw(dashboard: dict[str, Any], server: Prometheus, filled: Callable[[str], str], seconds: int, path: Path) -> None:
    """Writes the picture of the last `seconds`; `filled` puts the variables into a query."""
    shown = panels(dashboard)
    bottom = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in shown)
    width, height = 24 * _COLUMN_INCHES, bottom * _ROW_INCHES
    figure = plt.figure(figsize=(width, height))
    for panel in shown:
        place = panel["gridPos"]
        left, top = place["x"] / 24, 1 - place["y"] / bottom
        box = (left + 0.03, top - (place["h"] - 1.2) / bottom, place["w"] / 24 - 0.045, (place["h"] - 2.6) / bottom)
        axes = figure.add_axes(box)
        axes.set_title(panel["title"], fontsize=9, loc="left", fontweight="bold")
        factor, unit = _FACTORS.get(panel["fieldConfig"]["defaults"]["unit"], (1.0, ""))
        for target in panel["targets"]:
            query, legend = filled(target["expr"]), target["legendFormat"]
            if panel["type"] == "timeseries":
                _draw_lines(axes, server.series(query, legend, seconds), factor, unit)
            elif panel["type"] == "table":
                rows = ["  ".join(each["metric"].values()) for each in server.query(query)]
                _write(axes, sorted(rows), columns=1)
            else:
                newest = [
                    (float(each["value"][1]) * factor, named(legend, each["metric"])) for each in server.query(query)
                ]
                _write(axes, [f"{value:,.4g} {unit} {name}" for value, name in newest], columns=place["w"] // 4)
    figure.savefig(path, dpi=70)
    plt.close(figure)


def _draw_lines(axes: Axes, series: list[Series], factor: float, unit: str) -> None:
    for legend, times, values in series:
        axes.plot([at - time.time() for at in times], [value * factor for value in values], label=legend, linewidth=1.2)
    axes.tick_params(labelsize=7)
    axes.set_ylabel(unit, fontsize=7)
    axes.grid(alpha=0.3)
    if series:
        axes.legend(fontsize=6, loc="best", frameon=False)


def _write(axes: Axes, lines: list[str], columns: int) -> None:
    """Lines of text, filled up row by row; below those that are there."""
    axes.axis("off")
    for number, line in enumerate(lines, len(axes.texts)):
        where = (number % columns / columns, 0.8 - number // columns * 0.16)
        axes.text(*where, line, fontsize=8, transform=axes.transAxes)
