"""Prepare with several workers: one situation a test."""

from __future__ import annotations

from typing import Any

from finetune_api.stage import StageReport
from finetune_api.status import Attempts, Condition, FinetuneJobStatus
from finetune_operator.actions import Decision, Delete, MakeAttempt, MakePrepare, MakePrepareCluster
from finetune_operator.decide import decide
from finetune_operator.observe import Block, Observed, Pod, Stop
from tests.unit.operator_world import (
    NOW,
    TIMING,
    again,
    batch_job,
    job_spec,
    observed,
    pod,
    ray_cluster,
    runtime_spec,
)

DELETE_CLUSTER = Delete("RayCluster", "support-prepare-ray", "cluster-uid")
DELETE_JOB = Delete("Job", "support-prepare", "prepare-uid")


def at(observed: Observed, now: float = NOW) -> Decision:
    return decide(observed, now, TIMING)


def condition(decision: Decision, kind: str) -> Condition:
    return next(each for each in decision.status.conditions if each.type == kind)


def three(**fields: Any) -> Observed:
    """A job whose rows three workers prepare."""
    return observed(
        spec=job_spec(data={"train": [{"uri": "s3://rows/chat.jsonl"}], "prepare": {"workers": 3}}), **fields
    )


def member(role: str = "worker", number: int = 0, **fields: Any) -> Pod:
    """A pod of the cluster."""
    return pod(None, role, number, **{"stage": "prepare", "gpus": 0, **fields})


def driver(**fields: Any) -> Pod:
    """The Job's pod."""
    return pod(None, "other", 9, **{"stage": "prepare", "gpus": 0, **fields})


def ended(report: dict[str, Any], code: int) -> Pod:
    words = StageReport.model_validate(report).model_dump_json(by_alias=True)
    return driver(phase="Failed" if code else "Succeeded", ended=NOW - 1, stops=(Stop("prepare", code, "", words),))


def test_the_cluster_comes_first_and_the_job_when_it_is_ready() -> None:
    first = at(three())
    assert first.actions == (MakePrepareCluster(3),)
    waiting = again(three(), first, prepare_cluster=ray_cluster(ready=False), pods=[member(phase="Pending")])
    second = at(waiting, NOW + 2)
    assert (second.status.phase, second.status.reason, second.actions) == ("Preparing", "Starting", ())
    third = at(again(waiting, second, prepare_cluster=ray_cluster(), pods=[member()]), NOW + 4)
    assert third.actions == (MakePrepare(3),)


def test_one_worker_needs_no_cluster() -> None:
    alone = observed(spec=job_spec(data={"train": [{"uri": "s3://rows/chat.jsonl"}], "prepare": {"workers": 1}}))
    assert at(alone).actions == (MakePrepare(1),)


def test_what_is_prepared_is_recorded_before_the_cluster_goes() -> None:
    done = three(
        prepare=batch_job(complete=True),
        prepare_cluster=ray_cluster(),
        pods=[member(), ended({"plan": {"totalSteps": 100}}, 0)],
    )
    decision = at(done)
    assert decision.status.plan is not None
    assert decision.status.plan.total_steps == 100
    assert decision.actions == (MakeAttempt(1), DELETE_CLUSTER)


def test_a_worker_that_finds_no_node_is_shown_and_given_up_at_the_deadline_once() -> None:
    unplaced = member(phase="Pending", unschedulable="0/4 nodes: Insufficient cpu", created=NOW - 10, scheduled=None)
    waiting = three(prepare_cluster=ray_cluster(ready=False), pods=[member("head"), unplaced])
    soon = at(waiting)
    assert (soon.status.phase, soon.status.reason) == ("Preparing", "Unschedulable")
    late = at(again(waiting, soon), NOW + TIMING.start)
    assert late.status.attempts is not None
    assert late.status.attempts.retries == 1
    assert late.actions == (DELETE_CLUSTER,)
    # The operator was killed before it deleted the cluster, and is back when the pause is over.
    after = at(again(waiting, late), NOW + TIMING.start + 60)
    assert after.status.attempts == late.status.attempts
    assert after.actions == (DELETE_CLUSTER,)
    leaving = at(again(waiting, after, prepare_cluster=None), NOW + TIMING.start + 61)
    assert leaving.actions == (), "KubeRay would take the old pods for the new cluster's"
    anew = at(again(waiting, leaving, prepare_cluster=None, pods=[]), NOW + TIMING.start + 62)
    assert anew.actions == (MakePrepareCluster(3),)
    dead = [member("head", deleting=NOW + TIMING.start + 62)]
    assert at(again(waiting, leaving, prepare_cluster=None, pods=dead), NOW + TIMING.start + 90).actions == ()
    late = at(again(waiting, leaving, prepare_cluster=None, pods=dead), NOW + TIMING.start + 120)
    assert late.actions == (MakePrepareCluster(3),), "a node that never answers is not waited for"


