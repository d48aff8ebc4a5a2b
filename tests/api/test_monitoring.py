"""A real Prometheus scrapes a real operator with jobs, and the telemetry of a run: every query finds its data."""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from finetune_trainer.endpoints import served
from finetune_trainer.telemetry import Telemetry
from tests.api import jobs
from tests.api.attempt import Attempt
from tests.api.cluster import Cluster
from tests.api.kubelet import Kubelet
from tests.api.lives import ENDLESS
from tests.api.objects import Api, eventually
from tests.api.operator import operator
from tests.api.pictures import draw
from tests.api.prometheus import Prometheus, prometheus
from tests.api.script import Script, Training
from tests.chart.queries import ALERTS, NEEDS_GPU, alerts, dashboards, metrics_of, panel_queries
from tests.ports import free_port

RECORDED = Path(__file__).parent / "recorded" / "quickstart.jsonl"  # metrics.jsonl of `make quickstart` on two cores
QUIET = {"finetune_operator_reconcile_errors_total"}  # nothing fails in this test


PICTURES = os.environ.get("FINETUNE_PICTURES")
_PACE = 0.6 if PICTURES else 0.2  # seconds between two events


async def crash(attempt: Attempt) -> None:
    attempt.fail("UserCode", "The model's chat template does not render.")


@pytest.fixture(scope="module")
def scraped(local_cluster: Cluster, api: Api, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """A job that trains, one that fails after Prometheus has begun, and one that waits; labels as of pods."""
    folder = tmp_path_factory.mktemp("prometheus")
    with ExitStack() as stack:
        api.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "monitored"}})
        stack.callback(api.delete, "v1/Namespace", "monitored")
        api.wait_for("v1/ServiceAccount", "default", "monitored")
        name = stack.enter_context(jobs.runtime(api, limits__maxCost=1000))
        kubelet = stack.enter_context(Kubelet(local_cluster))
        kubelet.script("monitored", "chat", Script(attempts=(Training(steps=ENDLESS),)))
        kubelet.script("monitored", "broken", Script(attempts=(Training(load_seconds=8, fault=crash),)))
        port = free_port()
        flags = {"metrics-bind-address": f"127.0.0.1:{port}", "leader-elect": "", "lease-namespace": "monitored"}
        stack.enter_context(operator(local_cluster, folder, "monitored", flags=flags))
        telemetry = Telemetry("s3://work/chat", 1, time.monotonic())
        trainer = stack.enter_context(served(telemetry, 0))
        stop = threading.Event()
        stack.callback(stop.set)
        threading.Thread(target=_replay, args=(telemetry, stop), daemon=True).start()
        targets = {port: {"pod": "operator"}, trainer: {"namespace": "monitored", "name": "chat", "attempt": "1"}}
        server = stack.enter_context(prometheus(folder, targets, [ALERTS]))
        eventually(lambda: server.query("finetune_operator_leader == 1"), "the leader's metrics", 60)
        for job in ("chat", "broken"):
            api.create(jobs.job(job, name), namespace="monitored")
        api.create(jobs.job("waits", "nowhere"), namespace="monitored")
        yield server


def _replay(telemetry: Telemetry, stop: threading.Event) -> None:
    """The run's events, some each second, but for its end."""
    for line in RECORDED.read_text().splitlines():
        event = json.loads(line)
        if event["event"] in ("export", "end") or stop.wait(_PACE):
            return
        telemetry.event(event, time.monotonic())


def _filled(query: str) -> str:
    """A panel's query with its variables as Grafana puts them in."""
    return query.replace("$namespace", "monitored").replace("$name", "chat").replace("$__range", "5m")


def test_every_panel_finds_data_or_needs_a_gpu(scraped: Prometheus) -> None:
    missing = {place: _filled(query) for place, query in panel_queries() if not metrics_of(query) <= NEEDS_GPU | QUIET}

    def ask() -> bool:
        for place, query in list(missing.items()):
            if scraped.query(query):
                del missing[place]
        return not missing

    eventually(ask, "data for every panel", 90, lambda: missing)


def test_every_alert_is_evaluated_on_series_that_are_there_and_none_fires_for_jobs_that_are_well(
    scraped: Prometheus,
) -> None:
    parts = {part for alert in alerts() for part in re.findall(r"finetune_\w+(?:\{[^}]*\})?", alert["expr"])}
    missing = set(parts)

    def ask() -> bool:
        missing.difference_update({part for part in missing if scraped.query(part)})
        return not missing

    eventually(ask, "the series of every alert", 60, lambda: missing)
    found = {rule["name"]: rule for rule in scraped.rules()}
    assert found.keys() == {alert["alert"] for alert in alerts()}
    assert {name: rule["lastError"] for name, rule in found.items() if rule["health"] != "ok"} == {}
    assert [name for name, rule in found.items() if rule["state"] == "firing"] == []


def test_dashboards_can_be_drawn_without_grafana(scraped: Prometheus, tmp_path: Path) -> None:
    """The pictures in docs/images, when FINETUNE_PICTURES names that folder; then with a minute of data."""
    time.sleep(40 if PICTURES else 0)
    for name, dashboard in dashboards().items():
        path = Path(PICTURES or tmp_path) / f"dashboard-{name}.png"
        draw(dashboard, scraped, _filled, 60, path)
        assert path.stat().st_size > 10_000
