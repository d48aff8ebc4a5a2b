"""The stage prepare: a Job, and for many rows a Ray cluster before it, which goes when the Job has ended.

How many workers there are is the spec's word, else that of the first pod, which has looked at the rows: with more than
it can do alone it ends at once and asks for so many.
"""

from __future__ import annotations

from typing import Final

from finetune_api.base import format_duration
from finetune_api.errors import TooManyRows
from finetune_api.job import FinetuneJobSpec
from finetune_api.stage import StageReport
from finetune_api.status import Plan
from finetune_operator.actions import Delete, MakePrepare, MakePrepareCluster
from finetune_operator.children.names import prepare_cluster_name, prepare_name
from finetune_operator.draft import Draft
from finetune_operator.endings import fail, last_failure
from finetune_operator.failures import Diagnosis, Evidence, classify
from finetune_operator.observe import BatchJob, Block, Pod, RayCluster, stage_report
from finetune_operator.starts import QUEUED_SECONDS, start, starting
from finetune_operator.stuck import PREPARE_SETTINGS, stuck

LEAVING_SECONDS: Final = 45.0  # that a new cluster waits for pods beyond their grace: those of a dead node stay


def prepared(draft: Draft) -> bool:
    """Whether the rows are prepared; what the stage found out is kept."""
    if draft.holds("Prepared"):
        return True
    job = draft.observed.prepare
    if job is None or job.foreign or not job.complete:
        return False
    report = stage_report(draft.observed.pods_of("prepare"))
    if report and report.plan:
        draft.set(plan=report.plan)
    draft.condition("Prepared", "True", "Prepared", _prepared_sentence(report.plan if report else None))
    return True


def prepare(draft: Draft, spec: FinetuneJobSpec) -> None:
    """Does what is next until the rows are prepared."""
    job, workers = draft.observed.prepare, spec.data.prepare.workers or draft.book.prepare_workers
    many = workers is not None and workers > 1
    if job is not None and not job.foreign:
        _follow(draft, spec, job, workers)
    elif job is not None or not many or _is_gathered(draft, workers or 1):
        start(draft, prepare_name(draft.observed.job.name), MakePrepare(workers), job)


def _follow(draft: Draft, spec: FinetuneJobSpec, job: BatchJob, workers: int | None) -> None:
    """Says where the Job is, or ends it."""
    pods, cluster = draft.observed.pods_of("prepare"), draft.observed.prepare_cluster
    own = [pod for pod in pods if pod.role == "other"]
    if job.uid == draft.book.counted_uid:
        draft.say("Preparing", "Retrying", last_failure(draft) or _asked_sentence(workers))
        if job.deleting is None:
            draft.act(Delete("Job", job.name, job.uid))
    elif job.deleting is not None:
        draft.say("Preparing", "Restarting", "The prepare Job was deleted; another one follows.")
    elif job.failed and _asks(job.failed):
        draft.note(counted_uid=job.uid, prepare_workers=_asked(draft, stage_report(own)))
        draft.say("Preparing", "Restarting", _asked_sentence(draft.book.prepare_workers))
        draft.act(Delete("Job", job.name, job.uid))
    elif job.failed:
        evidence = Evidence(
            stage="prepare",
            pods=pods,
            batch_job=job,
            stage_report=stage_report(own),
            troubles=draft.observed.troubles,
            lost_nodes=draft.observed.lost_nodes,
            spec=spec,
        )
        draft.condition("Prepared", "False", "Failed")
        draft.note(counted_uid=job.uid)
        fail(draft, 0, classify(evidence))
    elif workers and workers > 1 and cluster is None:  # somebody deleted it; the Job's next pod waits for its token
        start(draft, prepare_cluster_name(draft.observed.job.name), MakePrepareCluster(workers), None)
    elif cluster and cluster.suspended and not cluster.foreign:
        draft.note(counted_uid=job.uid)
        fail(draft, 0, Diagnosis("Preempted", "Kueue took the job's quota back while it prepared the rows."))
    elif any(pod.phase in ("Running", "Succeeded") for pod in own):  # the Job says a moment later that it is complete
        subject = f"With {workers} workers, checks" if workers and workers > 1 else "Checks"
        words = Block("Preparing", f"{subject} the rows and turns them into token sequences.")
        missing = stuck([pod for pod in pods if pod.role != "other"], [], settings=PREPARE_SETTINGS)
        draft.say("Preparing", (missing or words).reason, (missing or words).message, running=True)
    else:
        _start_up(draft, job.uid, job.created, own)


