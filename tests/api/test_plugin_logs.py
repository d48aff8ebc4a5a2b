"""`kubectl finetune logs`, through the real subresource; a small server plays the kubelet that has them."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from functools import partial

import pytest

from tests.api.cluster import Cluster
from tests.api.logs import LogNode, log_node
from tests.api.objects import Api
from tests.api.plugin import KIND, NAME, SECONDS, MakeJob, Run, command, environment, make_job, run
from tests.unit import plugin_cases as cases


@pytest.fixture
def plugin(api_cluster: Cluster, namespace: str) -> Run:
    return partial(run, api_cluster.kubeconfig, namespace)


@pytest.fixture
def make(api: Api, namespace: str) -> MakeJob:
    return partial(make_job, api, namespace)


@pytest.fixture
def node(api: Api, local_cluster: Cluster) -> Iterator[LogNode]:
    with log_node(api, local_cluster) as node:
        yield node


def pod_labels(stage: str, attempt: int | None = None, role: str = "") -> dict[str, str]:
    found = {"finetune.dev/job": NAME, "finetune.dev/stage": stage}
    if attempt is not None:
        found["finetune.dev/attempt"] = str(attempt)
    return found | ({"ray.io/node-type": role} if role else {})


@pytest.fixture
def pods(node: LogNode, make: MakeJob, namespace: str) -> LogNode:
    """A job in its second attempt, with the pods of prepare and of that attempt."""
    make(status=cases.training()["status"])
    node.pod(namespace, "p", pod_labels("prepare"), "prepare")
    node.write("p", "32,000 rows")
    node.end(namespace, "p", "prepare")
    for name, role in (("worker-b", "worker"), ("worker-a", "worker"), ("zhead", "head")):
        node.pod(namespace, name, pod_labels("train", 2, role))
    node.write("zhead", "driver starts", "driver waits")
    node.write("worker-a", "[rank 0] loads", "[rank 1] loads", "[rank 10] loads")
    node.write("worker-a", "[rank 1] dies", previous=True)
    node.write("worker-b", "[rank 2] loads")
    return node


def test_logs_come_in_the_order_of_the_stages_with_the_head_first(plugin: Run, pods: LogNode) -> None:
    done = plugin("logs", NAME)
    assert done.returncode == 0
    assert done.stdout.splitlines() == [
        "[p] 32,000 rows",
        "[zhead] driver starts",
        "[zhead] driver waits",
        "[worker-a] [rank 0] loads",
        "[worker-a] [rank 1] loads",
        "[worker-a] [rank 10] loads",
        "[worker-b] [rank 2] loads",
    ]
    assert done.stderr == "attempt 1 has no pods any more, and so no logs\n"


@pytest.mark.parametrize(
    ("flags", "lines"),
    [
        (("--stage", "prepare"), ["32,000 rows"]),
        (("--head", "--tail", "1"), ["driver waits"]),
        (("--head", "--tail", "1", "--prefix"), ["[zhead] driver waits"]),
        (("--rank", "1"), ["[worker-a] [rank 1] loads"]),
        (("--attempt", "2", "--tail", "0"), []),
    ],
)
def test_logs_can_be_narrowed(plugin: Run, pods: LogNode, flags: tuple[str, ...], lines: list[str]) -> None:
    assert plugin("logs", NAME, *flags).stdout.splitlines() == lines


def test_a_rank_that_said_nothing_is_told(plugin: Run, pods: LogNode) -> None:
    assert "no line of rank 7 in worker-a, worker-b" in plugin("logs", NAME, "--rank", "7").stderr


def test_logs_of_an_attempt_that_is_over_give_its_failure_instead(plugin: Run, pods: LogNode) -> None:
    done = plugin("logs", NAME, "--attempt", "1")
    assert done.returncode == 1
    assert f"{NAME} has no pods of attempt 1; logs go with their pods" in done.stderr
    assert "attempt 1 failed: Preempted: Worker pod" in done.stderr
    assert f"{NAME} has no attempt 3: its newest is 2" in plugin("logs", NAME, "--attempt", "3").stderr


def test_a_pod_that_has_not_started_is_named_with_why(plugin: Run, pods: LogNode, namespace: str) -> None:
    pods.waits(namespace, "worker-b", "ray-worker", "ImagePullBackOff")
    done = plugin("logs", NAME)
    assert "worker-b has not started: ImagePullBackOff\n" in done.stderr
    assert "driver starts" in done.stdout


def test_following_logs_takes_up_later_pods_and_ends_with_the_job(
    api: Api, local_cluster: Cluster, namespace: str, pods: LogNode
) -> None:
    line = command(local_cluster.kubeconfig, namespace, "logs", NAME, "-f", "--stage", "train", "--tail", "1")
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True, env=environment()) as following:
        assert following.stdout
        first = {following.stdout.readline().strip() for _ in range(3)}
        assert first == {"[zhead] driver waits", "[worker-a] [rank 10] loads", "[worker-b] [rank 2] loads"}
        pods.write("worker-b", "[rank 2] step 1")
        assert following.stdout.readline() == "[worker-b] [rank 2] step 1\n"
        pods.write("late", "third attempt", "starts")
        pods.pod(namespace, "late", pod_labels("train", 3, "head"))
        assert [following.stdout.readline() for _ in range(2)] == ["[late] third attempt\n", "[late] starts\n"]
        api.patch(KIND, NAME, namespace, {"status": cases.complete()["status"]}, status=True)
        for name in ("zhead", "worker-a", "worker-b", "late"):
            pods.end(namespace, name)
        assert following.wait(SECONDS) == 0
        assert following.stdout.read() == ""
