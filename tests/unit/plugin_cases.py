"""FinetuneJobs in the states that the views of `kubectl finetune` show, as the API server would have them."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Final

from finetune_api.status import FinetuneJobStatus

NOW: Final = datetime(2026, 11, 23, 12, 0, tzinfo=UTC).timestamp()


def ago(seconds: float) -> str:
    """That many seconds before NOW; negative: after it."""
    return datetime.fromtimestamp(NOW - seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def condition(kind: str, status: str = "True", seconds: float = 600, message: str = "") -> dict[str, Any]:
    """A condition that became so `seconds` ago."""
    return {
        "type": kind,
        "status": status,
        "observedGeneration": 1,
        "lastTransitionTime": ago(seconds),
        "reason": kind,
        "message": message,
    }


def job(name: str = "support-chat", **status: Any) -> dict[str, Any]:
    """A job made 3 hours ago with this status, which the model of the contract accepts."""
    FinetuneJobStatus.model_validate(status, by_alias=True, by_name=False)
    return {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FinetuneJob",
        "metadata": {
            "name": name,
            "namespace": "team-a",
            "uid": "5c1e0a4e-0000-4000-8000-000000000001",
            "generation": 1,
            "creationTimestamp": ago(3 * 3600),
        },
        "spec": {
            "model": {"source": "hf://Qwen/Qwen2.5-7B-Instruct@a09a354"},
            "workers": {"count": 2, "gpusEach": 8},
            "limits": {"retries": 3, "preemptions": 20, "maxCost": 150},
            "evaluation": {"gates": [{"metric": "evalLossRatio", "max": 0.9}, {"metric": "promptsPassed", "min": 0.8}]},
        },
        "status": status,
    }


PREEMPTED: Final[dict[str, Any]] = {
    "attempt": 1,
    "reason": "Preempted",
    "message": "Worker pod support-chat-a1-x7k2p-workers-worker-9fj2c on node gpu-7 was taken away by the cluster: "
    "PreemptionByScheduler: preempting to accommodate a higher priority pod. Nothing is wrong with the job.",
    "time": ago(4200),
    "node": "gpu-7",
    "rank": 3,
    "exitCode": 143,
    "retryable": True,
}
PLAN: Final[dict[str, Any]] = {
    "totalSteps": 4000,
    "sequences": 32_000,
    "tokens": 131_072_000,
    "targetTokens": 41_200_000,
    "zeroStage": 2,
    "gpuMemoryBytes": 65_712_345_678,
    "seconds": 15_000,
    "cost": 132.5,
}


def training(**changes: Any) -> dict[str, Any]:
    """In its second attempt, 30 % through, after a preemption."""
    status: dict[str, Any] = {
        "phase": "Training",
        "reason": "Training",
        "message": "Attempt 2 trains.",
        "observedGeneration": 1,
        "conditions": [
            condition("Valid", seconds=10_800, message="Runs on runtime h200."),
            condition("Prepared", seconds=10_000, message="The rows are checked and tokenised."),
            condition("Running", seconds=3900, message="Attempt 2 trains."),
        ],
        "attempt": 2,
        "attempts": {"uid": "u2", "ended": 1, "preemptions": 1},
        "startTime": ago(10_795),
        "runtime": "h200",
        "plan": PLAN,
        "progress": {
            "attempt": 2,
            "step": 1200,
            "totalSteps": 4000,
            "epoch": 0.9,
            "percent": 30,
            "tokens": 39_321_600,
            "tokensPerSecond": 12_473.2,
            "loss": 1.8342,
            "evalLoss": 1.912,
            "etaTime": ago(-9600),
            "updatedTime": ago(8),
        },
        "cost": {"currency": "USD", "spent": 41.2, "projected": 132.5},
        "goodput": {
            "trainingSeconds": 8200,
            "lostSeconds": {"startup": 720, "checkpoint": 240, "preemption": 540, "failure": 0, "finish": 0},
        },
        "failures": [PREEMPTED],
        "checkpoint": {
            "step": 1150,
            "uri": "s3://models/support-chat/.finetune/5c1e0a4e/checkpoints/step-00001150",
            "time": ago(190),
        },
    }
    return job(**(status | changes))


def failed() -> dict[str, Any]:
    """Out of GPU memory, which is not tried again."""
    message = (
        "Rank 5 on node gpu-3: CUDA out of memory. Tried to allocate 2.10 GiB. The plan expected 61.2 GiB on each GPU. "
        "Lower training.microBatch (is 8), lower data.sequenceLength (is 4096), set training.activationCheckpointing, "
        "or set deepspeed.zeroStage to 3."
    )
    failure = {
        "attempt": 2,
        "reason": "OutOfGpuMemory",
        "message": message,
        "time": ago(60),
        "node": "gpu-3",
        "rank": 5,
        "exitCode": 6,
        "retryable": False,
    }
    return training(
        phase="Failed",
        reason="OutOfGpuMemory",
        message=message,
        completionTime=ago(60),
        failures=[PREEMPTED, failure],
        conditions=[
            condition("Valid", seconds=10_800),
            condition("Prepared", seconds=10_000),
            condition("Running", "False", seconds=60, message=message),
            condition("Failed", seconds=60, message=message),
        ],
    )


def complete(*, missed: bool = False) -> dict[str, Any]:
    """Ended well; or, with a missed gate, as failed with its weights kept aside."""
    progress = training()["status"]["progress"] | {"step": 4000, "percent": 100, "epoch": 3.0}
    folder = "s3://models/support-chat"
    return training(
        phase="Failed" if missed else "Complete",
        reason="GateMissed" if missed else "Complete",
        message=f"The weights are in {folder}.",
        completionTime=ago(60),
        progress={key: value for key, value in progress.items() if key != "etaTime"},
        failures=[],
        result={
            "uri": f"{folder}.rejected" if missed else folder,
            "baseModelSha": "a09a35458c702b33eeacc393d103063234e8bc28",
            "manifestSha256": "3b" * 32,
            "evalLossBase": 2.3104,
            "evalLossTuned": 1.8271,
            "gates": [
                {"metric": "evalLossRatio", "value": 0.7908, "passed": True},
                {"metric": "promptsPassed", "value": 0.55 if missed else 0.95, "passed": not missed},
            ],
            "report": f"{folder}/report.html",
            "egress": [
                {"to": "internet", "address": "1.1.1.1:443", "reached": missed},
                {"to": "apiServer", "address": "10.96.0.1:443", "reached": missed},
            ],
        },
        conditions=[
            condition("Valid", seconds=10_800),
            condition("Prepared", seconds=10_000),
            condition("Running", "False", seconds=60),
            condition("Failed" if missed else "Complete", seconds=60),
        ],
    )


def queued() -> dict[str, Any]:
    """Waits for nodes that are not there."""
    message = (
        "Pod support-chat-a1-x7k2p-workers-worker-9fj2c and 1 more find no node: 0/12 nodes are available: 8 "
        "Insufficient nvidia.com/gpu, 4 node(s) had untolerated taint {team: b}. Wait for room, or ask for less: "
        "workers.count, workers.gpusEach, workers.cpusEach."
    )
    return job(
        phase="Queued",
        reason="Unschedulable",
        message=message,
        observedGeneration=1,
        conditions=[
            condition("Valid", seconds=10_800),
            condition("Prepared", seconds=10_000),
            condition("Running", "False", message=message),
        ],
        attempt=1,
        attempts={"ended": 0},
        runtime="h200",
        plan=PLAN,
    )


def invalid() -> dict[str, Any]:
    """A spec that the operator does not accept."""
    message = "spec.workers.min is more than workers.count; lower min or raise count"
    return job(
        phase="Pending",
        reason="InvalidSpec",
        message=message,
        observedGeneration=1,
        conditions=[condition("Valid", "False", message=message)],
    )


def suspended() -> dict[str, Any]:
    """Waits with a checkpoint, and was told to go on a moment ago."""
    manifest = training(
        phase="Suspended",
        reason="Suspended",
        message="Nothing runs. The checkpoint of step 1150 is kept. Set spec.suspend to false to go on.",
        failures=[],
    )
    manifest["metadata"]["generation"] = 2
    return manifest