def test_a_job_that_finds_no_node_is_counted_once() -> None:
    unplaced = driver(phase="Pending", unschedulable="0/4 nodes: Insufficient cpu", scheduled=None)
    waiting = observed(prepare=batch_job(), pods=[unplaced])
    late = at(waiting, NOW + TIMING.start)
    after = at(again(waiting, late), NOW + TIMING.start + 60)
    assert late.status.attempts is not None
    assert late.status.attempts.retries == 1
    assert after.status.attempts == late.status.attempts
    assert after.actions == (DELETE_JOB,)


def test_a_quota_that_refuses_the_workers_is_named() -> None:
    words = "pods is forbidden: exceeded quota: small, requested: cpu=4, used: cpu=1, limited: cpu=4"
    waiting = three(prepare_cluster=ray_cluster(ready=False, trouble=words), pods=[member("head")])
    assert at(waiting).status.reason == "QuotaExceeded"


def test_a_worker_that_is_lost_and_finds_no_node_again_is_shown_while_the_others_work() -> None:
    unplaced = member(number=1, phase="Pending", unschedulable="0/4 nodes: Insufficient cpu", scheduled=None)
    working = three(prepare=batch_job(), prepare_cluster=ray_cluster(), pods=[driver(), member(), unplaced])
    decision = at(working, NOW + 2 * TIMING.start)
    assert (decision.status.phase, decision.status.reason) == ("Preparing", "Unschedulable")
    assert condition(decision, "Running").status == "True"
    assert decision.status.failures == []


def test_a_cluster_whose_pods_fail_again_and_again_is_given_up() -> None:
    young = member("head", created=NOW + TIMING.start - 1)
    failing = three(prepare_cluster=ray_cluster(ready=False, begun=NOW), pods=[young])
    assert at(failing, NOW + TIMING.start).status.failures[-1].reason == "Unknown"


def test_a_name_that_is_taken_holds_no_nodes() -> None:
    decision = at(three(prepare=batch_job(foreign=True)))
    assert (decision.status.reason, decision.actions) == ("NameTaken", ())


def test_bad_rows_end_the_job_and_the_cluster() -> None:
    bad = ended({"failure": {"reason": "UserData", "message": "rows.jsonl:7: messages is missing"}}, 3)
    failed = three(
        prepare=batch_job(failed=Block("PodFailurePolicy", "")), prepare_cluster=ray_cluster(), pods=[member(), bad]
    )
    decision = at(failed)
    assert (decision.status.phase, decision.status.reason) == ("Failed", "UserData")
    assert decision.actions == (DELETE_CLUSTER,)


def test_a_worker_without_memory_explains_a_driver_that_only_lost_it() -> None:
    lost = ended({"failure": {"reason": "Unknown", "message": "the Ray cluster could not go on"}}, 1)
    killed = member(stops=(Stop("ray-worker", 137, "OOMKilled", ""),))
    failed = three(
        prepare=batch_job(failed=Block("BackoffLimitExceeded", "")), prepare_cluster=ray_cluster(), pods=[killed, lost]
    )
    assert at(failed).status.reason == "OutOfHostMemory"


def test_an_exit_code_of_ray_is_not_taken_for_one_of_ours() -> None:
    failed = three(
        prepare=batch_job(failed=Block("BackoffLimitExceeded", "")),
        prepare_cluster=ray_cluster(),
        pods=[member(stops=(Stop("ray-worker", 3, "Error", ""),))],
    )
    assert at(failed).status.failures[-1].reason == "Unknown", "3 would be bad rows"


