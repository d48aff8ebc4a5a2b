"""Grafana's dashboards for the chart, from the panels in charts/dashboards.

    python scripts/dashboards.py charts/finetune-operator/files/dashboards

A panel has a title, queries by legend, and where they differ from the default: kind (timeseries), unit (short), width
(8 of 24 columns), stack, max, about. Metrics of jobs come from the operator that leads; after a change of the leader
the last one's series live on for five minutes, hence `max by` around them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import yaml

Json = dict[str, Any]

PANELS: Final = Path(__file__).parents[1] / "charts" / "dashboards"
_SCHEMA: Final = 41  # Grafana 12's; older ones know every panel and option that is used here
_SOURCE: Final = {"type": "prometheus", "uid": "${datasource}"}
_COLUMNS: Final = 24
_LAST: Final = {"calcs": ["lastNotNull"], "fields": "", "values": False}
_OPTIONS: Final[dict[str, Json]] = {
    "timeseries": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
    "stat": {"reduceOptions": _LAST, "colorMode": "none", "graphMode": "none", "textMode": "value_and_name"},
    "bargauge": {"reduceOptions": _LAST, "orientation": "horizontal", "displayMode": "basic"},
    "table": {"showHeader": True},
}
_WITHOUT_TIME: Final = [{"id": "organize", "options": {"excludeByName": {"Time": True, "Value": True}}}]


def dashboards() -> dict[str, Json]:
    """Each dashboard as Grafana imports it, by its name."""
    return {
        path.stem: _dashboard(path.stem, yaml.safe_load(path.read_text())) for path in sorted(PANELS.glob("*.yaml"))
    }


def _dashboard(name: str, page: Json) -> Json:
    source = {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"}
    return {
        "uid": f"finetune-{name}",
        "title": page["title"],
        "tags": ["finetune"],
        "schemaVersion": _SCHEMA,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "templating": {"list": [source, *(_variable(label, each) for label, each in page["variables"].items())]},
        "panels": list(_panels(page["rows"])),
    }


def _variable(label: str, variable: Json) -> Json:
    several = variable["several"]
    return {
        "name": variable["name"],
        "label": label,
        "type": "query",
        "datasource": _SOURCE,
        "query": {"query": variable["query"], "refId": variable["name"]},
        "refresh": 2,  # when the time range changes, too: jobs come and go
        "sort": 1,
        "multi": several,
        "includeAll": several,
        **({"allValue": ".*", "current": {"text": ["All"], "value": ["$__all"]}} if several else {}),
    }


def _panels(rows: dict[str, list[Json]]) -> Iterator[Json]:
    """Rows with their panels, laid out from left to right."""
    number, y = 0, 0
    for title, panels in rows.items():
        number += 1
        place = {"h": 1, "w": _COLUMNS, "x": 0, "y": y}
        yield {"id": number, "type": "row", "title": title, "collapsed": False, "panels": [], "gridPos": place}
        x, y, height = 0, y + 1, 0
        for panel in panels:
            width = panel.get("width", 8)
            if x + width > _COLUMNS:
                x, y, height = 0, y + height, 0
            tall = 4 if panel.get("kind") == "stat" else 8
            number += 1
            yield _panel(panel, number, {"h": tall, "w": width, "x": x, "y": y})
            x, height = x + width, max(height, tall)
        y += height


def _panel(panel: Json, number: int, place: Json) -> Json:
    kind = panel.get("kind", "timeseries")
    defaults: Json = {"unit": panel.get("unit", "short")}
    if "max" in panel:
        defaults |= {"min": 0, "max": panel["max"]}
    if kind == "timeseries":
        stacked = panel.get("stack", False)
        stacking = {"mode": "normal" if stacked else "none"}
        defaults["custom"] = {"fillOpacity": 25 if stacked else 0, "showPoints": "never", "stacking": stacking}
    return {
        "id": number,
        "type": kind,
        "title": panel["title"],
        **({"description": panel["about"]} if "about" in panel else {}),
        "datasource": _SOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": _OPTIONS[kind],
        **({"transformations": _WITHOUT_TIME} if kind == "table" else {}),
        "targets": [
            {
                "refId": chr(ord("A") + index),
                "datasource": _SOURCE,
                "expr": query,
                "legendFormat": legend,
                # Else a phase that a job was in an hour ago would stand beside the one that it is in.
                "instant": kind != "timeseries",
                "range": kind == "timeseries",
                "format": "table" if kind == "table" else "time_series",
            }
            for index, (legend, query) in enumerate(panel["queries"].items())
        ],
    }


def main(folder: str) -> None:
    """Writes the dashboards."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, dashboard in dashboards().items():
        (Path(folder) / f"{name}.json").write_text(json.dumps(dashboard, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
