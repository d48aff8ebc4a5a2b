"""Whole lives of jobs, with the real KubeRay and a scripted kubelet: what users read, and what is left at the end."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby, pairwise
from typing import Final

import pytest

from tests.api import jobs
from tests.api.cluster import Cluster
from tests.api.golden import as_text
from tests.api.lives import ENDLESS, LIVES, Life, head_vanishes
from tests.api.objects import Object
from tests.api.script import Script, Training
from tests.api.world import World, world

PATIENT: Final = {"progress-deadline": "20s"}
HASTY: Final = {"start-deadline": "15s"}
LONG: Final = Script(attempts=(Training(steps=ENDLESS),))


@pytest.fixture(scope="module")
def here(local_cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Two operators, the second with a short deadline for starts; every job of LIVES, all on their way."""
    with world(local_cluster, tmp_path_factory.mktemp("life"), "status.txt", (PATIENT, HASTY)) as here:
        for life in LIVES:
            here.submit(life.name, life.script, namespace(here, life), **life.fields)
        yield here


def namespace(here: World, life: Life) -> str:
    return here.namespaces[life.hasty]


def trains(status: Object) -> bool:
    return status.get("phase") == "Training"


def own_events(here: World, job: str) -> list[Object]:
    events = here.api.list("v1/Event", here.namespaces[0])
    return [
        each
        for each in events
        if each["involvedObject"]["name"] == job and each["source"].get("component") == "finetune-operator"
    ]


def test_a_job_that_trains_is_deleted_and_its_gpus_are_free(here: World) -> None:
    here.submit("deleted", LONG)
    here.wait("deleted", trains)
    assert here.holding("deleted")
    here.api.delete(jobs.JOB_KIND, "deleted", here.namespaces[0])
    here.api.wait_gone(jobs.JOB_KIND, "deleted", here.namespaces[0], 10)
    here.wait_released("deleted", seconds=30)
    for kind in ("v1/ConfigMap", "batch/v1/Job", "networking.k8s.io/v1/NetworkPolicy", jobs.RAY_CLUSTER):
        labels = (
            {"finetune.dev/job": "deleted"}
            if kind != jobs.RAY_CLUSTER
            else {"ray.io/originated-from-cr-name": "deleted-a1"}
        )
        assert [
            each
            for each in here.api.list(kind, here.namespaces[0], labels)
            if "deletionTimestamp" not in each["metadata"]
        ] == []


def test_a_suspended_job_frees_its_gpus_and_goes_on_at_the_same_step_with_other_workers(here: World) -> None:
    here.submit("paused", Script(attempts=(Training(steps=ENDLESS), Training(steps=ENDLESS))))
    here.wait("paused", lambda status: status.get("progress", {}).get("step", 0) >= 3)
    here.patch("paused", {"suspend": True})
    status = here.wait("paused", lambda status: status["phase"] == "Suspended")
    here.say("a job is suspended", status)
    assert here.holding("paused") == []
    assert (status["attempts"]["retries"], status["attempts"]["preemptions"]) == (0, 0)
    saved = here.kubelet.work(here.namespaces[0], "paused").checkpoint
    assert saved >= 3

    here.patch("paused", {"suspend": False, "workers": {"count": 1}})
    here.wait("paused", lambda status: trains(status) and status["attempt"] == 2)
    ray_job = here.api.get(jobs.RAY_JOB, "paused-a2", here.namespaces[0])
    assert ray_job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"] == 1
    assert here.kubelet.work(here.namespaces[0], "paused").began == [0, saved]
    here.api.delete(jobs.JOB_KIND, "paused", here.namespaces[0])


def test_a_lost_head_is_followed_by_a_new_attempt_within_a_minute(here: World) -> None:
    here.submit("beheaded", LONG)
    here.wait("beheaded", trains)
    here.kubelet.meet(here.namespaces[0], "beheaded", head_vanishes)
    here.wait("beheaded", lambda status: status["attempt"] == 2, seconds=60)
    here.api.wait_for(jobs.RAY_JOB, "beheaded-a2", here.namespaces[0])
    here.wait("beheaded", trains)
    here.api.delete(jobs.JOB_KIND, "beheaded", here.namespaces[0])


