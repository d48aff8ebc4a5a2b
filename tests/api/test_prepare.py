"""Prepare with several workers: the real KubeRay makes its pods, the scripted kubelet moves them."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any, Final

import pytest

from finetune_api.errors import TooManyRows
from finetune_api.stage import StageFailure, StageReport
from tests.api import jobs
from tests.api.cluster import Cluster
from tests.api.lives import NO_IMAGE
from tests.api.objects import Object, eventually
from tests.api.script import PREPARED, Hold, Script, Stage, failed
from tests.api.world import World, world

CLUSTER: Final = jobs.RAY_CLUSTER
HASTY: Final = {"start-deadline": "15s"}
LONG: Final = Stage(PREPARED, seconds=3600)
NO_CPUS: Final = "0/4 nodes are available: 4 Insufficient cpu. preemption: 0/4 nodes are available."


@pytest.fixture(scope="module")
def here(local_cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with world(local_cluster, tmp_path_factory.mktemp("prepare"), "prepare.txt", ({}, HASTY), namespaces=2) as here:
        yield here


def submit(here: World, name: str, script: Script, namespace: str = "", workers: int = 3, **fields: Any) -> None:
    here.submit(name, script, namespace, data__prepare={"workers": workers}, **fields)


def pods(here: World, job: str, namespace: str = "") -> list[Object]:
    """Of the stage prepare, those that have not ended and are not told to."""
    found = here.api.list(
        "v1/Pod", namespace or here.namespaces[0], {"finetune.dev/job": job, "finetune.dev/stage": "prepare"}
    )
    return [
        pod
        for pod in found
        if pod["status"]["phase"] not in ("Succeeded", "Failed") and "deletionTimestamp" not in pod["metadata"]
    ]


def roles(found: list[Object]) -> list[str]:
    return sorted(pod["metadata"]["labels"].get("ray.io/node-type", "driver") for pod in found)


def prepares(here: World, job: str) -> None:
    here.wait(job, lambda status: status.get("reason") == "Preparing")
    eventually(lambda: roles(pods(here, job)) == ["driver", "head", "worker", "worker", "worker"], f"{job}'s pods")


def test_rows_are_prepared_by_a_cluster_that_is_gone_when_training_starts(here: World) -> None:
    submit(here, "many", Script(prepare=Stage(PREPARED, seconds=2)))
    prepares(here, "many")
    cluster = here.api.get(CLUSTER, "many-prepare-ray", here.namespaces[0])
    assert cluster["spec"]["workerGroupSpecs"][0]["replicas"] == 3
    status = here.finished("many")
    assert (status["phase"], status.get("failures", [])) == ("Complete", [])
    assert status["plan"]["totalSteps"] == 6
    here.api.wait_gone(CLUSTER, "many-prepare-ray", here.namespaces[0])
    eventually(lambda: pods(here, "many") == [], "the cluster's pods to go")
    reasons = [each.get("reason") for each in here.histories.of(here.namespaces[0], "many")]
    assert reasons.index("Starting") < reasons.index("Preparing") < reasons.index("Training")


def test_more_rows_than_one_pod_prepares_get_a_cluster_and_cost_no_try(here: World) -> None:
    failure = StageFailure(reason="Unknown", message="the rows are for 2 workers")
    asks = Stage(StageReport(failure=failure, workers=2), TooManyRows.exit_code)
    here.submit("asks", Script(prepare=asks, prepare_again=Stage(PREPARED)), limits__retries=0)
    status = here.finished("asks")
    assert (status["phase"], status["attempts"]["prepareWorkers"], status["attempts"]["retries"]) == ("Complete", 2, 0)
    assert status.get("failures", []) == []
    asked = [each for each in here.histories.of(here.namespaces[0], "asks") if each["reason"] == "Restarting"]
    here.say("one pod asks for workers", asked[0])
    here.api.wait_gone(CLUSTER, "asks-prepare-ray", here.namespaces[0])


def test_bad_rows_end_the_job_and_free_every_pod(here: World) -> None:
    submit(here, "bad", Script(prepare=failed("UserData", "s3://rows/train.jsonl:17: messages is not a list", 3)))
    status = here.finished("bad")
    assert (status["phase"], status["reason"]) == ("Failed", "UserData")
    here.say("a cluster finds a bad row", status)
    here.api.wait_gone(CLUSTER, "bad-prepare-ray", here.namespaces[0])
    eventually(lambda: pods(here, "bad") == [], "the cluster's pods to go")


def test_suspending_takes_everything_and_resuming_begins_anew(here: World) -> None:
    submit(here, "paused", Script(prepare=LONG, prepare_again=Stage(PREPARED)))
    prepares(here, "paused")
    before = here.api.get(CLUSTER, "paused-prepare-ray", here.namespaces[0])["metadata"]["uid"]
    here.patch("paused", {"suspend": True})
    here.wait("paused", lambda status: status["phase"] == "Suspended")
    here.api.wait_gone(CLUSTER, "paused-prepare-ray", here.namespaces[0])
    assert pods(here, "paused") == []
    here.patch("paused", {"suspend": False})
    after = here.api.wait_for(CLUSTER, "paused-prepare-ray", here.namespaces[0])["metadata"]["uid"]
    assert after != before
    status = here.finished("paused")
    assert (status["phase"], status["attempts"]["retries"]) == ("Complete", 0)


def test_a_job_that_is_deleted_meanwhile_leaves_nothing(here: World) -> None:
    submit(here, "deleted", Script(prepare=LONG))
    prepares(here, "deleted")
    here.api.delete(jobs.JOB_KIND, "deleted", here.namespaces[0])
    here.api.wait_gone(CLUSTER, "deleted-prepare-ray", here.namespaces[0], 60)
    eventually(lambda: pods(here, "deleted") == [], "every pod to go", 60)


def test_a_cluster_without_room_is_shown_and_given_up_at_the_deadline(here: World) -> None:
    script = Script(gathering=Hold("Unschedulable", NO_CPUS, "worker"))
    submit(here, "no-room", script, here.namespaces[2], limits__retries=0)
    status = here.wait("no-room", lambda status: status.get("reason") == "Unschedulable", here.namespaces[2])
    assert status["phase"] == "Preparing"
    status = here.finished("no-room", here.namespaces[2])
    assert (status["phase"], status["reason"]) == ("Failed", "Unschedulable")
    here.say("no node has the cores of a worker that prepares", status)
    here.api.wait_gone(CLUSTER, "no-room-prepare-ray", here.namespaces[2])


def test_what_is_in_the_way_of_the_cluster_is_said_and_it_goes_on_by_itself(here: World) -> None:
    script = Script(gathering=Hold("ImagePullBackOff", NO_IMAGE, "worker", seconds=5))
    submit(here, "no-image", script)
    quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "small"}}
    here.api.create(quota | {"spec": {"hard": {"pods": "2"}}}, namespace=here.namespaces[1])
    submit(here, "quota", Script(), here.namespaces[1])
    status = here.wait("quota", lambda status: status.get("reason") == "QuotaExceeded", here.namespaces[1])
    here.say("a quota has no room for the workers that prepare", status)
    here.wait("no-image", lambda status: status.get("reason") == "ImagePullBackOff")
    here.api.delete("v1/ResourceQuota", "small", here.namespaces[1])
    assert here.finished("no-image")["phase"] == "Complete"
    assert here.finished("quota", here.namespaces[1])["phase"] == "Complete"


def test_kueue_lets_the_cluster_wait_and_may_take_its_quota_back(here: World) -> None:
    """The test plays Kueue, which suspends a RayCluster when it is made."""
    late = Hold("Unschedulable", NO_CPUS, seconds=3)
    with jobs.runtime(here.api, queueName="cpus") as runtime:
        script = Script(prepare=LONG, prepare_again=Stage(PREPARED), gathering=late)
        submit(here, "queued", script, runtime=runtime)
        made = here.api.wait_for(CLUSTER, "queued-prepare-ray", here.namespaces[0])
        assert made["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "cpus"
        eventually(lambda: len(pods(here, "queued")) == 4, "head and workers")  # Kueue would suspend it before that
        suspend(here, True)
        here.wait("queued", lambda status: status.get("reason") == "Queued")
        eventually(lambda: pods(here, "queued") == [], "all of them to go")
        suspend(here, False)
        prepares(here, "queued")
        suspend(here, True)
        status = here.finished("queued")
        assert (status["phase"], status["attempts"]["preemptions"]) == ("Complete", 1)
        assert [each["reason"] for each in status["failures"]] == ["Preempted"]


def suspend(here: World, value: bool) -> None:
    here.api.patch(CLUSTER, "queued-prepare-ray", here.namespaces[0], {"spec": {"suspend": value}})


def test_an_operator_that_is_killed_meanwhile_goes_on(here: World) -> None:
    submit(here, "outlived", Script(prepare=Stage(PREPARED, seconds=4)))
    prepares(here, "outlived")
    os.kill(here.operators[0].pid, signal.SIGKILL)
    here.operators[0].restart()
    status = here.finished("outlived")
    assert (status["phase"], status.get("failures", []), status["attempt"]) == ("Complete", [], 1)


def test_nothing_happened_that_the_operators_did_not_foresee(here: World) -> None:
    assert [each.tracebacks() for each in here.operators] == [[], []]
