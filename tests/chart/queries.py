"""Every query that the chart ships, and the metrics that are really exposed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Final

import yaml
from prometheus_client import CollectorRegistry

from finetune_operator.metrics import JobCollector, Metrics
from finetune_trainer.telemetry import Metrics as TrainerMetrics
from tests.chart.helm import CHART

ALERTS: Final = CHART / "files" / "alerts.yaml"
DASHBOARDS: Final = CHART / "files" / "dashboards"
# Zero, and so without a line in a panel, where there is no GPU whose peak is known.
NEEDS_GPU: Final = frozenset({"finetune_gpu_memory_bytes", "finetune_train_mfu_ratio"})
_METRIC: Final = re.compile(r"\bfinetune_[a-z_]+\b")


def alerts() -> list[dict[str, Any]]:
    """The alerts, as written."""
    groups = yaml.safe_load(ALERTS.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def dashboards() -> dict[str, Any]:
    """The dashboards, by name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(DASHBOARDS.glob("*.json"))}


def panels(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    """Panels that show something."""
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def panel_queries() -> Iterator[tuple[str, str]]:
    """Place and text of every query of every panel."""
    for name, dashboard in dashboards().items():
        for panel in panels(dashboard):
            for target in panel["targets"]:
                yield f"{name}: {panel['title']}: {target['legendFormat']}", target["expr"]


def metrics_of(query: str) -> set[str]:
    """Names of the metrics in a query, with what a histogram's or summary's series add."""
    return set(_METRIC.findall(query))


def exposed() -> set[str]:
    """Names of all series of the operator and the trainer."""
    operator = Metrics()
    operator.registry.register(JobCollector(list, dict))
    trainer = CollectorRegistry()
    TrainerMetrics(trainer)
    families = [*operator.registry.collect(), *trainer.collect()]
    suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"], "summary": ["_sum", "_count"]}
    return {family.name + end for family in families for end in suffixes.get(family.type, [""])}
