"""How a stage ended, as the operator reads it: the termination message of its container."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from finetune_api import result as run_result
from finetune_api.errors import (
    DataError,
    FinetuneError,
    GateFailed,
    GpuMemoryFull,
    Hang,
    HostMemoryFull,
    ModelError,
    NotFinite,
    Preempted,
    SharedMemoryFull,
    SpecError,
    StorageError,
)
from finetune_api.stage import TERMINATION_MESSAGE_BYTES, StageFailure, StageReport
from finetune_api.status import FailureReason, GateResult, Plan, Result
from finetune_trainer.origin import Origin

# The first that fits; the rest is Unknown, which the operator reads further.
_REASONS: Final[tuple[tuple[type[FinetuneError], FailureReason], ...]] = (
    (SpecError, "UserCode"),
    (DataError, "UserData"),
    (ModelError, "UserCode"),
    (StorageError, "Storage"),
    (GpuMemoryFull, "OutOfGpuMemory"),
    (HostMemoryFull, "OutOfHostMemory"),
    (SharedMemoryFull, "OutOfSharedMemory"),
    (NotFinite, "Numerics"),
    (Preempted, "Preempted"),
    (Hang, "Hang"),
    (GateFailed, "GateMissed"),
)
_SENTENCE: Final = 1024
_SHORT: Final = 256


@dataclass
class Ending:
    """What a stage that ends well has to say."""

    facts: dict[str, Any] = field(default_factory=dict)


@contextlib.contextmanager
def reported(file: Path) -> Iterator[Ending]:
    """Writes the stage's report to `file` however the block ends; errors pass on."""
    ending = Ending()
    try:
        yield ending
    except BaseException as error:
        _write(file, StageReport(failure=failure_of(error), **ending.facts))
        raise
    _write(file, StageReport(**ending.facts))


def failure_of(error: BaseException) -> StageFailure:
    """An error's class and words. Of an error that nobody foresaw only its kind, since its text may hold a row."""
    if not isinstance(error, FinetuneError):
        return StageFailure(reason="Unknown", message=f"unexpected {type(error).__name__}")
    reason: FailureReason = next((reason for kind, reason in _REASONS if isinstance(error, kind)), "Unknown")
    return StageFailure(
        reason=reason, message=_cut(str(error), _SENTENCE), rank=error.rank if isinstance(error, Hang) else None
    )


def as_message(report: StageReport) -> bytes:
    """The report as JSON that the kubelet does not cut: what is long is shortened first, then left out."""
    for shorten in _SHORTER:
        report = shorten(report)
        content = report.model_dump_json(by_alias=True, exclude_none=True).encode()
        if len(content) <= TERMINATION_MESSAGE_BYTES:
            return content
    raise AssertionError("a report without text is short")


def _message_of(length: int) -> Callable[[StageReport], StageReport]:
    def shorten(report: StageReport) -> StageReport:
        failure = report.failure
        if failure is None:
            return report
        return report.model_copy(
            update={"failure": failure.model_copy(update={"message": _cut(failure.message, length)})}
        )

    return shorten


def _gates_of(count: int) -> Callable[[StageReport], StageReport]:
    def shorten(report: StageReport) -> StageReport:
        result = report.result
        if result is None:
            return report
        return report.model_copy(update={"result": result.model_copy(update={"gates": result.gates[:count]})})

    return shorten


_SHORTER: Final[Sequence[Callable[[StageReport], StageReport]]] = (
    lambda report: report,
    _message_of(_SHORT),
    _gates_of(4),
    _gates_of(0),
    lambda report: StageReport(failure=report.failure),
)


def status_result(result: run_result.Result, origin: Origin | None, manifest_sha256: str | None) -> Result:
    """What the operator keeps of a run's result."""
    evaluation, output = result.evaluation, result.output.rstrip("/")
    return Result(
        uri=output,
        base_model_sha=origin.commit if origin else None,
        manifest_sha256=manifest_sha256,
        eval_loss_base=_finite(evaluation.loss_base) if evaluation else None,
        eval_loss_tuned=_finite(evaluation.loss_tuned) if evaluation else None,
        gates=[
            GateResult(metric=_cut(gate.metric, _SHORT), value=_finite(gate.value), passed=gate.passed)
            for gate in result.gates
        ],
        report=f"{output}/report/report.html",
        egress=result.egress,
    )


def status_plan(plan: dict[str, Any]) -> Plan:
    """The operator's part of prepared/plan.json."""
    names = {info.alias or name for name, info in Plan.model_fields.items()}
    return Plan.model_validate({name: value for name, value in plan.items() if name in names})


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) and abs(value) <= 1e12 else None


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _write(file: Path, report: StageReport) -> None:
    with contextlib.suppress(OSError):  # outside of a cluster there is nobody to read it
        file.write_bytes(as_message(report))
