"""The table of what the system does: one situation a test."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from finetune_api.stage import StageReport
from finetune_api.status import Attempts, CheckpointStatus, Condition, FinetuneJobStatus
from finetune_operator.actions import (
    Action,
    Decision,
    Delete,
    DeleteSelf,
    ForceDelete,
    MakeAttempt,
    MakePrepare,
    MakeResult,
)
from finetune_operator.decide import decide
from finetune_operator.observe import Block, Observed, Refused, Stop, format_time
from tests.unit.operator_world import (
    NOW,
    RESULT,
    TIMING,
    again,
    batch_job,
    job_spec,
    observed,
    pod,
    prepared,
    ray_job,
    report,
    runtime_spec,
    training,
)


def at(observed: Observed, now: float = NOW) -> Decision:
    return decide(observed, now, TIMING)


def condition(decision: Decision, kind: str) -> Condition:
    return next(each for each in decision.status.conditions if each.type == kind)


def test_a_new_job_gets_its_prepare_job_and_no_gpu() -> None:
    decision = at(observed())
    assert decision.actions == (MakePrepare(),)
    assert decision.status.phase == "Preparing"
    assert decision.status.runtime == "h200"
    assert decision.status.attempt is None


def test_a_job_without_a_runtime_waits_and_says_why() -> None:
    decision = at(observed(runtime=None, runtime_name="", blocked=Block("RuntimeMissing", "There is none.")))
    assert decision.actions == ()
    assert (decision.status.phase, decision.status.reason) == ("Pending", "RuntimeMissing")
    assert condition(decision, "Valid").status == "False"


def test_a_spec_that_the_models_refuse_waits_with_the_fields_path() -> None:
    bad = observed()
    bad = replace(bad, job=replace(bad.job, spec=None, problem="spec.workers.count: must be at least 1 (got 0)"))
    decision = at(bad)
    assert decision.actions == ()
    assert condition(decision, "Valid").message.startswith("spec.workers.count")
    assert decision.status.phase == "Pending"


def test_what_prepare_found_out_is_kept_and_the_first_attempt_starts() -> None:
    words = '{"plan": {"totalSteps": 100, "sequences": 1000, "tokens": 400000}}'
    ended = pod(
        None, "other", stage="prepare", phase="Succeeded", ended=NOW - 1, stops=(Stop("prepare", 0, "", words),)
    )
    decision = at(observed(prepare=batch_job(complete=True), pods=[ended]))
    assert decision.status.plan is not None
    assert decision.status.plan.total_steps == 100
    assert condition(decision, "Prepared").status == "True"
    assert decision.actions == (MakeAttempt(1),)
    assert decision.status.attempt == 1, "the number is written before the RayJob is made"


def test_bad_rows_end_the_job_before_a_gpu_is_taken() -> None:
    words = StageReport.model_validate(
        {"failure": {"reason": "UserData", "message": "rows.jsonl:7: messages is missing"}}
    ).model_dump_json(by_alias=True)
    ended = pod(None, "other", stage="prepare", phase="Failed", ended=NOW, stops=(Stop("prepare", 3, "Error", words),))
    decision = at(observed(prepare=batch_job(failed=Block("BackoffLimitExceeded", "")), pods=[ended]))
    assert (decision.status.phase, decision.status.reason) == ("Failed", "UserData")
    assert "rows.jsonl:7" in (decision.status.message or "")
    assert decision.status.attempt is None
    assert not any(isinstance(action, MakeAttempt) for action in decision.actions)


def test_a_prepare_job_that_failed_for_the_storage_is_made_anew_and_counted_once() -> None:
    words = '{"failure": {"reason": "Storage", "message": "the bucket answers 503"}}'
    ended = pod(None, "other", stage="prepare", phase="Failed", ended=NOW, stops=(Stop("prepare", 5, "Error", words),))
    failed = observed(prepare=batch_job(failed=Block("BackoffLimitExceeded", "")), pods=[ended])
    first = at(failed)
    assert first.status.attempts is not None
    assert first.status.attempts.retries == 1
    second = at(again(failed, first), NOW + 1)
    assert second.status.attempts == first.status.attempts
    assert second.actions == (Delete("Job", "support-prepare", "prepare-uid"),)
    third = at(again(failed, second, prepare=None, pods=[]), NOW + 5)
    assert third.actions == (), "the pause is kept"
    fourth = at(again(failed, third, prepare=None, pods=[]), NOW + 11)
    assert fourth.actions == (MakePrepare(),)


def test_training_shows_progress_with_its_age() -> None:
    decision = at(training())
    assert (decision.status.phase, decision.status.reason) == ("Training", "Training")
    progress = decision.status.progress
    assert progress is not None
    assert (progress.step, progress.total_steps, progress.percent) == (40, 100, 40)
    assert progress.updated_time == format_time(NOW - 2), "heard a second ago, and a second old then"
    assert decision.actions == ()
    assert decision.wake is not None
    assert decision.wake <= TIMING.progress


def test_progress_never_goes_backwards_within_an_attempt() -> None:
    before = at(training())
    after = at(again(training(), before, report=report(step=25, loss=2.0), report_time=NOW + 9), NOW + 10)
    assert after.status.progress is not None
    assert after.status.progress.step == 40
    assert after.status.progress.loss == 2.0


def test_the_same_report_again_changes_nothing() -> None:
    first = at(training())
    second = at(again(training(), first), NOW + 3)
    assert second.status == first.status


def test_a_head_that_stays_silent_is_said_to_be() -> None:
    decision = at(training(report_time=NOW - 90))
    assert (decision.status.phase, decision.status.reason) == ("Training", "NoReport")


def test_success_is_recorded_before_anything_is_released() -> None:
    finished = report(state="finished", step=100, result=RESULT.model_dump(by_alias=True))
    first = at(training(report=finished))
    assert (first.status.phase, first.status.result) == ("Complete", RESULT)
    assert condition(first, "Complete").status == "True"
    assert first.status.completion_time == format_time(NOW)
    assert first.actions == (Delete("RayJob", "support-a1", "ray-job-1"),)


def test_a_result_is_read_from_storage_when_the_head_is_gone() -> None:
    ended = ray_job(deployment="Complete", outcome="SUCCEEDED")
    gone = training(attempts={1: ended}, pods=[], report=None)
    first = at(gone)
    assert first.status.phase == "Finishing"
    assert first.actions == (MakeResult(1),)
    words = StageReport(result=RESULT).model_dump_json(by_alias=True, exclude_none=True)
    reader = pod(
        1, "other", stage="result", phase="Succeeded", ended=NOW, gpus=0, stops=(Stop("result", 0, "", words),)
    )
    read = again(gone, first, result=batch_job(name="support-result", uid="r", complete=True), pods=[reader])
    second = at(read, NOW + 5)
    assert (second.status.phase, second.status.result) == ("Complete", RESULT)


def test_a_living_head_is_asked_before_storage_is() -> None:
    ended = ray_job(deployment="Complete", outcome="SUCCEEDED")
    assert at(training(attempts={1: ended}, ended=NOW)).actions == ()
    assert at(training(attempts={1: ended}, ended=NOW), NOW + 30).actions == (MakeResult(1),)


def test_a_failed_attempt_is_recorded_then_released_then_followed_by_the_next() -> None:
    lost: dict[str, Any] = {
        "state": "failed",
        "failure": {"reason": "Network", "message": "rank 3 lost its peers", "rank": 3},
    }
    failing = training(attempts={1: ray_job(deployment="Failed", outcome="FAILED")}, report=report(**lost))
    first = at(failing)
    assert first.status.attempts is not None
    assert (first.status.attempts.ended, first.status.attempts.retries) == (1, 1)
    assert (first.status.phase, first.status.reason) == ("Queued", "Retrying")
    assert first.status.failures[-1].rank == 3
    assert first.actions == (Delete("RayJob", "support-a1", "ray-job-1"),)
    gone = again(failing, first, attempts={}, pods=[], report=None)
    assert at(gone, NOW + 5).actions == ()
    second = at(gone, NOW + 11)
    assert second.status.attempt == 2
    assert second.actions == (MakeAttempt(2),)


def test_the_next_attempt_waits_for_the_last_ones_pods_but_not_for_ever() -> None:
    status = prepared(attempts=Attempts(ended=1, retries=1, next_time=format_time(NOW)))
    leaving = observed(status=status, attempts={1: ray_job(deleting=NOW - 5)}, pods=[pod(deleting=NOW + 100)])
    assert MakeAttempt(2) not in at(leaving, NOW + 20).actions
    assert MakeAttempt(2) in at(leaving, NOW + 50).actions


def test_a_preempted_worker_does_not_use_the_retry_budget() -> None:
    taken = pod(number=1, phase="Failed", ended=NOW, disrupted=Block("PreemptionByScheduler", "a higher priority"))
    failing = training(attempts={1: ray_job(deployment="Failed", outcome="FAILED")}, pods=[taken], report=None)
    decision = at(failing)
    assert decision.status.attempts is not None
    assert (decision.status.attempts.preemptions, decision.status.attempts.retries) == (1, 0)
    assert decision.status.failures[-1].reason == "Preempted"


def test_a_used_up_budget_ends_the_job_and_says_where_the_checkpoint_is() -> None:
    lost: dict[str, Any] = {"state": "failed", "failure": {"reason": "Network", "message": "rank 3 lost its peers"}}
    kept = CheckpointStatus(step=30, uri="s3://work/step-30", time=format_time(NOW - 60))
    failing = training(
        status=prepared(attempts=Attempts(uid="ray-job-1", retries=3), checkpoint=kept),
        attempts={1: ray_job(deployment="Failed", outcome="FAILED")},
        report=report(**lost),
    )
    decision = at(failing)
    assert decision.status.phase == "Failed"
    assert "limits.retries (3) is used up" in (decision.status.message or "")
    assert "s3://work/step-30" in (decision.status.message or "")


def test_a_missed_gate_fails_the_job_and_keeps_its_result() -> None:
    gate: dict[str, Any] = {
        "state": "failed",
        "failure": {"reason": "GateMissed", "message": "evalLossRatio is 1.2; at most 0.95"},
        "result": RESULT.model_dump(by_alias=True),
    }
    failing = training(attempts={1: ray_job(deployment="Failed", outcome="FAILED")}, report=report(**gate))
    decision = at(failing)
    assert (decision.status.phase, decision.status.reason) == ("Failed", "GateMissed")
    assert decision.status.result == RESULT


def test_a_ray_job_that_somebody_deleted_is_never_made_again_under_its_number() -> None:
    decision = at(training(attempts={}, pods=[]))
    assert decision.status.attempts is not None
    assert decision.status.attempts.ended == 1
    later = at(again(training(attempts={}, pods=[], report=None), decision), NOW + 20)
    assert later.actions == (MakeAttempt(2),)


def test_an_attempt_that_the_cluster_refuses_is_tried_again_after_its_pause() -> None:
    refused = {"support-a1": Refused(Block("QuotaExceeded", "No room in the quota."), until=NOW + 5, tries=1)}
    waiting = observed(status=prepared(attempts=Attempts()), refused=refused)
    first = at(waiting)
    assert (first.status.phase, first.status.reason) == ("Pending", "QuotaExceeded")
    assert first.actions == ()
    assert at(waiting, NOW + 6).actions == (MakeAttempt(1),)


def test_a_child_of_something_else_is_left_alone() -> None:
    decision = at(observed(prepare=batch_job(foreign=True)))
    assert decision.actions == ()
    assert decision.status.reason == "NameTaken"


def test_a_pod_without_image_is_shown_at_once_and_given_up_at_the_deadline() -> None:
    pulling = pod(phase="Pending", waiting=Block("ImagePullBackOff", "manifest unknown"), scheduled=None)
    starting = training(attempts={1: ray_job(deployment="Initializing", outcome="")}, pods=[pulling], report=None)
    soon = at(starting)
    assert (soon.status.phase, soon.status.reason) == ("Queued", "ImagePullBackOff")
    late = at(starting, NOW + TIMING.start)
    assert (late.status.phase, late.status.reason) == ("Failed", "Image")
    assert late.actions == (Delete("RayJob", "support-a1", "ray-job-1"),)


def test_a_job_in_kueues_queue_is_queued_with_kueues_words_and_no_deadline() -> None:
    waiting = training(
        attempts={1: ray_job(deployment="Suspended", outcome="", suspended=True)},
        pods=[],
        report=None,
        queued="Waits in Kueue's queue team: insufficient quota for nvidia.com/gpu",
    )
    decision = at(waiting, NOW + 10 * TIMING.start)
    assert (decision.status.phase, decision.status.reason) == ("Queued", "Queued")
    assert "insufficient quota" in (decision.status.message or "")


def test_quota_that_kueue_takes_back_is_a_preemption_and_the_number_never_runs_twice() -> None:
    running = at(training())
    taken = again(training(), running, attempts={1: ray_job(deployment="Suspending", outcome="", suspended=True)})
    decision = at(taken)
    assert decision.status.attempts is not None
    assert (decision.status.attempts.ended, decision.status.attempts.preemptions) == (1, 1)
    assert decision.actions == (Delete("RayJob", "support-a1", "ray-job-1"),)


def test_a_preempted_pod_that_is_gone_already_still_says_why() -> None:
    taken = pod(number=1, disrupted=Block("PreemptionByScheduler", "a higher priority"))
    failing = training(attempts={1: ray_job(deployment="Failed", outcome="FAILED")}, pods=[], gone=[taken], report=None)
    assert at(failing).status.failures[-1].reason == "Preempted"


def test_suspending_frees_the_gpus_and_uses_no_budget() -> None:
    spec = job_spec(suspend=True)
    first = at(training(spec=spec))
    assert first.actions == (Delete("RayJob", "support-a1", "ray-job-1"),)
    assert first.status.reason == "Suspending"
    rest = again(training(spec=spec), first, attempts={}, pods=[], report=None)
    second = at(rest, NOW + 30)
    assert second.status.phase == "Suspended"
    assert second.status.attempts is not None
    assert (second.status.attempts.retries, second.status.attempts.preemptions) == (0, 0)
    assert at(again(rest, second), NOW + 3600).actions == ()
    resumed = again(replace(rest, job=replace(rest.job, spec=job_spec())), second)
    third = at(resumed, NOW + 4000)
    assert third.actions == (MakeAttempt(2),)


@pytest.mark.parametrize("phase", ["new", "preparing", "training", "suspended"])
def test_the_deadline_holds_in_every_phase(phase: str) -> None:
    spec = job_spec(limits={"activeDeadline": "1h"}, suspend=phase == "suspended")
    began = format_time(NOW - 3601)
    there = {
        "new": observed(spec=spec, status=FinetuneJobStatus(start_time=began)),
        "preparing": observed(spec=spec, status=FinetuneJobStatus(start_time=began), prepare=batch_job()),
        "training": training(spec=spec, status=prepared(start_time=began)),
        "suspended": observed(spec=spec, status=prepared(start_time=began, phase="Suspended")),
    }[phase]
    decision = at(there)
    assert (decision.status.phase, decision.status.reason) == ("Failed", "DeadlineExceeded")
    expected: dict[str, tuple[Action, ...]] = {
        "preparing": (Delete("Job", "support-prepare", "prepare-uid"),),
        "training": (Delete("RayJob", "support-a1", "ray-job-1"),),
    }
    assert decision.actions == expected.get(phase, ())


def test_the_runtimes_bounds_hold_for_a_job_without_its_own() -> None:
    bounded = runtime_spec(limits={"maxActiveDeadline": "1h"})
    decision = at(training(runtime=bounded, status=prepared(start_time=format_time(NOW - 3700))))
    assert decision.status.reason == "DeadlineExceeded"


def test_cost_is_counted_from_held_time_and_ends_the_job_at_its_cap() -> None:
    spec = job_spec(limits={"maxCost": 10})
    began = training(spec=spec)
    first = at(began)
    hour = at(again(began, first), NOW + 1000)
    assert hour.status.cost is not None
    assert hour.status.cost.spent == pytest.approx(16 * 2 * 1020 / 3600, abs=0.02), "16 GPUs at 2 an hour"
    over = at(again(began, hour), NOW + 1200)
    capped = at(again(began, over), NOW + 1201)
    assert "CostExceeded" in (over.status.reason, capped.status.reason)
    assert capped.status.phase == "Failed"


def test_cost_and_goodput_alone_are_not_written_with_every_look() -> None:
    first = at(training())
    assert at(again(training(), first), NOW + 5).status == first.status
    assert at(again(training(), first), NOW + 35).status != first.status


def test_a_finished_jobs_stuck_attempt_is_forced_to_go() -> None:
    finished = report(state="finished", step=100, result=RESULT.model_dump(by_alias=True))
    done = at(training(report=finished))
    stuck = again(training(), done, attempts={1: ray_job(deleting=NOW)})
    assert at(stuck, NOW + 60).actions == ()
    (action,) = at(stuck, NOW + TIMING.grace + 31).actions
    assert isinstance(action, ForceDelete)
    assert action.cluster == "support-a1-raycluster"
    assert len(action.pods) == 3


def test_an_ended_job_is_deleted_after_its_time_to_live_and_not_before() -> None:
    spec = job_spec(ttlAfterFinished="1h")
    finished = report(state="finished", step=100, result=RESULT.model_dump(by_alias=True))
    done = at(training(spec=spec, report=finished))
    rest = again(training(spec=spec), done, attempts={}, pods=[])
    waiting = at(rest, NOW + 100)
    assert waiting.actions == ()
    assert waiting.wake is not None
    assert waiting.wake <= 3500
    assert at(rest, NOW + 3600).actions == (DeleteSelf(),)


def test_a_head_that_is_gone_is_a_failure_soon_even_if_kuberay_says_nothing() -> None:
    headless = training(pods=[pod(number=1)], report=None, head_lost=NOW - 10)
    assert at(headless).status.phase != "Failed"
    assert at(headless).status.failures == []
    decision = at(headless, NOW + 15)
    assert len(decision.status.failures) == 1
    assert decision.actions == (Delete("RayJob", "support-a1", "ray-job-1"),)


def test_a_trainer_that_does_not_get_on_counts_as_hanging() -> None:
    decision = at(training(report=report(age=4000)))
    assert decision.status.failures[-1].reason == "Hang"


def test_an_attempt_from_before_is_deleted_wherever_it_comes_from() -> None:
    status = prepared(attempt=2, attempts=Attempts(uid="ray-job-2", ended=1))
    decision = at(training(status=status, attempts={1: ray_job(1), 2: ray_job(2)}, report=report(2)))
    assert decision.actions == (Delete("RayJob", "support-a1", "ray-job-1"),)