def test_kueue_lets_the_cluster_wait_without_a_deadline_and_may_take_it_back() -> None:
    waiting = three(
        prepare_cluster=ray_cluster(ready=False, suspended=True), queued="Waits in Kueue's queue team: no quota for cpu"
    )
    decision = at(waiting, NOW + 10 * TIMING.start)
    assert (decision.status.phase, decision.status.reason) == ("Preparing", "Queued")
    assert "no quota for cpu" in (decision.status.message or "")
    ready = three(prepare_cluster=ray_cluster(suspended=True))
    assert at(ready).actions == (), "KubeRay calls it ready until the last pod is gone"
    taken = three(prepare=batch_job(), prepare_cluster=ray_cluster(suspended=True), pods=[driver()])
    decision = at(taken)
    assert decision.status.attempts is not None
    assert (decision.status.attempts.preemptions, decision.status.attempts.retries) == (1, 0)
    assert decision.actions == (DELETE_CLUSTER,)
    assert at(again(taken, decision, prepare_cluster=None), NOW + 1).actions == (DELETE_JOB,)


def test_a_cluster_that_somebody_deleted_is_made_again_for_the_job_that_is_there() -> None:
    assert at(three(prepare=batch_job(), pods=[driver()])).actions == (MakePrepareCluster(3),)


def test_suspending_takes_job_and_cluster() -> None:
    running = three(prepare=batch_job(), prepare_cluster=ray_cluster(), pods=[member(), driver()])
    assert running.job.spec is not None
    spec = running.job.spec.model_copy(update={"suspend": True})
    there = observed(spec=spec, prepare=batch_job(), prepare_cluster=ray_cluster(), pods=[member(), driver()])
    decision = at(there)
    assert decision.status.reason == "Suspending"
    assert set(decision.actions) == {DELETE_JOB, DELETE_CLUSTER}
    assert at(observed(spec=spec)).status.phase == "Suspended"


def test_a_pod_with_too_many_rows_asks_for_workers_and_costs_no_budget() -> None:
    words = "Container prepare for pod team/support-prepare-x failed with exit code 9 matching FailJob rule at index 1"
    asks = observed(
        prepare=batch_job(failed=Block("PodFailurePolicy", words)),
        pods=[ended({"failure": {"reason": "Unknown", "message": "many"}, "workers": 5}, 9)],
    )
    first = at(asks)
    assert first.status.attempts is not None
    assert (first.status.attempts.prepare_workers, first.status.attempts.retries) == (5, 0)
    assert first.status.failures == []
    assert first.actions == (DELETE_JOB,)
    assert at(again(asks, first), NOW + 1).actions == (DELETE_JOB,), "it was killed before it did"
    second = at(again(asks, first, prepare=None), NOW + 2)
    assert second.actions == (MakePrepareCluster(5),)
    third = at(again(asks, first, prepare=None, pods=[], prepare_cluster=ray_cluster()), NOW + 9)
    assert third.actions == (MakePrepare(5),)


def test_no_more_workers_than_the_runtime_allows_are_given() -> None:
    asks = observed(
        runtime=runtime_spec(limits={"maxWorkers": 4}),
        prepare=batch_job(failed=Block("PodFailurePolicy", "Container prepare failed with exit code 9 matching")),
        pods=[ended({"failure": {"reason": "Unknown", "message": "many"}, "workers": 50}, 9)],
    )
    decision = at(asks)
    assert decision.status.attempts is not None
    assert decision.status.attempts.prepare_workers == 4


def test_a_pod_that_asked_and_is_gone_is_asked_again() -> None:
    asks = observed(prepare=batch_job(failed=Block("PodFailurePolicy", "failed with exit code 9 matching")))
    first = at(asks)
    assert first.status.failures == []
    assert first.actions == (DELETE_JOB,)
    assert at(again(asks, first, prepare=None), NOW + 1).actions == (MakePrepare(None),)


def test_an_ended_job_keeps_no_cluster() -> None:
    begun = FinetuneJobStatus(start_time="2027-01-15T07:00:00Z", attempts=Attempts())
    spec = job_spec(
        data={"train": [{"uri": "s3://rows/chat.jsonl"}], "prepare": {"workers": 3}}, limits={"activeDeadline": "1s"}
    )
    late = observed(spec=spec, status=begun, prepare_cluster=ray_cluster(), pods=[member()])
    decision = at(late)
    assert (decision.status.phase, decision.status.reason) == ("Failed", "DeadlineExceeded")
    assert decision.actions == (DELETE_CLUSTER,)