def _is_gathered(draft: Draft, workers: int) -> bool:
    """Whether the Ray cluster is there; makes it, says what it waits for, or gives it up."""
    cluster, name = draft.observed.prepare_cluster, prepare_cluster_name(draft.observed.job.name)
    pods = [pod for pod in draft.observed.pods_of("prepare") if pod.role != "other"]
    if cluster is None and any(pod.live and draft.now - (pod.deleting or draft.now) < LEAVING_SECONDS for pod in pods):
        # KubeRay knows pods by their cluster's name: it would take them for those of the next one.
        draft.say("Preparing", "Restarting", "Waits for the pods of the last try to end.")
        draft.wake(draft.timing.progress)
    elif cluster is None or cluster.foreign:
        start(draft, name, MakePrepareCluster(workers), cluster)
    elif cluster.uid == draft.book.counted_uid or cluster.deleting is not None:
        draft.say("Preparing", "Retrying", last_failure(draft))
    elif cluster.suspended:
        draft.say("Preparing", "Queued", draft.observed.queued or "Kueue lets it wait for quota.")
        draft.wake(QUEUED_SECONDS)
    elif not cluster.ready:
        _gather(draft, cluster, pods)
    else:
        return True
    return False


def _gather(draft: Draft, cluster: RayCluster, pods: list[Pod]) -> None:
    trouble = [Block("ClusterNotReady", cluster.trouble)] if cluster.trouble else []
    up = pods and all(pod.phase == "Running" for pod in pods)
    if up and draft.now - cluster.begun >= draft.timing.start:
        message = f"Its pods run, but Ray was not ready within {format_duration(draft.timing.start)}."
        draft.note(counted_uid=cluster.uid)
        fail(draft, 0, Diagnosis("Unknown", message))
    else:
        _start_up(draft, cluster.uid, cluster.begun, pods, trouble)  # KubeRay makes pods that fail again and again


def _start_up(draft: Draft, uid: str, since: float, pods: list[Pod], trouble: list[Block] | None = None) -> None:
    """Says what the child with this UID waits for; when it has waited too long, that is counted once."""
    failures = draft.status.failures
    starting(draft, "Preparing", 0, since, pods, trouble or [])
    if draft.status.failures != failures:
        draft.note(counted_uid=uid)


def _asks(failed: Block) -> bool:
    """Whether the Job's pod has ended to ask for workers, in the words of the Job controller."""
    return f"exit code {TooManyRows.exit_code} " in failed.message


def _asked(draft: Draft, report: StageReport | None) -> int | None:
    """How many workers; None when the pod that said so is gone already, and another one has to look."""
    if report is None or report.workers is None:
        return None
    runtime = draft.observed.runtime
    most = runtime.limits.max_workers if runtime else None
    return report.workers if most is None else min(report.workers, most)


def _asked_sentence(workers: int | None) -> str:
    who = f"{workers} workers do it" if workers else "another one looks how many it takes"
    return f"The rows are more than one pod prepares; {who}."


def _prepared_sentence(plan: Plan | None) -> str:
    if plan is None or plan.sequences is None:
        return "The rows are checked and tokenised."
    tokens = f" with {plan.tokens:,} tokens" if plan.tokens is not None else ""
    return f"The rows are checked and tokenised: {plan.sequences:,} sequences{tokens}."
