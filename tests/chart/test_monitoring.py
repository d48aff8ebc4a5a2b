"""Alerts and dashboards: their queries name metrics that there are, each alert fires where it should."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry, generate_latest

from finetune_operator.metrics import JobCollector, Metrics, summarize
from finetune_trainer.telemetry import Metrics as TrainerMetrics
from tests import require
from tests.chart.helm import of_kind, template
from tests.chart.queries import ALERTS, alerts, dashboards, exposed, metrics_of, panel_queries, panels

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
KINDS = {"bargauge", "row", "stat", "table", "timeseries"}  # none of those that Grafana has dropped: graph, singlestat


def promtool(*arguments: str | Path, text: str | None = None, folder: Path = HERE) -> str:
    """What promtool says.

    Raises:
        AssertionError: it finds something wrong.
    """
    command = [require.program("promtool"), *map(str, arguments)]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_dashboards_are_as_their_panels_say(tmp_path: Path) -> None:
    subprocess.run([sys.executable, ROOT / "scripts/dashboards.py", tmp_path], check=True)
    assert {path.stem: json.loads(path.read_text()) for path in tmp_path.iterdir()} == dashboards()


@pytest.mark.parametrize("name", dashboards())
def test_panels_are_of_current_kinds_and_none_lies_on_another(name: str) -> None:
    dashboard = dashboards()[name]
    every = dashboard["panels"]
    assert {panel["type"] for panel in every} <= KINDS
    assert len({panel["id"] for panel in every}) == len(every)
    assert len({panel["title"] for panel in every}) == len(every)
    assert [(one["title"], two["title"]) for one, two in combinations(every, 2) if _overlap(one, two)] == []
    for panel in panels(dashboard):
        assert all(target["datasource"]["uid"] == "${datasource}" for target in panel["targets"])
    known = {variable["name"] for variable in dashboard["templating"]["list"]}
    queries = [target["expr"] for panel in panels(dashboard) for target in panel["targets"]]
    used = {found for query in queries for found in re.findall(r"\$([a-z]+)\b", query)}
    assert used <= known


def _overlap(one: dict[str, Any], two: dict[str, Any]) -> bool:
    a, b = one["gridPos"], two["gridPos"]
    return bool(
        a["x"] < b["x"] + b["w"] and b["x"] < a["x"] + a["w"] and a["y"] < b["y"] + b["h"] and b["y"] < a["y"] + a["h"]
    )


def test_every_query_asks_for_metrics_that_are_exposed() -> None:
    queries = [*panel_queries(), *((alert["alert"], alert["expr"]) for alert in alerts())]
    known = exposed()
    assert {place: metrics_of(query) - known for place, query in queries if metrics_of(query) - known} == {}
    assert all(metrics_of(query) for _, query in queries)


def test_promtool_finds_nothing_wrong_with_what_is_exposed() -> None:
    operator, trainer = Metrics(), CollectorRegistry()
    job = {"metadata": {"name": "chat", "namespace": "team"}, "status": {"phase": "Training"}}
    jobs = [(("team", "chat"), summarize(job))]
    operator.registry.register(JobCollector(lambda: jobs, dict))
    TrainerMetrics(trainer)
    assert promtool("check", "metrics", text=operator.text().decode() + generate_latest(trainer).decode()) == ""


def test_every_alert_fires_where_it_should_and_not_beside_that() -> None:
    assert "SUCCESS" in promtool("check", "rules", ALERTS)
    promtool("test", "rules", "alerts_test.yaml")
    cases = [
        case
        for test in yaml.safe_load((HERE / "alerts_test.yaml").read_text())["tests"]
        for case in test["alert_rule_test"]
    ]
    for alert in alerts():
        outcomes = {bool(case["exp_alerts"]) for case in cases if case["alertname"] == alert["alert"]}
        assert outcomes == {True, False}, f"{alert['alert']} has a case in which it fires, and one in which it doesn't"


def test_every_alert_has_a_severity_a_sentence_and_its_section_in_the_runbooks() -> None:
    headings = re.findall(r"^## (\w+)$", (ROOT / "docs/runbooks.md").read_text(), re.MULTILINE)
    assert headings == [alert["alert"] for alert in alerts()]
    for alert in alerts():
        assert alert["labels"]["severity"] in ("warning", "critical")
        assert alert["annotations"]["summary"].endswith(".")
        assert alert["annotations"]["runbook_url"].endswith(f"runbooks.md#{alert['alert'].lower()}")


def test_alerts_that_an_admin_does_not_want_are_left_out_and_the_others_link_to_his_runbooks() -> None:
    rules = {"enabled": True, "disabled": ["FinetuneBudget"], "runbooks": "https://wiki.corp/finetune"}
    (rule,) = of_kind(template({"monitoring": {"rules": rules}}), "PrometheusRule")
    made = [each for group in rule["spec"]["groups"] for each in group["rules"]]
    assert {each["alert"] for each in made} == {each["alert"] for each in alerts()} - {"FinetuneBudget"}
    assert all(each["annotations"]["runbook_url"].startswith("https://wiki.corp/finetune#") for each in made)


def test_dashboards_come_as_config_maps_that_hold_them_unchanged() -> None:
    made = of_kind(template({"monitoring": {"dashboards": {"enabled": True}}}), "ConfigMap")
    found = {name: json.loads(text) for each in made for name, text in each["data"].items()}
    assert found == {f"{name}.json": dashboard for name, dashboard in dashboards().items()}
    assert all(each["metadata"]["labels"]["grafana_dashboard"] == "1" for each in made)
