"""What the system does: from what is there and the time to a new status and the actions that follow from it.

Pure: no clock, no client, no randomness. Read from `decide` downwards:

    ended            stays ended; whatever still holds a node is released; deleted after its TTL
    unreadable       waits, with the fields' paths, until it is changed
    over a limit     deadline or cost: released, Failed
    suspended        released; goes on as a new attempt
    not prepared     the prepare Job, for many rows after the Ray cluster that it works with
    prepared         one RayJob after the other, until one succeeds or a budget is used up
    succeeded        the result is read and recorded, and only then the attempt is released

What has happened is written to the status before anything is done about it. So a new attempt can only follow one whose
end is recorded, and who decides on an old status fails to write it and does nothing.
"""

from __future__ import annotations

from typing import Final

from finetune_api.base import format_duration, parse_duration
from finetune_api.job import FinetuneJobSpec
from finetune_operator.actions import Decision, DeleteSelf, MakeAttempt
from finetune_operator.children.names import ray_job_name
from finetune_operator.draft import Draft, Timing
from finetune_operator.endings import end_failed, fail, kept, last_failure
from finetune_operator.failures import Diagnosis
from finetune_operator.follow import follow, hear
from finetune_operator.observe import Observed, format_time, parse_time
from finetune_operator.preparing import prepare, prepared
from finetune_operator.release import release
from finetune_operator.runtimes import active_deadline, max_cost
from finetune_operator.starts import start
from finetune_operator.wording import sentence

BLOCKED_SECONDS: Final = 30.0  # until a runtime that refused is asked again: labels of namespaces are not watched
LEAVING_SECONDS: Final = 45.0  # that a new attempt waits for the pods of the last one to go


def decide(observed: Observed, now: float, timing: Timing) -> Decision:
    """The decision for one job.

    Args:
        observed: the job, its children, and what the head of its attempt says.
        now: Unix seconds, by the API server's clock.
        timing: intervals and bounds, from the operator's settings.
    """
    draft = Draft(observed, now, timing)
    spec = observed.job.spec
    if draft.terminal:
        _rest(draft)
    elif spec is None:
        draft.condition("Valid", "False", "InvalidSpec", sentence(observed.job.problem))
        draft.set(phase=draft.status.phase or "Pending", reason="InvalidSpec", message=sentence(observed.job.problem))
    else:
        _valid(draft)
        if _over_limit(draft, spec):
            pass
        elif spec.suspend:
            _suspend(draft)
        elif not prepared(draft):
            prepare(draft, spec)
        else:
            _train(draft, spec)
    release(draft)
    return draft.decision()


def _rest(draft: Draft) -> None:
    """An ended job: only its time to live goes on."""
    spec, ended = draft.observed.job.spec, parse_time(draft.status.completion_time)
    if spec and spec.ttl_after_finished and ended is not None:
        left = ended + parse_duration(spec.ttl_after_finished) - draft.now
        if left <= 0:
            draft.act(DeleteSelf())
        else:
            draft.wake(left)


def _valid(draft: Draft) -> None:
    block = draft.observed.blocked
    if block:
        draft.condition("Valid", "False", block.reason, sentence(block.message))
        draft.wake(BLOCKED_SECONDS)
    else:
        draft.condition("Valid", "True", "Valid", f"Runs on runtime {draft.status.runtime}.")


def _over_limit(draft: Draft, spec: FinetuneJobSpec) -> bool:
    runtime, started = draft.observed.runtime, parse_time(draft.status.start_time)
    deadline, cost = active_deadline(spec, runtime), max_cost(spec, runtime)
    assert started is not None
    if deadline is not None:
        left = started + deadline - draft.now
        if left <= 0:
            message = f"The job has had its activeDeadline of {format_duration(deadline)}. {kept(draft)}".strip()
            end_failed(draft, Diagnosis("DeadlineExceeded", message))
            return True
        draft.wake(left)
    spent = draft.status.cost.spent if draft.status.cost else 0.0
    if cost is not None and spent >= cost:
        message = f"The job has cost {spent:.2f} and may cost {cost:.2f} (limits.maxCost). {kept(draft)}".strip()
        end_failed(draft, Diagnosis("CostExceeded", message))
        return True
    return False


def _suspend(draft: Draft) -> None:
    """Ends the live attempt, without counting it, and waits until nothing holds a node."""
    if draft.live:
        draft.note(ended=draft.attempt, next_time=format_time(draft.now))
    observed = draft.observed
    held = any(not each.foreign for each in observed.attempts.values()) or any(pod.live for pod in observed.pods)
    if held:
        draft.say(draft.status.phase or "Pending", "Suspending", "Waits for the last checkpoint and for pods to end.")
        draft.wake(draft.timing.progress)
    else:
        draft.say("Suspended", "Suspended", f"Nothing runs. {kept(draft)} Set spec.suspend to false to go on.")


def _train(draft: Draft, spec: FinetuneJobSpec) -> None:
    number = draft.live
    if number is None:
        _next_attempt(draft)
        return
    ray_job = draft.observed.attempts.get(number)
    if ray_job is None or ray_job.foreign:
        if draft.book.uid is None:
            start(draft, ray_job_name(draft.observed.job.name, number), MakeAttempt(number), ray_job)
        else:
            fail(draft, number, Diagnosis("Unknown", f"RayJob of attempt {number} was deleted by somebody else."))
        return
    if draft.book.uid is None:
        draft.note(uid=ray_job.uid)
    if ray_job.uid != draft.book.uid or ray_job.deleting is not None:
        fail(draft, number, Diagnosis("Unknown", f"RayJob {ray_job.name} was deleted by somebody else."))
        return
    hear(draft)
    follow(draft, spec, ray_job)


def _next_attempt(draft: Draft) -> None:
    """Starts the next attempt when its time has come and the pods of the last one are gone."""
    number, due = draft.attempt + 1, parse_time(draft.book.next_time) or 0.0
    if draft.observed.blocked:
        draft.say("Pending", draft.observed.blocked.reason, draft.observed.blocked.message)
        return
    leaving = any(not each.foreign for each in draft.observed.attempts.values()) or any(
        pod.live for pod in draft.observed.pods_of("train")
    )
    until = due + LEAVING_SECONDS if leaving else due
    if draft.now < until:
        draft.say("Queued", "Retrying", f"Attempt {number} starts at {format_time(due)}. {last_failure(draft)}".strip())
        draft.wake(until - draft.now)
        return
    draft.set(attempt=number)
    draft.note(uid=None)
    start(draft, ray_job_name(draft.observed.job.name, number), MakeAttempt(number), None)
