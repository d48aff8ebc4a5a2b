"""A whole job on a real cluster: prepared, trained by two pods under ZeRO-2, weights and report in object storage."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from transformers import AutoModelForCausalLM

from finetune_operator.children.labels import JOB_LABEL
from tests.api.objects import eventually
from tests.api.pictures import draw
from tests.api.terminal import Terminal
from tests.chart.queries import NEEDS_GPU, dashboards, metrics_of, panel_queries
from tests.cluster import pictures
from tests.cluster.service import Service

STEPS = 300
# Without a line where nothing fails.
UNEVENTFUL = {
    "finetune_operator_api_requests_total",  # of refused ones
    "finetune_operator_reconcile_errors_total",
    "finetune_job_failures_total",
}
PHASES = ("Preparing", "Queued", "Training", "Finishing", "Complete")
METRICS = ("finetune_train_loss", "finetune_train_tokens_total", "finetune_job_training_seconds", "finetune_jobs")


@dataclass(frozen=True)
class Life:
    """What was seen of the job.

    Attributes:
        phases: seconds from `kubectl apply` until each phase was seen first.
        watched: what `kubectl get ftj --watch` printed meanwhile.
    """

    phases: dict[str, float]
    watched: str


@pytest.fixture(scope="module")
def life(installed: Service) -> Iterator[Life]:
    training = {"maxSteps": STEPS, "sequencesPerBatch": 4, "precision": "fp32", "evaluateEverySteps": 100}
    watch = installed.kubectl.command("get", "ftj", "--watch", f"--namespace={installed.namespace}")
    started = time.monotonic()
    installed.submit("chat", training=training, checkpoint={"everySteps": 50})
    seen: dict[str, float] = {}
    with Terminal(watch, dict(os.environ)) as terminal:
        while "Complete" not in seen:
            status = installed.wait("chat", lambda status: status.get("phase", "Pending") not in seen, 600)
            seen[status.get("phase", "Pending")] = time.monotonic() - started
            assert status.get("phase") != "Failed", status
        eventually(lambda: "Complete" in terminal.text, "the watch's last line", 5)
    print("seconds until each phase:", {phase: round(seconds) for phase, seconds in seen.items()})
    yield Life(seen, terminal.text)
    installed.remove("chat")


def test_the_phases_are_passed_in_order(life: Life) -> None:
    seen = [phase for phase in sorted(life.phases, key=life.phases.__getitem__) if phase in PHASES]
    assert seen == [phase for phase in PHASES if phase in life.phases]
    assert {"Preparing", "Training", "Complete"} <= set(seen)


def test_watching_a_job_shows_how_it_gets_on(life: Life) -> None:
    head, *lines = life.watched.splitlines()
    assert head.split()[:2] == ["NAME", "PHASE"]
    shown = [line.split()[1] for line in lines]
    assert [phase for phase in PHASES if phase in shown] == [phase for phase, _ in itertools.groupby(shown)]
    if folder := pictures.folder():
        pictures.draw_terminal(life.watched, folder / "watch.png")


def test_the_weights_are_in_the_bucket_and_load(installed: Service, life: Life) -> None:
    model = AutoModelForCausalLM.from_pretrained(installed.bucket / "output" / "model")
    assert model.config.hidden_size == 64
    assert (installed.bucket / "output" / "report" / "report.html").stat().st_size > 10_000


def test_the_status_says_what_came_out(installed: Service, life: Life) -> None:
    status = installed.status("chat")
    assert status["progress"]["step"] == status["progress"]["totalSteps"] == STEPS
    assert status["attempt"] == 1
    assert status["result"]["evalLossTuned"] < status["result"]["evalLossBase"]


def test_its_workers_tried_to_get_out_and_could_not(installed: Service, life: Life) -> None:
    found = installed.status("chat")["result"]["egress"]
    assert {each["to"]: each["reached"] for each in found} == dict.fromkeys(
        ("internet", "metadata", "apiServer", "otherNamespace"), False
    )


def test_a_person_reads_the_status_with_kubectl(installed: Service, life: Life) -> None:
    said = installed.plugin("status", "chat")
    if folder := pictures.folder():
        pictures.draw_terminal(said, folder / "status.png")
        shutil.copy(installed.bucket / "output" / "report" / "report.html", folder / "report.html")
        pictures.draw_page(folder / "report.html", folder / "report-cluster.png", 1100, 1400)
        (folder / "report.html").unlink()
    assert "Complete" in said
    assert f"step {STEPS} of {STEPS}" in said
    assert "Complete" in installed.kubectl("get", "ftj", "chat", f"--namespace={installed.namespace}")


def test_prometheus_has_the_metrics_of_operator_and_training(installed: Service, life: Life) -> None:
    prometheus = installed.prometheus
    found = {name: prometheus.query(f'count_over_time({name}{{name=~"chat|"}}[1h])') for name in METRICS}
    assert [name for name, series in found.items() if not series] == []
    missing = [
        place
        for place, query in panel_queries()
        if not metrics_of(query) <= NEEDS_GPU | UNEVENTFUL and not prometheus.series(_filled(query), "", 600)
    ]
    assert missing == []
    if folder := pictures.folder():
        for name, dashboard in dashboards().items():
            draw(dashboard, prometheus, _filled, round(life.phases["Complete"]) + 20, folder / f"lab-{name}.png")


def _filled(query: str) -> str:
    """A panel's query with its variables as Grafana puts them in."""
    return query.replace("$namespace", "team").replace("$name", "chat").replace("$__range", "5m")


def test_no_alert_fires_for_a_job_that_is_well(installed: Service, life: Life) -> None:
    rules = installed.prometheus.rules()
    assert len(rules) > 5
    assert [rule["name"] for rule in rules if rule["state"] == "firing" or rule["health"] != "ok"] == []


def test_nothing_of_it_runs_soon_after_the_end(installed: Service, life: Life) -> None:
    def running() -> list[str]:
        pods = installed.api.list("v1/Pod", installed.namespace, {JOB_LABEL: "chat"})
        return [pod["metadata"]["name"] for pod in pods if pod["status"]["phase"] == "Running"]

    eventually(lambda: not running(), "the end of the job's pods", 20, running)
    assert installed.api.find("ray.io/v1/RayJob", "chat-a1", installed.namespace) is None


def test_the_chart_tests_itself_by_a_job(installed: Service) -> None:
    """`helm test`: the job of the values runs to its end, seen by a pod with a viewer's rights."""
    installed.helm("test", "--timeout=10m", given=False)
    report = json.loads((installed.bucket / "helm-test" / "report" / "report.json").read_text())
    assert report["training"]["steps"] == 4
