"""Jobs that end as they should, in spite of what happens to them: one row, one story, each of them a real job."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from finetune_api.status import FailureReason
from tests.api.attempt import Attempt
from tests.api.script import Fault, Hold, Script, Training, failed, faulty

LOST_PEER: Final = "collective allreduce failed: Connection closed by peer [10.0.0.9]:41234."
NO_GPUS: Final = (
    "0/4 nodes are available: 4 Insufficient nvidia.com/gpu. preemption: 0/4 nodes are available: "
    "4 No preemption victims found for incoming pod."
)
NO_IMAGE: Final = (
    'Back-off pulling image "registry.example.com/trainer:1": ErrImagePull: rpc error: code = NotFound desc = failed '
    'to pull and unpack image "registry.example.com/trainer:1": registry.example.com/trainer:1: not found'
)
ENDLESS: Final = 100_000


def tells(reason: FailureReason, message: str, exit_code: int = 6, rank: int | None = None) -> Fault:
    """The trainer ends, and knows why."""

    async def fault(attempt: Attempt) -> None:
        attempt.fail(reason, message, exit_code, rank=rank)

    return fault


def worker_ends(exit_code: int, reason: str) -> Fault:
    """A worker's container is killed, of which the trainer sees a lost peer only."""

    async def fault(attempt: Attempt) -> None:
        await attempt.pod("worker").ends(exit_code, reason)
        attempt.fail("Network", LOST_PEER, rank=0)

    return fault


async def preempted(attempt: Attempt) -> None:
    """A pod with a higher priority takes a worker's place; the trainer saves and sees the worker go."""
    words = "default-scheduler: preempting to accommodate a higher priority pod"
    attempt.save()
    await attempt.pod("worker").is_taken("PreemptionByScheduler", words)
    await asyncio.sleep(0.5)
    attempt.fail("Network", LOST_PEER, rank=0)


async def node_lost(attempt: Attempt) -> None:
    """A worker's node is not heard of any more."""
    await attempt.pod("worker").loses_node()
    await asyncio.sleep(0.5)
    attempt.fail("Network", LOST_PEER, rank=0)


async def segmentation_fault(attempt: Attempt) -> None:
    """The driver dies without a word."""
    attempt.fail(None, "Fatal Python error: Segmentation fault", -11)


async def hangs(attempt: Attempt) -> None:
    """No step is done any more."""
    await attempt.stand_still()


async def head_vanishes(attempt: Attempt) -> None:
    """The head's pod is removed, and the driver with it."""
    await attempt.pod("head").vanishes()


@dataclass(frozen=True)
class Life:
    """A job, what happens to it, and how it must end.

    Attributes:
        failures: reasons in status.failures at the end.
        later: how its spec is changed when it has a checkpoint.
        hasty: it belongs to the operator with a short deadline for starts.
    """

    story: str
    name: str
    script: Script
    phase: str
    reason: str
    failures: Sequence[str] = ()
    fields: Mapping[str, Any] = field(default_factory=dict)
    later: Mapping[str, Any] = field(default_factory=dict)
    hasty: bool = False


def _again(name: str, story: str, reason: str, fault: Fault, **more: Any) -> Life:
    """Fails once in a way that is worth another attempt, which ends well."""
    return Life(story, name, faulty(fault, **more), "Complete", "Complete", [reason])


def _final(name: str, story: str, reason: str, script: Script, hasty: bool = False, **fields: Any) -> Life:
    return Life(story, name, script, "Failed", reason, [reason], fields, hasty=hasty)


def _limited(name: str, story: str, reason: str, **limits: Any) -> Life:
    """A job that would go on for ever gets a limit that it has reached already."""
    script = Script(attempts=(Training(steps=ENDLESS),))
    return Life(story, name, script, "Failed", reason, [reason], later={"limits": limits})


_NOTICE: Final = 2.0  # a worker that is taken away drains first
_GATES: Final[Mapping[str, Any]] = {
    "data__evaluationFraction": 0.1,
    "evaluation__gates": [{"metric": "evalLoss", "max": 1}],
}

LIVES: Final[Sequence[Life]] = (
    _again("preempted", "a worker is preempted, and all its driver sees is a lost peer", "Preempted", preempted,
           stopping_seconds=_NOTICE),
    _final("gpu-oom", "a rank runs out of GPU memory", "OutOfGpuMemory",
           faulty(tells("OutOfGpuMemory", "the GPU's memory is full in step 3, at 138.9 GiB", rank=1))),
    _final("host-oom", "the kernel kills a worker that uses more memory than it may", "OutOfHostMemory",
           faulty(worker_ends(137, "OOMKilled"))),
    _final("shm", "a worker gets a bus error", "OutOfSharedMemory", faulty(worker_ends(135, "Error"))),
    _final("bad-row", "prepare finds a bad row", "UserData", Script(prepare=failed(
        "UserData", "s3://rows/train.jsonl:17: field messages: is not a list; write it as a list", 3))),
    _final("bad-model", "prepare finds a model that cannot chat", "UserCode", Script(prepare=failed(
        "UserCode", "hf://org/name@main has no chat template; choose an instruct model", 4))),
    Life("the bucket refuses checkpoints until the budget is used up", "storage", Script(attempts=(Training(
        fault=tells("Storage", "s3://models/storage: AWS Error ACCESS_DENIED; check that the credentials may write", 5),
    ),)), "Failed", "Storage", ["Storage", "Storage"], {"limits__retries": 1}),
    _final("image", "the image is not there by the deadline", "Image", Script(attempts=(Training(
        hold=Hold("ImagePullBackOff", NO_IMAGE)),)), hasty=True),
    _final("no-room", "no node has the GPUs by the deadline", "Unschedulable", Script(attempts=(Training(
        hold=Hold("Unschedulable", NO_GPUS, "worker")),)), hasty=True, limits__retries=0),
    _final("numerics", "the loss is not finite", "Numerics",
           faulty(tells("Numerics", "the loss of step 3 is not finite; lower training.learningRate or raise warmup"))),
    _again("hang", "a rank hangs in a collective that never ends", "Hang", hangs),
    _again("node", "a worker's node is lost", "Node", node_lost, own_node=True),
    _again("network", "workers lose each other and every pod is well", "Network", tells("Network", LOST_PEER)),
    _again("segfault", "the driver dies without a word", "Unknown", segmentation_fault),
    _limited("late", "the job's deadline passes", "DeadlineExceeded", activeDeadline="2s"),
    _limited("dear", "the job reaches its cost limit", "CostExceeded", maxCost=0.01),
    _final("gate", "an evaluation gate is missed", "GateMissed",
           Script(attempts=(Training(gates_missed=True),)), **_GATES),
    Life("all goes well", "good", Script(), "Complete", "Complete"),
    _again("headless", "the head's pod is removed", "Unknown", head_vanishes),
    Life("the head does not say what came out, so a Job reads it from storage", "mute",
         Script(attempts=(Training(mute=True),)), "Complete", "Complete"),
    Life("a preempted job that may not retry", "preempted-only", faulty(preempted, stopping_seconds=_NOTICE),
         "Complete", "Complete", ["Preempted"], {"limits__retries": 0, "limits__preemptions": 1}),
)  # fmt: skip
