"""Bad ends get the right class, and a sentence that a user can do something with.

The sentences stand in golden/failures.txt. After a change, write it anew with UPDATE_GOLDEN=1 and read the difference.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_api.stage import ProgressReport, StageFailure, StageReport
from finetune_api.status import Condition, Failure, FailureReason, FinetuneJobStatus, Plan
from finetune_operator.failures import POLICIES, Evidence, classify
from finetune_operator.observe import BatchJob, Block, Pod, RayJob, Stop
from finetune_operator.stuck import stuck, stuck_reason
from tests.unit.failure_cases import (
    BATCH_JOB,
    ENDS,
    HALTS,
    HEAD,
    PREPARE,
    RAY_JOB,
    WORKER,
    Case,
    Halt,
    disrupted,
    driver,
    ended,
    spec,
    told,
)

GOLDEN = Path(__file__).with_name("golden") / "failures.txt"
REASONS: tuple[FailureReason, ...] = get_args(FailureReason)
NAMESPACE = "team-a"


def _policy(reason: FailureReason) -> str:
    return f"tried again, limits.{POLICIES[reason].budget}" if POLICIES[reason].retryable else "not tried again"


def _halted(halt: Halt) -> Block:
    block = stuck(halt.pods, halt.troubles, namespace=NAMESPACE)
    assert block is not None
    return block


def _sentences() -> Iterable[str]:
    yield "# Ended badly: what happened → class (what follows)\n"
    for case in ENDS:
        found = classify(case.evidence)
        yield f"{case.story} → {found.reason} ({_policy(found.reason)})\n    {found.message}\n"
    yield "# Does not get on: what happened → word, and the class if it stays so (what follows)\n"
    for halt in HALTS:
        block = _halted(halt)
        reason = stuck_reason(block)
        yield f"{halt.story} → {block.reason}, then {reason} ({_policy(reason)})\n    {block.message}\n"


def test_the_sentences_are_those_of_the_golden_file() -> None:
    text = "\n".join(_sentences())
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(text, encoding="utf-8")
    assert text == GOLDEN.read_text(encoding="utf-8")


@pytest.mark.parametrize("case", ENDS, ids=lambda case: case.story)
def test_a_bad_end_gets_its_class(case: Case) -> None:
    assert classify(case.evidence).reason == case.reason


@pytest.mark.parametrize("halt", HALTS, ids=lambda halt: halt.story)
def test_a_stage_that_does_not_get_on_says_why(halt: Halt) -> None:
    block = _halted(halt)
    assert (block.reason, stuck_reason(block)) == (halt.word, halt.reason)


def test_every_class_has_a_policy_and_a_case() -> None:
    assert set(POLICIES) == set(REASONS)
    # Cost is counted by the operator itself: it ends such a job without asking why it ended.
    assert {case.reason for case in ENDS} == set(REASONS) - {"CostExceeded"}


def test_a_class_that_is_not_tried_again_uses_no_budget() -> None:
    assert all(policy.retryable == (policy.budget != "none") for policy in POLICIES.values())
    assert [reason for reason in REASONS if POLICIES[reason].budget == "preemptions"] == ["Preempted"]


def test_the_pod_that_was_killed_is_named_and_not_the_rank_that_noticed() -> None:
    found = classify(Evidence(
        stage="train", spec=spec(), pods=(HEAD, ended(WORKER, 137, "OOMKilled")), ray_job=driver(6),
        report=told("Network", "connection closed by peer", rank=0, node="gpu-4"),
    ))  # fmt: skip
    assert (found.reason, found.node, found.rank, found.exit_code) == ("OutOfHostMemory", "gpu-7", None, 137)


def test_the_first_pod_to_go_is_the_cause() -> None:
    late = disrupted(HEAD, "EvictionByEvictionAPI", "Eviction API: evicting", deleting=90.0)
    early = disrupted(WORKER, "DeletionByPodGC", "PodGC: node no longer exists", deleting=50.0)
    for pods in ((late, early), (early, late)):
        assert classify(Evidence(stage="train", spec=spec(), pods=pods, ray_job=RAY_JOB)).reason == "Node"


def test_a_report_of_an_earlier_attempt_says_nothing_about_this_one() -> None:
    old = told("Numerics", "the loss of step 3 is not finite", attempt=1)
    ray_job = replace(driver(5), attempt=2)
    assert classify(Evidence(stage="train", spec=spec(), ray_job=ray_job, report=old)).reason == "Storage"


def test_a_report_of_a_run_that_went_well_until_then_is_no_cause() -> None:
    report = ProgressReport(attempt=1, state="training", age=2.0, step=7, total_steps=10)
    found = classify(Evidence(stage="train", spec=spec(), ray_job=driver(6), report=report, pods=(HEAD,)))
    assert found.reason == "Unknown"


def test_the_submitters_exit_code_is_not_the_drivers() -> None:
    stops = (Stop("ray-job-submitter", 3, "Error", ""),)
    found = classify(Evidence(stage="train", spec=spec(), pods=(replace(HEAD, stops=stops),), ray_job=driver(5)))
    assert (found.reason, found.exit_code) == ("Storage", 5)


def test_workers_that_are_killed_on_the_way_out_are_no_cause() -> None:
    leaving = ended(WORKER, 137, deleting=80.0)
    found = classify(Evidence(stage="train", spec=spec(), pods=(HEAD, leaving), ray_job=driver(5)))
    assert found.reason == "Storage"


def test_the_newest_pod_of_a_job_says_why_it_failed() -> None:
    first = ended(PREPARE, 5, ended=10.0)
    last = ended(replace(PREPARE, name="chat-prepare-z"), 3, ended=99.0)
    found = classify(Evidence(stage="prepare", spec=spec(), pods=(last, first), batch_job=BATCH_JOB))
    assert found.reason == "UserData"


@pytest.mark.parametrize("code", [1, 2, 3, 5, 6, 8, 137])
def test_a_drivers_log_is_never_shown(code: int) -> None:
    row = "my password is swordfish"
    for log in (f"ValueError: {row}", f"CUDA out of memory {row}", f"NCCL error {row}"):
        for ray_job in (driver(code, log), replace(RAY_JOB, message=f"Traceback: {log}")):
            assert row not in classify(Evidence(stage="train", spec=spec(), ray_job=ray_job, pods=(HEAD,))).message
    pods = (ended(PREPARE, code, message=row),)
    assert row not in classify(Evidence(stage="prepare", spec=spec(), pods=pods, batch_job=BATCH_JOB)).message


def test_settings_that_the_job_has_already_are_not_advised() -> None:
    best = spec(training={"activationCheckpointing": True}, deepspeed={"zeroStage": 3, "offload": {"optimizer": "cpu"}})
    found = classify(Evidence(
        stage="train", spec=best, ray_job=driver(6), report=told("OutOfGpuMemory", "the GPU's memory is full"),
    ))  # fmt: skip
    assert found.message == "The GPU's memory is full. Lower data.sequenceLength (is 2048)."


def test_a_stage_whose_pods_all_run_is_not_stuck() -> None:
    assert stuck([HEAD, WORKER], []) is None


def test_pods_that_are_over_or_leave_do_not_count_as_stuck() -> None:
    waiting = replace(WORKER, phase="Pending", waiting=Block("ImagePullBackOff", "Back-off pulling image"))
    assert stuck([replace(waiting, deleting=5.0), replace(waiting, ended=5.0)], []) is None


def test_what_is_missing_is_looked_for_in_the_jobs_namespace() -> None:
    missing = Block("FailedMount", 'MountVolume.SetUp failed for volume "storage" : secret "bucket-keys" not found')
    block = stuck([], [missing], namespace="team-a")
    assert block is not None
    assert "Create the secret bucket-keys in namespace team-a" in block.message


# --- any evidence at all ---

_text = st.one_of(
    st.text(max_size=40),
    st.text(max_size=2000),
    st.sampled_from([
        "OOMKilled", "Error", "Evicted", "StartError", "ContainerStatusUnknown", "NodeLost", "Terminated", "STOPPED",
        "FAILED", "Failed", "AppFailed", "DeadlineExceeded", "PreRunningDeadlineExceeded", "SubmissionFailed",
        "PreemptionByScheduler", "TerminationByKubelet", "DeletionByTaintManager", "ImagePullBackOff", "FailedMount",
        "CreateContainerConfigError", "CrashLoopBackOff", "FailedCreate", "Ray head pod not found.", "exceeded quota",
        "Job entrypoint command failed with exit code -9", "Job entrypoint command failed with exit code 999",
        "The node was low on resource: memory. ", 'Usage of EmptyDir volume "scratch" exceeds the limit "1Gi". ',
        'secret "x" not found', "references non-existent secret key: y", "CUDA out of memory", "0/1 nodes",
    ]),
)  # fmt: skip
_name = st.sampled_from(["a", "b", "pod-with-a-name-of-253-characters-" + "x" * 219])
_time = st.one_of(st.none(), st.floats(0, 1e9))
_block = st.builds(Block, _text, _text)
_stop = st.builds(
    Stop, st.sampled_from(["ray-head", "stage", "ray-job-submitter"]), st.integers(-64, 999), _text, _text
)
_pod = st.builds(
    Pod, name=_name, uid=_name, stage=st.just("train"), attempt=st.one_of(st.none(), st.integers(1, 3)),
    role=st.sampled_from(["head", "worker", "other"]), node=st.sampled_from(["", "n1", "n2"]), ip=st.just(""),
    phase=st.sampled_from(["Pending", "Running", "Failed"]), created=st.just(0.0), scheduled=_time, ended=_time,
    deleting=_time, gpus=st.just(1), reason=_text, message=_text, waiting=st.one_of(st.none(), _block),
    unschedulable=st.one_of(st.none(), _text), disrupted=st.one_of(st.none(), _block),
    stops=st.lists(_stop, max_size=2).map(tuple),
)  # fmt: skip
_failure = st.builds(
    StageFailure, reason=st.sampled_from(REASONS), message=st.text(max_size=1024),
    rank=st.one_of(st.none(), st.integers(0, 65_535)),
    node=st.one_of(st.none(), st.from_regex(r"[a-z]{1,253}", fullmatch=True)),
)  # fmt: skip
_ray_job = st.builds(
    RayJob, name=_name, uid=_name, attempt=st.integers(1, 3), created=st.just(0.0), deleting=_time,
    foreign=st.booleans(), suspended=st.booleans(), deployment=_text, outcome=_text, reason=_text, message=_text,
    cluster=_name, cluster_trouble=_text,
)  # fmt: skip
_batch_job = st.builds(
    BatchJob, name=_name, uid=_name, created=st.just(0.0), deleting=_time, foreign=st.booleans(),
    complete=st.booleans(), failed=st.one_of(st.none(), _block),
)  # fmt: skip
_report = st.builds(
    ProgressReport, attempt=st.integers(1, 3), state=st.sampled_from(["training", "failed", "stopped"]),
    age=st.just(1.0), failure=st.one_of(st.none(), _failure),
)  # fmt: skip
_evidence = st.builds(
    Evidence, stage=st.sampled_from(["prepare", "train", "result"]), spec=st.just(spec()),
    pods=st.lists(_pod, max_size=4), ray_job=st.one_of(st.none(), _ray_job),
    batch_job=st.one_of(st.none(), _batch_job), report=st.one_of(st.none(), _report),
    stage_report=st.one_of(st.none(), st.builds(StageReport, failure=st.one_of(st.none(), _failure))),
    troubles=st.lists(_block, max_size=2), lost_nodes=st.frozensets(st.sampled_from(["n1", "n3"])),
    plan=st.one_of(st.none(), st.builds(Plan, gpu_memory_bytes=st.one_of(st.none(), st.integers(0, 2**53)))),
)  # fmt: skip


@settings(max_examples=500, deadline=None)
@given(_evidence)
def test_any_evidence_gives_a_failure_that_the_status_can_hold(evidence: Evidence) -> None:
    found = classify(evidence)
    assert found.message.strip()
    assert not any(ord(character) < 32 for character in found.message)  # one line, and nothing that drives a terminal
    Failure(
        attempt=1, reason=found.reason, message=found.message, node=found.node, rank=found.rank,
        exit_code=found.exit_code, retryable=POLICIES[found.reason].retryable,
    )  # fmt: skip


@settings(max_examples=500, deadline=None)
@given(st.lists(_pod, max_size=4), st.lists(_block, max_size=2))
def test_whatever_keeps_a_stage_is_a_reason_that_the_status_can_hold(pods: list[Pod], troubles: list[Block]) -> None:
    block = stuck(pods, troubles)
    if block is None:
        assert not troubles
        return
    assert block.message
    assert stuck_reason(block) in REASONS
    FinetuneJobStatus(phase="Queued", reason=block.reason, message=block.message)
    time = "2026-11-23T16:00:00Z"
    Condition(type="Running", status="False", last_transition_time=time, reason=block.reason, message=block.message)
