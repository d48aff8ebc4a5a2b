"""The trainer's report as the job's progress: never backwards within an attempt, and always with its age."""

from __future__ import annotations

from typing import Final

from finetune_api.stage import ProgressReport
from finetune_api.status import CheckpointStatus, FinetuneJobStatus, Progress
from finetune_operator.observe import format_time, parse_time

_SAME_SECONDS: Final = 2.0  # ages are measured anew with every answer: less is no news


def merge(
    status: FinetuneJobStatus, report: ProgressReport, heard: float
) -> tuple[Progress | None, CheckpointStatus | None]:
    """Progress and checkpoint of a status after a report of its current attempt.

    Args:
        heard: when the report was had; its ages count from there, so clocks of nodes do not matter.
    """
    return _progress(status.progress, report, heard), _checkpoint(status.checkpoint, report, heard)


def _progress(before: Progress | None, report: ProgressReport, heard: float) -> Progress | None:
    if not report.total_steps:
        return before  # nothing known yet: the last attempt's figures stay
    updated = heard - report.age
    step, tokens, epoch = report.step, report.tokens, report.epoch
    if before and before.attempt == report.attempt:
        if step < before.step:  # workers were replaced: shown again when they are past it
            step, tokens, epoch = before.step, before.tokens, before.epoch
        last = parse_time(before.updated_time) or 0.0
        if step == before.step and updated - last < _SAME_SECONDS and report.eval_loss == before.eval_loss:
            return before
        updated = max(updated, last)
    return Progress(
        attempt=report.attempt,
        step=step,
        total_steps=report.total_steps,
        epoch=epoch,
        percent=min(100, 100 * step // report.total_steps),
        tokens=tokens,
        tokens_per_second=_rounded(report.tokens_per_second, 1),
        loss=_rounded(report.loss, 4),
        eval_loss=_rounded(report.eval_loss, 4),
        eta_time=None if report.eta is None else format_time(heard + report.eta),
        updated_time=format_time(updated),
    )


def _checkpoint(before: CheckpointStatus | None, report: ProgressReport, heard: float) -> CheckpointStatus | None:
    newest = report.checkpoint
    if newest is None or (before and (newest.step, newest.uri) == (before.step, before.uri)):
        return before
    if before and newest.step < before.step:
        return before
    return CheckpointStatus(step=newest.step, uri=newest.uri, time=format_time(heard - newest.age))


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)
