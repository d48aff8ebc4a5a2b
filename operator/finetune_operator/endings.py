"""How an attempt or a job ends: failures are recorded, budgets are charged, the next try is planned."""

from __future__ import annotations

from typing import Final

from finetune_api.job import Limits
from finetune_api.status import Failure, Phase, Result
from finetune_operator.accounting import Cause, lose
from finetune_operator.draft import Draft
from finetune_operator.failures import POLICIES, Diagnosis
from finetune_operator.observe import format_time
from finetune_operator.wording import sentence

PREEMPTION_BACKOFF: Final = 5.0
RETRY_BACKOFF: Final = 10.0
RETRY_BACKOFF_LIMIT: Final = 300.0
FAILURES_KEPT: Final = 10  # what the status has room for


def fail(draft: Draft, attempt: int, diagnosis: Diagnosis) -> None:
    """Records the failure of an attempt (0: of prepare); another one follows if it may help and a budget allows it."""
    policy, limits = POLICIES[diagnosis.reason], _limits(draft)
    _record(draft, attempt, diagnosis, retryable=policy.retryable)
    if attempt:
        draft.note(ended=attempt)
        cause: Cause = "preemption" if diagnosis.reason == "Preempted" else "failure"
        draft.set(goodput=lose(draft.status.goodput, draft.report, cause))
    used, limit = (
        (draft.book.preemptions, limits.preemptions)
        if policy.budget == "preemptions"
        else (draft.book.retries, limits.retries)
    )
    if not policy.retryable:
        draft.end("Failed", diagnosis.reason, diagnosis.message)
    elif used >= limit:
        budget = f"limits.{policy.budget} ({limit}) is used up"
        draft.end("Failed", diagnosis.reason, f"{diagnosis.message} {budget}. {kept(draft)}".strip())
    else:
        pause = PREEMPTION_BACKOFF if policy.budget == "preemptions" else _backoff(used)
        draft.note(**{policy.budget: used + 1, "next_time": format_time(draft.now + pause)})
        phase: Phase = "Queued" if attempt else "Preparing"
        draft.say(
            phase, "Retrying", f"{diagnosis.message} It is tried again (limits.{policy.budget}: {used + 1} of {limit})."
        )
        draft.wake(pause)


def end_failed(draft: Draft, diagnosis: Diagnosis) -> None:
    """Ends the job whatever its budgets are."""
    _record(draft, draft.attempt, diagnosis, retryable=False)
    draft.end("Failed", diagnosis.reason, diagnosis.message)


def complete(draft: Draft, result: Result) -> None:
    """The good end."""
    if progress := draft.status.progress:
        done = {"step": progress.total_steps, "percent": 100, "eta_time": None}
        draft.set(progress=progress.model_copy(update=done))
    draft.set(result=result)
    draft.end("Complete", "Complete", f"The weights are in {result.uri}.")


def kept(draft: Draft) -> str:
    """What a stopped job leaves behind."""
    checkpoint = draft.status.checkpoint
    return f"The checkpoint of step {checkpoint.step} is kept in {checkpoint.uri}." if checkpoint else ""


def last_failure(draft: Draft) -> str:
    """Why something is tried again."""
    return draft.status.failures[-1].message if draft.status.failures else ""


def _record(draft: Draft, attempt: int, diagnosis: Diagnosis, *, retryable: bool) -> None:
    failure = Failure(
        attempt=attempt,
        reason=diagnosis.reason,
        message=sentence(diagnosis.message),
        time=format_time(draft.now),
        node=diagnosis.node,
        rank=diagnosis.rank,
        exit_code=diagnosis.exit_code,
        retryable=retryable,
    )
    draft.set(failures=[*draft.status.failures, failure][-FAILURES_KEPT:])


def _backoff(used: int) -> float:
    return min(RETRY_BACKOFF * 2.0 ** min(used, 10), RETRY_BACKOFF_LIMIT)


def _limits(draft: Draft) -> Limits:
    spec = draft.observed.job.spec
    assert spec is not None, "a job without a readable spec is not acted upon"
    return spec.limits
