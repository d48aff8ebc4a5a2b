"""docs/reference/metrics.md: every metric of trainer and operator, from the objects that are really exposed.

    python scripts/metrics_page.py docs/reference

It stands here because neither of the two may import the other.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from prometheus_client import CollectorRegistry
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.metrics_core import Metric

from finetune_api.docs import table
from finetune_operator import metrics as operator
from finetune_trainer import telemetry as trainer

NOTICE: Final = "<!-- Generated from the metrics' code by `make generate`. Do not edit. -->\n"
TRAINER: Final = """\
Served at `/metrics` by the head pod of a job while it trains (port 8090), and by `finetune run --metrics-port`. They
are of one attempt: counters begin again with the next one. Rank 0 reports for all workers; none of them has the job's
name, which the scrape's labels give.
"""
OPERATOR: Final = """\
Served at `/metrics` by each replica of the operator. The one that leads exports the jobs; `finetune_operator_leader`
says which one that is.
"""
UNITS: Final = {
    "timestamp_seconds": "Unix time",
    "tokens_per_second": "tokens/s",
    "seconds": "seconds",
    "bytes": "bytes",
    "ratio": "0 to 1",
    "loss": "nats per token",
}

Row = tuple[str, str, str, str, str]


def unit(name: str) -> str:
    """By the metric's name, as Prometheus' conventions have it."""
    return next((said for end, said in UNITS.items() if name.endswith(end)), "")


def row(metric: MetricWrapperBase | Metric) -> Row:
    """Name, type, labels, unit, meaning. The classes of the library have no public names for these."""
    if isinstance(metric, MetricWrapperBase):
        name, kind, about = metric._name, str(metric._type), metric._documentation
    else:
        name, kind, about = metric.name, metric.type, metric.documentation
    shown = f"{name}_total" if kind == "counter" else name
    labels = ", ".join(f"`{label}`" for label in getattr(metric, "_labelnames", ()))
    return f"`{shown}`", kind, labels, unit(name), about


def rows(metrics: Iterable[object]) -> list[Row]:
    """Rows of the metrics among the objects, by name."""
    return sorted(row(metric) for metric in metrics if isinstance(metric, MetricWrapperBase | Metric))


def page() -> str:
    """The Markdown page."""
    columns = ("Metric", "Type", "Labels", "Unit", "Meaning")
    of_trainer = rows(vars(trainer.Metrics(CollectorRegistry())).values())
    jobs = operator.JobCollector(list, dict).collect()
    of_operator = rows([*vars(operator.Metrics()).values(), *jobs])
    lines = [
        NOTICE,
        "# Metrics\n",
        "## Of a job's training\n",
        TRAINER,
        *table(columns, of_trainer),
        "## Of the operator\n",
        OPERATOR,
        *table(columns, of_operator),
    ]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.md").write_text(page(), encoding="utf-8")
