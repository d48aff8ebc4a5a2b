"""Jobs and children for tests of `decide`: what the operator would see, without a cluster."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

from finetune_api.job import FinetuneJobSpec
from finetune_api.runtime import FinetuneRuntimeSpec
from finetune_api.stage import ProgressReport
from finetune_api.status import FinetuneJobStatus, Result
from finetune_operator.actions import Decision
from finetune_operator.decide import decide
from finetune_operator.draft import Timing
from finetune_operator.observe import BatchJob, Job, Observed, Pod, RayCluster, RayJob

NOW: Final = 1_800_000_000.0
TIMING: Final = Timing()
RESULT: Final = Result(uri="s3://models/support")


def job_spec(**fields: Any) -> FinetuneJobSpec:
    """A job's spec; `fields` replace whole parts of it, by their names in YAML."""
    return FinetuneJobSpec.model_validate(
        {
            "model": {"source": "s3://models/base"},
            "data": {"train": [{"uri": "s3://rows/chat.jsonl"}]},
            "output": {"uri": "s3://models/support"},
            "workers": {"count": 2, "gpusEach": 8},
            **fields,
        }
    )


def runtime_spec(**fields: Any) -> FinetuneRuntimeSpec:
    """A runtime whose GPUs cost 2 an hour."""
    return FinetuneRuntimeSpec.model_validate(
        {"images": {"trainer": "example.com/trainer:1"}, "accelerator": {"pricePerHour": 2}, **fields}
    )


def observed(**fields: Any) -> Observed:
    """A new job and nothing else; `spec` and `status` are its, the other fields those of Observed."""
    job = Job(
        name="support",
        namespace="team",
        uid="job-uid",
        generation=1,
        resource_version="7",
        spec=fields.pop("spec", None) or job_spec(),
        problem="",
        status=fields.pop("status", None) or FinetuneJobStatus(),
    )
    return Observed(job=job, **{"runtime": runtime_spec(), "runtime_name": "h200", **fields})


def batch_job(**fields: Any) -> BatchJob:
    """The prepare Job, running."""
    whole: dict[str, Any] = {
        "name": "support-prepare",
        "uid": "prepare-uid",
        "created": NOW - 30,
        "deleting": None,
        "foreign": False,
        "complete": False,
        "failed": None,
    }
    return BatchJob(**(whole | fields))


def ray_cluster(**fields: Any) -> RayCluster:
    """The Ray cluster of the stage prepare, ready."""
    whole: dict[str, Any] = {
        "name": "support-prepare-ray",
        "uid": "cluster-uid",
        "begun": NOW - 30,
        "deleting": None,
        "foreign": False,
        "suspended": False,
        "ready": True,
        "trouble": "",
    }
    return RayCluster(**(whole | fields))


def ray_job(attempt: int = 1, **fields: Any) -> RayJob:
    """The RayJob of an attempt, running."""
    whole: dict[str, Any] = {
        "name": f"support-a{attempt}",
        "uid": f"ray-job-{attempt}",
        "attempt": attempt,
        "created": NOW - 30,
        "deleting": None,
        "foreign": False,
        "suspended": False,
        "deployment": "Running",
        "outcome": "RUNNING",
        "reason": "",
        "message": "",
        "cluster": f"support-a{attempt}-raycluster",
        "cluster_trouble": "",
    }
    return RayJob(**(whole | fields))


def pod(attempt: int | None = 1, role: str = "worker", number: int = 0, **fields: Any) -> Pod:
    """A training pod with eight GPUs, running."""
    whole: dict[str, Any] = {
        "name": f"support-a{attempt}-{role}-{number}",
        "uid": f"pod-{attempt}-{role}-{number}",
        "stage": "train",
        "attempt": attempt,
        "role": role,
        "node": f"node-{number}",
        "ip": "10.0.0.1",
        "phase": "Running",
        "created": NOW - 30,
        "scheduled": NOW - 20,
        "ended": None,
        "deleting": None,
        "gpus": 8 if role == "worker" else 0,
        "reason": "",
        "message": "",
        "waiting": None,
        "unschedulable": None,
        "disrupted": None,
        "stops": (),
    }
    return Pod(**(whole | fields))


def report(attempt: int = 1, **fields: Any) -> ProgressReport:
    """What a training head says; `fields` by their names in JSON."""
    return ProgressReport.model_validate(
        {"attempt": attempt, "state": "training", "age": 1, "step": 40, "totalSteps": 100, **fields}
    )


def prepared(**fields: Any) -> FinetuneJobStatus:
    """The status of a job whose rows are prepared, with attempt 1 started unless `fields` say otherwise."""
    first = decide(observed(prepare=batch_job(complete=True)), NOW - 40, TIMING).status
    assert first.attempts is not None
    begun = first.attempts.model_copy(update={"uid": "ray-job-1"})
    return first.model_copy(update={"attempts": begun, **fields})


def training(**fields: Any) -> Observed:
    """A job whose first attempt trains."""
    return observed(
        **{
            "status": prepared(),
            "attempts": {1: ray_job()},
            "pods": [pod(role="head"), pod(number=1), pod(number=2)],
            "report": report(),
            "report_time": NOW - 1,
            **fields,
        }
    )


def again(before: Observed, decision: Decision, **fields: Any) -> Observed:
    """What is observed after a decision was carried out and the rest has become `fields`."""
    return replace(before, job=replace(before.job, status=decision.status), **fields)
