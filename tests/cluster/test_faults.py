"""What goes wrong on a real cluster, and what the job does about it: ../shared/faults.md's promises, with seconds."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.api.objects import Object
from tests.cluster.service import OPERATOR_NAMESPACE, Service

STEPS = 800
END = 600


@contextmanager
def measured(what: str) -> Iterator[None]:
    """Prints how long the block took; pytest shows it with -s or -rP."""
    started = time.monotonic()
    yield
    print(f"{what}: {time.monotonic() - started:.0f} s")


@pytest.fixture
def training(installed: Service, request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of a job that is past its first checkpoint, and gone after the test."""
    name = request.node.name.removeprefix("test_")[:30].replace("_", "-").strip("-")
    installed.submit_long(name, STEPS)
    yield name
    installed.remove(name)


def _ends_well(installed: Service, name: str) -> Object:
    status = installed.phase(name, "Complete", "Failed", seconds=END)
    assert status["phase"] == "Complete", status
    assert status["progress"]["step"] == STEPS
    return status


def test_a_killed_worker_pod_costs_little(installed: Service, training: str) -> None:
    worker = installed.pods(training, "ray.io/node-type", "worker")[0]
    with measured("worker pod deleted: to the end"):
        installed.kubectl("delete", "pod", worker, "--namespace", installed.namespace, "--wait=false")
        _ends_well(installed, training)


def test_a_killed_head_pod_makes_another_attempt(installed: Service, training: str) -> None:
    head = installed.pods(training, "ray.io/node-type", "head")[0]
    with measured("head pod killed: to the next attempt"):
        command = ["delete", "pod", head, "--namespace", installed.namespace, "--grace-period=0", "--force"]
        installed.kubectl(*command)
        installed.wait(training, lambda status: status.get("attempt", 1) > 1, 60)
    status = _ends_well(installed, training)
    assert [failure["attempt"] for failure in status["failures"]] == [1]


def test_a_drained_node_gives_its_pods_up_with_a_checkpoint(installed: Service, training: str) -> None:
    worker = installed.pods(training, "ray.io/node-type", "worker")[0]
    node = installed.api.get("v1/Pod", worker, installed.namespace)["spec"]["nodeName"]
    try:
        with measured("node drained: to the next attempt"):
            installed.kubectl(
                "drain", node, "--ignore-daemonsets", "--delete-emptydir-data", "--force", "--timeout=180s", seconds=200
            )
            status = installed.wait(training, lambda status: status.get("attempt", 1) > 1, 120)
    finally:
        installed.kubectl("uncordon", node)  # the other node has no room for all
    at, reached = status["checkpoint"]["step"], status["progress"]["step"]
    assert reached - at <= 1, "a step of an attempt that was told in time"
    assert status["attempts"]["retries"] == 0, "it was taken from the budget for preemptions"
    _ends_well(installed, training)


def test_training_does_not_need_the_operator(installed: Service, training: str) -> None:
    before = installed.uids(training)
    with measured("operator deleted: to a new leader's status"):
        installed.kubectl("delete", "pods", "--namespace", OPERATOR_NAMESPACE, "--all", "--wait=false")
        step = installed.status(training)["progress"]["step"]
        installed.wait(training, lambda status: status["progress"]["step"] > step, 120)
    assert installed.uids(training) == before
    assert _ends_well(installed, training)["attempt"] == 1


def test_a_minute_without_object_storage_is_waited_out(installed: Service, training: str) -> None:
    os.kill(installed.s3.process, signal.SIGSTOP)
    try:
        time.sleep(60)
    finally:
        os.kill(installed.s3.process, signal.SIGCONT)
    with measured("object storage back: to the end"):
        _ends_well(installed, training)


def test_an_image_that_is_not_there_is_named_at_once(installed: Service) -> None:
    with installed.another_runtime("no-image", images={"trainer": "localhost/missing:1", "pullPolicy": "Never"}):
        installed.submit("no-image", runtimeRef={"name": "no-image"}, output={"uri": "s3://team/no-image"})
        with measured("missing image: to its name in the status"):
            status = installed.wait("no-image", lambda status: "localhost/missing:1" in status.get("message", ""), 60)
        assert status["phase"] == "Preparing"
        installed.remove("no-image")


def test_resources_that_no_node_has_are_named_at_once(installed: Service) -> None:
    large = {"count": 1, "gpusEach": 0, "cpusEach": 64}
    installed.submit("too-large", workers=large, output={"uri": "s3://team/too-large"})
    with measured("no node is large enough: to the status"):
        status = installed.wait("too-large", lambda status: status.get("reason") == "Unschedulable", 240)
    assert "cpu" in status["message"]
    installed.remove("too-large")
