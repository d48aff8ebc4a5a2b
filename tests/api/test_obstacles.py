"""What keeps a job from going on is said in its status, and when it is gone the job goes on by itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import pytest

from tests.api import jobs
from tests.api.cluster import Cluster, cluster, install_ray_crds
from tests.api.lives import ENDLESS, NO_GPUS
from tests.api.objects import Object, eventually
from tests.api.obstacles import OBSTACLES, Ground, Obstacle
from tests.api.script import Hold, Script, Training
from tests.api.world import World, world

KUEUE: Final = "kueue.x-k8s.io"
IDS: Final = [each.name for each in OBSTACLES]


@pytest.fixture(scope="module")
def here(local_cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder, count = tmp_path_factory.mktemp("obstacles"), len(OBSTACLES) + 1
    with world(local_cluster, folder, "obstacles.txt", namespaces=count) as here:
        yield here


@pytest.fixture(scope="module")
def grounds(here: World) -> Iterator[dict[str, Ground]]:
    """Every obstacle, and before it a job."""
    with ExitStack() as stack:
        grounds = {
            each.name: Ground(here.api, namespace, stack)
            for each, namespace in zip(OBSTACLES, here.namespaces, strict=False)
        }
        for each in OBSTACLES:
            ground = grounds[each.name]
            here.submit(each.name, each.script, ground.namespace, **each.place(ground))
        yield grounds


@pytest.fixture(scope="module")
def cleared(grounds: dict[str, Ground]) -> dict[str, Ground]:
    """The same without the obstacles."""
    for each in OBSTACLES:
        if each.clear:
            each.clear(grounds[each.name])
    return grounds


def complaints(here: World, obstacle: Obstacle, namespace: str) -> list[Object]:
    """Statuses that said what is in the way."""
    past = here.histories.of(namespace, obstacle.name)
    return [status for status in past if status.get("reason") == obstacle.reason]


@pytest.mark.parametrize("obstacle", OBSTACLES, ids=IDS)
def test_the_status_says_what_is_in_the_way(here: World, grounds: dict[str, Ground], obstacle: Obstacle) -> None:
    namespace = grounds[obstacle.name].namespace
    eventually(lambda: complaints(here, obstacle, namespace), f"{obstacle.name} to say so", 60)


@pytest.mark.parametrize("obstacle", OBSTACLES, ids=IDS)
def test_the_job_goes_on_when_nothing_is_in_the_way(
    here: World, cleared: dict[str, Ground], obstacle: Obstacle
) -> None:
    namespace = cleared[obstacle.name].namespace
    status = here.finished(obstacle.name, namespace)
    assert (status["phase"], status.get("failures", [])) == ("Complete", []), status
    here.say(obstacle.story, complaints(here, obstacle, namespace)[-1])  # by then about all pods


def test_kueue_lets_a_job_wait_and_may_take_its_quota_back(here: World, workloads: None) -> None:
    """The test plays Kueue, which suspends a RayJob when it is made and says why in a Workload."""
    namespace = here.namespaces[-1]
    late = Hold("Unschedulable", NO_GPUS, seconds=2)
    script = Script(attempts=(Training(steps=ENDLESS, hold=late), Training()))
    with jobs.runtime(here.api, queueName="gpus") as runtime:
        here.submit("queued", script, namespace, runtime=runtime)
        ray_job = here.api.wait_for(jobs.RAY_JOB, "queued-a1", namespace)
        assert ray_job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"
        suspend(here, namespace, True)
        waits = {
            "type": "QuotaReserved", "status": "False",
            "message": "couldn't assign flavors to pod set workers: insufficient unused quota for nvidia.com/gpu",
        }  # fmt: skip
        here.api.create(
            {
                "apiVersion": "kueue.x-k8s.io/v1beta1",
                "kind": "Workload",
                "metadata": {
                    "name": "rayjob-queued-a1",
                    "labels": {"kueue.x-k8s.io/job-uid": ray_job["metadata"]["uid"]},
                },
                "spec": {"queueName": "gpus"},
                "status": {"conditions": [waits]},
            },
            namespace=namespace,
        )
        status = here.wait("queued", lambda status: "insufficient" in status.get("message", ""), namespace)
        here.say("Kueue lets the job wait", status)
        assert status["attempt"] == 1

        suspend(here, namespace, False)
        here.wait("queued", lambda status: status["phase"] == "Training", namespace)
        suspend(here, namespace, True)
        status = here.finished("queued", namespace)
        here.say("Kueue takes the quota back", status)
        assert (status["phase"], status["attempt"], status["attempts"]["preemptions"]) == ("Complete", 2, 1)


@pytest.fixture
def workloads(here: World) -> Iterator[None]:
    """Kueue's Workload, of which only the name matters."""
    anything = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    version = {"name": "v1beta1", "served": True, "storage": True, "schema": {"openAPIV3Schema": anything}}
    kind = "apiextensions.k8s.io/v1/CustomResourceDefinition"
    here.api.create(
        {
            "apiVersion": "apiextensions.k8s.io/v1",
            "kind": "CustomResourceDefinition",
            "metadata": {"name": f"workloads.{KUEUE}"},
            "spec": {
                "group": KUEUE,
                "scope": "Namespaced",
                "names": {"plural": "workloads", "kind": "Workload"},
                "versions": [version],
            },
        }
    )
    try:
        eventually(lambda: here.api.serves(KUEUE, "workloads"), "Workloads to be served")
        yield
    finally:
        here.api.delete(kind, f"workloads.{KUEUE}")


def suspend(here: World, namespace: str, value: bool) -> None:
    here.api.patch(jobs.RAY_JOB, "queued-a1", namespace, {"spec": {"suspend": value}})


def test_a_cluster_without_kuberay_is_named_and_the_job_goes_on_when_it_is_installed(tmp_path: Path) -> None:
    with (
        cluster(tmp_path / "bare", ray=False) as bare,
        world(bare, tmp_path / "operator", "no-kuberay.txt") as here,
    ):
        here.submit("early")
        status = here.wait("early", lambda status: status["reason"] == "KubeRayMissing")
        here.say("KubeRay is not installed", status)
        install_ray_crds(here.api)
        here.api.wait_for(jobs.RAY_JOB, "early-a1", here.namespaces[0], seconds=60)
        assert here.operators[0].tracebacks() == []


def test_nothing_happened_that_the_operator_did_not_foresee(here: World) -> None:
    assert [each.tracebacks() for each in here.operators] == [[]]
