"""Giving nodes back: what may not run (any more) is deleted, and what does not go is made to, within bounded time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from finetune_operator.actions import Delete, ForceDelete
from finetune_operator.draft import Draft, Timing
from finetune_operator.observe import BatchJob, Pod, RayJob

SLACK_SECONDS: Final = 30.0  # beyond the pods' grace, until KubeRay or a dead node is not waited for any more


def release(draft: Draft) -> None:
    """Releases every attempt but the live one, and the Jobs of stages that are not wanted."""
    observed = draft.observed
    for ray_job in observed.attempts.values():
        if ray_job.foreign or ray_job.attempt == draft.live:
            continue
        if ray_job.deleting is None:
            draft.act(Delete("RayJob", ray_job.name, ray_job.uid))
    cluster = observed.prepare_cluster
    if cluster and not cluster.foreign and cluster.deleting is None and not _prepares(draft):
        draft.act(Delete("RayCluster", cluster.name, cluster.uid))
    spec = observed.job.spec
    if draft.terminal or (spec and spec.suspend):
        for job in (observed.prepare, observed.result):
            if job and unwanted(job):
                draft.act(Delete("Job", job.name, job.uid))
    actions, wake = overdue(observed.attempts.values(), observed.pods, draft.now, draft.timing)
    draft.actions += actions
    if wake is not None:
        draft.wake(wake)


def _prepares(draft: Draft) -> bool:
    """Whether the Ray cluster of the stage prepare has something to do, or soon will."""
    spec, job, cluster = draft.observed.job.spec, draft.observed.prepare, draft.observed.prepare_cluster
    if draft.terminal or draft.holds("Prepared") or (spec is not None and spec.suspend):
        return False
    counted = [each for each in (job, cluster) if each and each.uid == draft.book.counted_uid]
    return not counted and (job is None or job.running)


def unwanted(job: BatchJob) -> bool:
    """Whether a Job that is not needed would still start pods; ended ones stay, for their logs."""
    return job.running and job.deleting is None and not job.foreign


def overdue(
    attempts: Iterable[RayJob], pods: Sequence[Pod], now: float, timing: Timing
) -> tuple[list[ForceDelete], float | None]:
    """What to do about attempts that were deleted and are still there, and in how many seconds to look again.

    KubeRay's finalizer keeps a RayJob until its cluster is gone; without KubeRay, or with a node that does not answer,
    that would be for ever.
    """
    actions: list[ForceDelete] = []
    wake: float | None = None
    for ray_job in attempts:
        if ray_job.deleting is None:
            continue
        left = ray_job.deleting + timing.grace + SLACK_SECONDS - now
        if left > 0:
            wake = left if wake is None else min(wake, left)
            continue
        names = tuple(pod.name for pod in pods if pod.stage == "train" and pod.attempt == ray_job.attempt)
        actions.append(ForceDelete(ray_job.name, ray_job.uid, ray_job.cluster, names))
        wake = SLACK_SECONDS
    return actions, wake
