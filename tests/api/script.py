"""What the scripted kubelet lets happen to a job's pods: `kubelet.script(namespace, job, Script(...))`.

A script is data, but for faults: these are done by a coroutine with the attempt in its hands (`tests.api.attempt`).
Seconds are short, so that a whole good life takes a few of them.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from math import inf
from typing import TYPE_CHECKING, Any

from finetune_api.stage import StageFailure, StageReport
from finetune_api.status import FailureReason, Plan, Result

if TYPE_CHECKING:
    from tests.api.attempt import Attempt

Fault = Callable[["Attempt"], Coroutine[Any, Any, None]]
MANIFEST = "5" * 64
PREPARED = StageReport(
    plan=Plan(
        total_steps=6, sequences=96, tokens=196_608, target_tokens=98_304, zero_stage=2, gpu_memory_bytes=9 << 30
    ),
    base_model_sha="a" * 40,
    manifest_sha256=MANIFEST,
)


@dataclass(frozen=True)
class Hold:
    """What keeps pods from starting, for `seconds`.

    Attributes:
        reason: Unschedulable: no node is found. Anything else: why the container waits, such as ImagePullBackOff.
        words: the scheduler's, or the kubelet's.
        role: head or worker: only those pods; empty: the stage's.
    """

    reason: str
    words: str
    role: str = ""
    seconds: float = inf


@dataclass(frozen=True)
class Stage:
    """A pod that runs once: prepare or result.

    Attributes:
        report: its termination message; None: it ends without one.
        reason: of the container's end; empty: Completed or Error.
    """

    report: StageReport | None = None
    exit_code: int = 0
    reason: str = ""
    seconds: float = 0.2
    hold: Hold | None = None


@dataclass(frozen=True)
class Training:
    """An attempt. It goes on from the checkpoint that earlier ones left, and ends well unless a fault ends it.

    Attributes:
        load_seconds: from the driver's start to the first step.
        fault: what happens when step `fault_at` is done.
        stopping_seconds: that pods take to end when they are told to.
        own_node: its pods share no node with others, so that it can be lost.
        mute: nobody hears its progress.
        gates_missed: it ends with GateMissed, its weights kept aside.
    """

    steps: int = 6
    step_seconds: float = 0.2
    checkpoint_every: int = 2
    load_seconds: float = 0.2
    finish_seconds: float = 0.3
    stopping_seconds: float = 0.2
    fault: Fault | None = None
    fault_at: int = 3
    gates_missed: bool = False
    own_node: bool = False
    mute: bool = False
    hold: Hold | None = None


@dataclass(frozen=True)
class Script:
    """A job's life. After the last of `attempts` come more of its kind.

    Attributes:
        prepare: the pod that prepares; later ones do what `prepare_again` says, if it does.
        gathering: what keeps the pods of prepare's Ray cluster from starting.
        result: the pod that reads the result; None: it finds what an attempt has left in storage.
    """

    prepare: Stage = field(default_factory=lambda: Stage(PREPARED))
    prepare_again: Stage | None = None
    gathering: Hold | None = None
    attempts: tuple[Training, ...] = (Training(),)
    result: Stage | None = None

    def attempt(self, number: int) -> Training:
        return self.attempts[min(number, len(self.attempts)) - 1]


def failed(reason: FailureReason, message: str, exit_code: int) -> Stage:
    """A stage that ends with words of its own."""
    return Stage(StageReport(failure=StageFailure(reason=reason, message=message)), exit_code)


def faulty(fault: Fault, **more: object) -> Script:
    """The first attempt meets a fault at step 3, all others are good."""
    return Script(attempts=(Training(fault=fault, **more), Training()))  # type: ignore[arg-type]


@dataclass
class Work:
    """What a job's attempts have left in storage, where each of them began, and how many pods have prepared."""

    checkpoint: int = 0
    result: Result | None = None
    began: list[int] = field(default_factory=list)
    prepared: int = 0
