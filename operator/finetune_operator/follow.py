"""The live attempt: what KubeRay, its pods and its head say, as phase, reason and end."""

from __future__ import annotations

from typing import Final

from finetune_api.base import format_duration
from finetune_api.job import FinetuneJobSpec
from finetune_operator.actions import MakeResult
from finetune_operator.children.names import result_name
from finetune_operator.draft import Draft
from finetune_operator.endings import complete, end_failed, fail
from finetune_operator.failures import Diagnosis, Evidence, classify
from finetune_operator.observe import Block, RayJob, stage_report
from finetune_operator.progress import merge
from finetune_operator.starts import QUEUED_SECONDS, starting

HEAD_LOST_SECONDS: Final = 20.0  # KubeRay's own verdict is better, where it comes
# Often all that a driver sees of another pod's end, which its kubelet may report a moment after KubeRay reports ours.
_CONSEQUENCES: Final = ("Network", "Unknown")
SETTLE_SECONDS: Final = 5.0
RESULT_SECONDS: Final = 20.0  # that a living head is asked for its result, before storage is
SILENT_SECONDS: Final = 60.0  # without an answer of the head, until the status says so


def hear(draft: Draft) -> None:
    """Takes the head's report into the status."""
    if draft.report:
        progress, checkpoint = merge(draft.status, draft.report, draft.observed.report_time)
        draft.set(progress=progress, checkpoint=checkpoint)


def follow(draft: Draft, spec: FinetuneJobSpec, ray_job: RayJob) -> None:
    """Says where the live attempt is, or ends it."""
    report, pods = draft.report, draft.observed.pods_of("train", ray_job.attempt)
    if report and report.state == "finished" and report.result:
        complete(draft, report.result)
    elif ray_job.outcome == "SUCCEEDED":
        _finish(draft, spec, ray_job)
    elif _has_failed(draft, ray_job):
        if report and report.result:  # a missed gate keeps the weights aside
            draft.set(result=report.result)
        diagnosis, since = classify(_evidence(draft, spec, ray_job)), draft.observed.ended
        if diagnosis.reason in _CONSEQUENCES and since is not None and 0 <= draft.now - since < SETTLE_SECONDS:
            draft.wake(1.0)
        else:
            fail(draft, ray_job.attempt, diagnosis)
    elif report and report.age > draft.timing.hang:
        message = f"The trainer has not got on for {format_duration(report.age)}; it was at step {report.step}."
        fail(draft, ray_job.attempt, Diagnosis("Hang", message))
    elif (ray_job.suspended or ray_job.deployment == "Suspended") and draft.old.phase in ("Training", "Finishing"):
        # Resumed, it would run again under the same number, unfenced.
        fail(draft, ray_job.attempt, Diagnosis("Preempted", "Kueue took the job's quota back while it ran."))
    elif ray_job.suspended or ray_job.deployment == "Suspended":
        draft.say("Queued", "Queued", draft.observed.queued or "Kueue lets it wait for quota.")
        draft.wake(QUEUED_SECONDS)  # Kueue's words are not watched
    elif ray_job.deployment == "Running" and report and report.state != "starting":
        _running(draft, finishing=report.state != "training")
    else:
        since = min((pod.created for pod in pods), default=ray_job.created)
        refused = ray_job.cluster_trouble if ray_job.deployment != "Running" else ""  # else of a pod lost since
        trouble = [Block("ClusterNotReady", refused)] if refused else []
        starting(draft, "Queued", ray_job.attempt, since, pods, trouble)


def _has_failed(draft: Draft, ray_job: RayJob) -> bool:
    lost = draft.observed.head_lost
    return (
        ray_job.outcome in ("FAILED", "STOPPED")
        or ray_job.deployment in ("Failed", "ValidationFailed")
        or (lost is not None and draft.now - lost > HEAD_LOST_SECONDS)
    )


def _evidence(draft: Draft, spec: FinetuneJobSpec, ray_job: RayJob) -> Evidence:
    observed = draft.observed
    return Evidence(
        stage="train",
        pods=[*observed.pods_of("train", ray_job.attempt), *observed.gone],
        ray_job=ray_job,
        report=draft.report,
        troubles=observed.troubles,
        lost_nodes=observed.lost_nodes,
        plan=draft.status.plan,
        spec=spec,
    )


def _running(draft: Draft, *, finishing: bool) -> None:
    draft.wake(draft.timing.progress)
    silent = draft.now - draft.observed.report_time
    if finishing:
        draft.say("Finishing", "Finishing", "Exports the weights and compares base and tuned model.", running=True)
    elif silent > SILENT_SECONDS:
        draft.say("Training", "NoReport", "The head pod does not answer; progress is as of its time.", running=True)
    else:
        draft.say("Training", "Training", f"Attempt {draft.attempt} trains.", running=True)


def _finish(draft: Draft, spec: FinetuneJobSpec, ray_job: RayJob) -> None:
    """The driver has ended well, and its head has not said what came out: it is asked, then storage is."""
    observed, job = draft.observed, draft.observed.result
    name = result_name(observed.job.name)
    heads = [pod for pod in observed.pods_of("train", ray_job.attempt) if pod.role == "head" and pod.live]
    waited = 0.0 if observed.ended is None else draft.now - observed.ended
    draft.say("Finishing", "Finishing", "Training has ended; its result is read.", running=True)
    if job is None and heads and waited < RESULT_SECONDS:
        draft.wake(2.0)
    elif job is None:
        _read_from_storage(draft, name, ray_job.attempt)
    elif job.complete and (report := stage_report(observed.pods_of("result"))) and report.result:
        complete(draft, report.result)
    elif job.complete or job.failed:
        evidence = Evidence(
            stage="result",
            pods=observed.pods_of("result"),
            batch_job=job,
            stage_report=stage_report(observed.pods_of("result")),
            troubles=observed.troubles,
            lost_nodes=observed.lost_nodes,
            spec=spec,
        )
        diagnosis = classify(evidence)
        message = f"Training ended well, but its result could not be read from {spec.output.uri}: {diagnosis.message}"
        end_failed(draft, Diagnosis(diagnosis.reason, message))


def _read_from_storage(draft: Draft, name: str, attempt: int) -> None:
    if refused := draft.observed.refused.get(name):
        draft.say("Finishing", refused.block.reason, refused.block.message)
        draft.try_again(refused, MakeResult(attempt))
    else:
        draft.act(MakeResult(attempt))
