"""Making a child, and what it waits for until its pods run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from finetune_api.base import format_duration
from finetune_api.status import Phase
from finetune_operator.actions import Action, MakePrepare, MakePrepareCluster
from finetune_operator.draft import Draft
from finetune_operator.endings import fail, last_failure
from finetune_operator.failures import Diagnosis
from finetune_operator.observe import BatchJob, Block, Pod, RayCluster, RayJob, format_time, parse_time
from finetune_operator.stuck import PREPARE_SETTINGS, TRAIN_SETTINGS, stuck, stuck_reason

QUEUED_SECONDS: Final = 20.0  # between two looks at why Kueue lets a job wait


def start(draft: Draft, name: str, action: Action, there: BatchJob | RayCluster | RayJob | None) -> None:
    """Makes a child, unless something is in the way."""
    block, due = draft.observed.blocked, parse_time(draft.book.next_time) or 0.0
    refused = draft.observed.refused.get(name)
    phase: Phase = "Preparing" if isinstance(action, MakePrepare | MakePrepareCluster) else "Queued"
    if block:
        draft.say("Pending", block.reason, block.message)
    elif there is not None:  # foreign
        draft.say("Pending", "NameTaken", f"{name} is there already and belongs to something else; delete it.")
        draft.wake(draft.timing.progress)
    elif draft.now < due:
        draft.say(phase, "Retrying", f"The next try is at {format_time(due)}. {last_failure(draft)}".strip())
        draft.wake(due - draft.now)
    elif refused:
        draft.say("Pending", refused.block.reason, refused.block.message)
        draft.try_again(refused, action)
    else:
        draft.say(phase, "Starting", f"Starts {name}.")
        draft.act(action)


def starting(
    draft: Draft, phase: Phase, attempt: int, since: float, pods: Sequence[Pod], trouble: Sequence[Block] = ()
) -> None:
    """A stage whose pods do not all run: says why, and gives up at the deadline instead of holding nodes.

    Args:
        attempt: 0 for prepare.
        since: from when the deadline counts, Unix seconds.
        trouble: what is known beside the pods and `draft.observed.troubles`.
    """
    draft.wake(draft.timing.progress)
    settings, namespace = TRAIN_SETTINGS if attempt else PREPARE_SETTINGS, draft.observed.job.namespace
    block = stuck(pods, [*draft.observed.troubles, *trouble], namespace=namespace, settings=settings)
    if pods and all(pod.phase == "Running" for pod in pods) and not trouble:
        draft.say(phase, "Starting", "Its pods run; waits for Ray and the model.")
        return
    if draft.now - since >= draft.timing.start:
        words = block.message if block else "its pods did not get to run."
        reason = stuck_reason(block) if block else "Unknown"
        message = f"Nothing ran within {format_duration(draft.timing.start)}, and its nodes were given back: {words}"
        fail(draft, attempt, Diagnosis(reason, message))
        return
    draft.wake(since + draft.timing.start - draft.now)
    if block:
        draft.say(phase, block.reason, block.message)
    else:
        draft.say(phase, "Starting", "Waits for nodes and images.")