def test_an_ended_job_is_deleted_when_its_time_to_live_is_over(here: World) -> None:
    here.submit("mayfly", Script(), ttlAfterFinished="2s")
    here.wait("mayfly", trains)
    here.api.wait_gone(jobs.JOB_KIND, "mayfly", here.namespaces[0], 60)


@pytest.mark.parametrize("life", LIVES, ids=[life.name for life in LIVES])
def test_a_job_ends_as_it_should_and_says_why(here: World, life: Life) -> None:
    if life.later:
        here.wait(life.name, lambda status: status.get("checkpoint"))
        here.patch(life.name, dict(life.later))
    status = here.finished(life.name, namespace(here, life))
    assert (status["phase"], status["reason"]) == (life.phase, life.reason), as_text(status)
    assert [each["reason"] for each in status.get("failures", [])] == list(life.failures), as_text(status)
    assert [each["type"] for each in status["conditions"] if each["status"] == "True"][-1] == life.phase
    here.say(life.story, status)
    here.wait_released(life.name, namespace(here, life))


def test_the_status_of_a_good_job_tells_all(here: World) -> None:
    status = here.finished("good")
    progress, cost, goodput = status["progress"], status["cost"], status["goodput"]
    assert (progress["step"], progress["totalSteps"], progress["percent"], progress["loss"]) == (6, 6, 100, 1.25)
    assert status["plan"]["totalSteps"] == 6
    assert status["checkpoint"]["step"] == 6
    assert status["result"]["uri"] == "s3://models/good/model"
    assert status["result"]["evalLossTuned"] < status["result"]["evalLossBase"]
    assert status["attempts"]["ended"] == status["attempt"] == 1
    held = status["accounted"]["held"]
    assert cost["currency"] == "USD"
    assert 0 < status["accounted"]["spent"] <= 2 * 3.6 / 3600 * held + 1e-6  # two GPUs, at most all the time
    assert goodput["trainingSeconds"] + sum(goodput["lostSeconds"].values()) == pytest.approx(held, abs=0.5)
    events = own_events(here, "good")
    assert {each["type"] for each in events} == {"Normal"}
    assert {each["reason"] for each in events} >= {"Preparing", "Queued", "Complete"}


def test_budgets_are_charged_for_what_happened_and_for_nothing_else(here: World) -> None:
    def used(job: str) -> tuple[int, int]:
        book = here.finished(job)["attempts"]
        return book["retries"], book["preemptions"]

    assert used("good") == (0, 0)
    assert used("preempted-only") == (0, 1)
    assert used("network") == (1, 0)
    assert used("storage") == (1, 0)
    assert used("gpu-oom") == (0, 0)


def test_a_new_attempt_goes_on_from_the_last_checkpoint(here: World) -> None:
    here.finished("network")
    assert here.kubelet.work(here.namespaces[0], "network").began == [0, 2]
    here.finished("preempted")
    assert here.kubelet.work(here.namespaces[0], "preempted").began == [0, 3]


def test_no_status_ever_went_back(here: World) -> None:
    for life in LIVES:
        here.finished(life.name, namespace(here, life))
    for statuses in here.histories.all():
        for before, after in pairwise(statuses):
            assert after.get("attempt", 0) >= before.get("attempt", 0)
            old, new = before.get("progress"), after.get("progress")
            if old and new and old["attempt"] == new["attempt"]:
                assert (new["step"], new["updatedTime"]) >= (old["step"], old["updatedTime"])
            assert after.get("accounted", {}).get("spent", 0) >= before.get("accounted", {}).get("spent", 0)
        for _, attempt in groupby(statuses, lambda status: status.get("attempt", 0)):
            phases = [phase for phase, _ in groupby(each["phase"] for each in attempt)]
            assert phases.count(phases[-1]) == 1 or phases[-1] == "Queued", phases


def test_nothing_happened_that_the_operators_did_not_foresee(here: World) -> None:
    assert [each.tracebacks() for each in here.operators] == [[], []]
