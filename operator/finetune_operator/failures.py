"""Why an attempt or a stage ended badly: its class, whether another attempt may help, and the sentence the user reads.

The evidence is looked through in the order of `_LOOKS`, and the first cause that is found counts. What the trainer is
sure of comes first. What it only suffers from (a peer that is gone, a collective that hangs) yields to what Kubernetes
says about a pod: out of memory on one pod is a network error on all others. Then come exit codes, then KubeRay's words.

Words of others are quoted only where they cannot hold rows: never the log that Ray puts into a RayJob's message.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

from finetune_api.errors import (
    DataError,
    ExportError,
    GateFailed,
    Interrupted,
    ModelError,
    SpecError,
    StorageError,
)
from finetune_api.job import FinetuneJobSpec
from finetune_api.stage import ProgressReport, StageFailure, StageReport
from finetune_api.status import FailureReason, Plan
from finetune_operator.observe import BatchJob, Block, Pod, RayJob, Stop
from finetune_operator.stuck import stuck, stuck_reason
from finetune_operator.wording import (
    SIGNIFIES,
    capital,
    eviction,
    expected_memory,
    gpu_memory_advice,
    host_memory_advice,
    place,
    quote,
    recognise,
    sentence,
)


@dataclass(frozen=True)
class Policy:
    """What follows from a class: the budget of spec.limits that another attempt is taken from, if one may help."""

    budget: Literal["retries", "preemptions", "none"]
    about: str

    @property
    def retryable(self) -> bool:
        return self.budget != "none"


POLICIES: Final[dict[FailureReason, Policy]] = {
    "Preempted": Policy("preemptions", "The cluster took a pod away: a higher priority, a drain, a reclaimed node."),
    "OutOfGpuMemory": Policy("none", "A GPU's memory was full; it would be again."),
    "OutOfHostMemory": Policy("none", "A pod used more memory than it may; it would again."),
    "OutOfSharedMemory": Policy("none", "/dev/shm was full; it would be again."),
    "UserData": Policy("none", "Rows that cannot be learned from."),
    "UserCode": Policy("none", "The job's model or settings do not work."),
    "Storage": Policy("retries", "The bucket or a disk: not reached, refused, full."),
    "Image": Policy("none", "The image cannot be had, or does not start."),
    "Unschedulable": Policy("retries", "No room was found, or the cluster refused the pods, until the deadline."),
    "Numerics": Policy("none", "The loss or a gradient is not finite; it would be again."),
    "Hang": Policy("retries", "Training stood still: a collective that never ended, a trainer that does not answer."),
    "Node": Policy("retries", "A node was lost, short of memory or disk, or its device is broken."),
    "Network": Policy("retries", "Workers lost each other and no pod says why."),
    "Unknown": Policy("retries", "Nothing above; the logs say more."),
    "DeadlineExceeded": Policy("none", "limits.activeDeadline, or the runtime's, has passed."),
    "CostExceeded": Policy("none", "limits.maxCost, or the runtime's, is reached."),
    "GateMissed": Policy("none", "The run finished and missed an evaluation gate; its weights are kept aside."),
}


@dataclass(frozen=True)
class Evidence:
    """All that is known about an attempt or stage that ended badly.

    Attributes:
        pods: its pods that are still known.
        report: the head's newest answer; it may be of another attempt, or of before the end.
        stage_report: the termination message, where there was one.
        troubles: the cluster's words on its children, from events and refused creations.
        lost_nodes: nodes that are not ready or gone.
        plan: what was expected, to be shown beside what happened.
    """

    stage: Literal["prepare", "train", "result"]
    spec: FinetuneJobSpec
    pods: Sequence[Pod] = ()
    ray_job: RayJob | None = None
    batch_job: BatchJob | None = None
    report: ProgressReport | None = None
    stage_report: StageReport | None = None
    troubles: Sequence[Block] = ()
    lost_nodes: frozenset[str] = frozenset()
    plan: Plan | None = None

    @property
    def own(self) -> list[Pod]:
        """Pods that run a command of ours; exit codes of Ray's mean something else."""
        return [pod for pod in self.pods if pod.role == "other"]


@dataclass(frozen=True)
class Diagnosis:
    """What is recorded in status.failures: `message` has 1 to 1,024 characters, `exit_code` is 0 to 255."""

    reason: FailureReason
    message: str
    node: str | None = None
    rank: int | None = None
    exit_code: int | None = None


def classify(evidence: Evidence) -> Diagnosis:
    """The cause of an attempt or stage that has ended badly."""
    for look in _LOOKS:
        if found := look(evidence):
            break
    else:
        found = Diagnosis("Unknown", f"{_subject(evidence)} ended and nothing says why. {_LOGS}.")
    found = replace(found, message=sentence(found.message), node=found.node or None)
    return found if found.exit_code is None else replace(found, exit_code=min(max(found.exit_code, 0), 255))


_LOGS: Final = "See `kubectl finetune logs`"
_NOT_THE_JOB: Final = "Nothing is wrong with the job"
_MORE_SHM: Final = "Ask the admin for a runtime with more resources.sharedMemory"
_SUBMITTER: Final = "ray-job-submitter"  # KubeRay's container beside the head: exit code 1 whenever the driver fails
_OUT_OF_MEMORY: Final = ("OutOfGpuMemory", "OutOfHostMemory", "OutOfSharedMemory")

# Classes of the trainer that are often only what one rank sees of another's end.
_CONSEQUENCES: Final = ("Preempted", "Hang", "Node", "Network", "Unknown")

# The error tree's exit codes, as `finetune prepare | train | result` end with them.
_EXITS: Final[dict[int, tuple[FailureReason, str]]] = {
    SpecError.exit_code: ("UserCode", "a setting was refused; `finetune validate` checks them"),
    DataError.exit_code: ("UserData", "rows cannot be learned from; the log names file and line"),
    ModelError.exit_code: ("UserCode", "the base model cannot be used; check model.source"),
    StorageError.exit_code: ("Storage", "the storage failed; check bucket, credentials and endpoint"),
    ExportError.exit_code: ("Unknown", "the written weights are not what was trained"),
    GateFailed.exit_code: ("GateMissed", "an evaluation gate was missed; the report says by how much"),
}


def _sure(evidence: Evidence) -> Diagnosis | None:
    """The trainer's word, where it saw the cause itself."""
    words = _told(evidence)
    return _tell(evidence, words) if words and words.reason not in _CONSEQUENCES else None


def _too_late(evidence: Evidence) -> Diagnosis | None:
    """KubeRay or the Job controller ended it at the job's deadline."""
    failed = evidence.batch_job.failed if evidence.batch_job else None
    words = {evidence.ray_job.reason if evidence.ray_job else "", failed.reason if failed else ""}
    if "DeadlineExceeded" not in words:
        return None
    advice = "Raise limits.activeDeadline, as far as the runtime allows, or ask for fewer training.epochs"
    return Diagnosis("DeadlineExceeded", f"{_subject(evidence)} was ended at the job's deadline. {advice}.")


def _out_of_memory(evidence: Evidence) -> Diagnosis | None:
    """The kernel or the kubelet ended a pod that used more memory than it may, or its /dev/shm."""
    advice = host_memory_advice(evidence.spec, evidence.stage)
    for pod, stop in _stops(evidence.pods):
        if stop.reason == "OOMKilled" and not pod.disrupted:
            what = f"{place(pod)} was killed because it used more memory than it may (OOMKilled)"
            return Diagnosis("OutOfHostMemory", f"{what}. {advice}", pod.node, exit_code=stop.exit_code)
        if stop.exit_code == 135:
            what = f"{place(pod)} got a bus error (exit code 135), as happens when /dev/shm is full"
            return Diagnosis("OutOfSharedMemory", f"{what}. {_MORE_SHM}.", pod.node, exit_code=135)
    for pod in _by_end(evidence.pods):
        said = eviction(pod)
        if "larger consumption of memory" in said:
            return Diagnosis("OutOfHostMemory", f"{place(pod)} was evicted: {quote(said)}. {advice}", pod.node)
        if re.search(r'EmptyDir volume "(shared-memory|[^"]*shm)', said):
            return Diagnosis("OutOfSharedMemory", f"{place(pod)} was evicted: {quote(said)}. {_MORE_SHM}.", pod.node)
    return None


def _taken(evidence: Evidence) -> Diagnosis | None:
    """Kubernetes took a pod away, or its node."""
    for pod in _by_end(evidence.pods):
        why, said = pod.disrupted or Block("", ""), eviction(pod)
        if re.search(r"EmptyDir|exceed|larger consumption of ephemeral", said):
            advice = "ask the admin for a runtime with more resources.scratch"
            advice = f"Lower checkpoint.keep, or {advice}" if evidence.stage == "train" else capital(advice)
            what = f"{place(pod)} was evicted because its disk is full: {quote(said)}"
            return Diagnosis("Storage", f"{what}. {advice}.", pod.node)
        if said:
            what = f"{place(pod)} was evicted though it kept to what it asked for: {quote(said)}"
            return Diagnosis("Node", f"{what}. {_NOT_THE_JOB}; tell the admin that the node is too full.", pod.node)
        if why.reason == "DeletionByDeviceTaintManager":
            what = f"{place(pod)} was taken away because its device is marked as broken"
            return Diagnosis("Node", f"{what}. {_NOT_THE_JOB}; tell the admin.", pod.node)
        unheard = pod.reason == "NodeLost" or any(stop.reason == "ContainerStatusUnknown" for stop in pod.stops)
        if pod.node in evidence.lost_nodes or unheard or why.reason == "DeletionByPodGC":
            said = f" ({quote(why.message)})" if why.message else ""
            return Diagnosis("Node", f"{place(pod)} is lost with its node{said}. {_NOT_THE_JOB}.", pod.node)
        if pod.disrupted or pod.reason in ("Preempting", "Terminated"):
            said = quote(why.message or pod.message or pod.reason)
            return Diagnosis("Preempted", f"{place(pod)} was taken away: {said}. {_NOT_THE_JOB}.", pod.node)
    if evidence.lost_nodes:
        node = min(evidence.lost_nodes)
        return Diagnosis("Node", f"Node {node}, on which the job ran, is lost. {_NOT_THE_JOB}.", node)
    return None


def _never_ran(evidence: Evidence) -> Diagnosis | None:
    """The kubelet would not take a pod, or its container could not be started."""
    for pod, stop in _stops(evidence.pods):
        unstarted = stop.reason in ("StartError", "ContainerCannotRun")
        if unstarted or stop.exit_code in (126, 127):
            said = f": {quote(stop.message)}" if unstarted and stop.message else ""
            what = f"{place(pod)} cannot run the image's command (exit code {stop.exit_code}){said}"
            advice = "The admin must correct the runtime's images.trainer; it must be of the operator's version"
            return Diagnosis("Image", f"{what}. {advice}.", pod.node, exit_code=stop.exit_code)
    for pod in _by_end(evidence.pods):
        if re.match(r"OutOf|UnexpectedAdmissionError|NodeAffinity", pod.reason):
            what = f"{place(pod)} was turned away by its node: {quote(pod.message or pod.reason)}"
            return Diagnosis("Node", f"{what}. {_NOT_THE_JOB}; tell the admin if it happens again.", pod.node)
    return None


def _said(evidence: Evidence) -> Diagnosis | None:
    """The trainer's word, where no pod explains it better."""
    if (words := _told(evidence)) is None:
        return None
    known = recognise(words.message) if words.reason == "Unknown" else None
    return _tell(evidence, words.model_copy(update={"reason": known}) if known else words)


def _ended(evidence: Evidence) -> Diagnosis | None:
    """The exit code of the driver, or of the container of a stage on CPUs."""
    code = _driver_exit(evidence)
    if code is not None and evidence.ray_job:
        head = next((pod for pod in evidence.pods if pod.role == "head"), None)
        subject = f"The driver on node {head.node}" if head and head.node else "The driver"
        return _exit(evidence, subject, code, evidence.ray_job.message, head, ours=True)
    ends = [(pod, stop) for pod, stop in _stops(evidence.own) if pod.deleting is None]
    if evidence.stage == "train" or not ends:
        return None
    pod, stop = ends[-1]
    return _exit(evidence, place(pod), stop.exit_code, stop.message, pod, ours=True)


def _kuberay(evidence: Evidence) -> Diagnosis | None:
    """KubeRay's own words."""
    ray_job = evidence.ray_job
    if ray_job is None:
        return None
    if ray_job.reason == "PreRunningDeadlineExceeded":
        silence = f"The Ray cluster was not up by its deadline and nothing says why. {_LOGS}."
        return _stuck(evidence) or Diagnosis("Unschedulable", silence)
    if ray_job.outcome == "STOPPED":
        what = "Ray's job was stopped, though neither user nor operator asked for it"
        return Diagnosis("Unknown", f"{what}. {_LOGS}.")
    running = ray_job.deployment == "Running" and ray_job.outcome not in ("FAILED", "SUCCEEDED")
    headless = not any(pod.role == "head" for pod in evidence.pods)
    if headless and (running or ray_job.message == "Ray head pod not found."):
        return Diagnosis("Unknown", "The head pod is gone, and the cluster does not say why. Did somebody delete it?")
    if known := recognise(ray_job.message):
        return Diagnosis(known, f"{capital(SIGNIFIES[known])}. {_advice(evidence, known)}")
    return None


def _stuck(evidence: Evidence) -> Diagnosis | None:
    """It never got going."""
    refused = evidence.ray_job.cluster_trouble if evidence.ray_job else ""
    troubles = [*evidence.troubles, *([Block("FailedCreate", refused)] if refused else [])]
    block = stuck(evidence.pods, troubles)
    return Diagnosis(stuck_reason(block), block.message) if block else None


def _containers(evidence: Evidence) -> Diagnosis | None:
    """A container ended badly, and that is all that is known of it."""
    stops = (found for found in _stops(evidence.pods) if found[0].deleting is None)
    pod, stop = next(stops, (None, None))
    return _exit(evidence, place(pod), stop.exit_code, stop.message, pod, ours=False) if pod and stop else None


def _closing_words(evidence: Evidence) -> Diagnosis | None:
    """How KubeRay or the Job controller sum it up."""
    ray_job, failed = evidence.ray_job, evidence.batch_job.failed if evidence.batch_job else None
    word = quote(ray_job.reason, 100) if ray_job else ""
    if ray_job and word:
        # KubeRay's own words only: under other reasons the message may hold a log.
        own = ray_job.message if word in ("SubmissionFailed", "ValidationFailed") else ""
        said = f": {quote(own)}" if own else ""
        return Diagnosis("Unknown", f"KubeRay ended the attempt with {word}{said}. {_LOGS}.")
    said = quote(failed.message or failed.reason) if failed else ""
    return Diagnosis("Unknown", f"{_subject(evidence)} failed: {said}. {_LOGS}.") if said else None


_LOOKS: Final[tuple[Callable[[Evidence], Diagnosis | None], ...]] = (
    _sure,
    _too_late,
    _out_of_memory,
    _taken,
    _never_ran,
    _said,
    _ended,
    _kuberay,
    _stuck,
    _containers,
    _closing_words,
)


def _told(evidence: Evidence) -> StageFailure | None:
    """The trainer's own words on this attempt or stage."""
    if evidence.stage_report and evidence.stage_report.failure:
        return evidence.stage_report.failure
    report = evidence.report
    if evidence.stage != "train" or report is None or report.state != "failed":
        return None
    attempt = evidence.ray_job.attempt if evidence.ray_job else report.attempt
    return report.failure if report.attempt == attempt else None


def _tell(evidence: Evidence, words: StageFailure) -> Diagnosis:
    """The trainer's words, with what it cannot know: the plan, and what to do about an error it did not foresee."""
    where = f"Rank {words.rank}" if words.rank is not None else ""
    where += f"{' on node' if where else 'Node'} {words.node}" if words.node else ""
    told = re.sub(r"\s*\n\s*→\s*", "; ", words.message).strip() or POLICIES[words.reason].about  # as errors print
    said = [f"{where}: {told}" if where else capital(told)]
    if not said[0].endswith((".", "!", "?", "…")):
        said[0] += "."
    if words.reason in _OUT_OF_MEMORY and not re.search(r"\b(training|deepspeed|resources)\.", told):
        said.append(_advice(evidence, words.reason))
    elif words.reason == "OutOfGpuMemory":
        said.append(expected_memory(evidence.plan))
    elif words.reason in ("Network", "Unknown"):
        said.append(f"{_LOGS}.")
    stops = [] if evidence.stage == "train" else [stop.exit_code for _, stop in _stops(evidence.own)]
    code = stops[-1] if stops else _driver_exit(evidence)
    return Diagnosis(words.reason, " ".join(said), words.node, words.rank, code)


def _driver_exit(evidence: Evidence) -> int | None:
    """The driver's exit code, as Ray words it; a signal as a shell gives it."""
    message = evidence.ray_job.message if evidence.ray_job else ""
    match = re.match(r"Job entrypoint command failed with exit code (-?\d{1,3})\b", message)
    return None if match is None else _shell_code(int(match[1]))


def _exit(evidence: Evidence, subject: str, code: int, words: str, pod: Pod | None, *, ours: bool) -> Diagnosis:
    """What an exit code says. `ours`: it is one of the error tree. `words` give a class, and are not shown."""
    code, ended = _shell_code(code), f"{subject} ended with exit code {_shell_code(code)}"
    reason: FailureReason = "Unknown"
    about, advice = "", f"{_LOGS}."
    if ours and code in _EXITS:
        reason, about = _EXITS[code]
    elif code in (Interrupted.exit_code, 143):
        about = "it was told to stop, though neither user nor operator asked for it"
    elif code == 137:
        about = "it was killed (SIGKILL), and the cluster does not say by whom; often the node is short of memory"
    elif known := recognise(words):
        reason, about, advice = known, SIGNIFIES[known], _advice(evidence, known)
    message = f"{ended}: {about}. {advice}" if about else f"{ended}. {advice}"
    return Diagnosis(reason, message, pod.node if pod else None, exit_code=code)


def _advice(evidence: Evidence, reason: FailureReason) -> str:
    match reason:
        case "OutOfGpuMemory":
            return f"{expected_memory(evidence.plan)} {gpu_memory_advice(evidence.spec)}".strip()
        case "OutOfHostMemory":
            return host_memory_advice(evidence.spec, evidence.stage)
        case "OutOfSharedMemory":
            return f"{_MORE_SHM}."
        case _:
            return f"{_LOGS}."


def _by_end(pods: Sequence[Pod]) -> list[Pod]:
    """Pods, the first to go first."""
    never = float("inf")
    return sorted(pods, key=lambda pod: (min(pod.deleting or never, pod.ended or never), pod.name))


def _stops(pods: Sequence[Pod]) -> Iterator[tuple[Pod, Stop]]:
    """Containers that ended badly, of the first pod to go first."""
    for pod in _by_end(pods):
        for stop in pod.stops:
            if stop.exit_code != 0 and stop.container != _SUBMITTER:
                yield pod, stop


def _shell_code(code: int) -> int:
    return 128 - code if code < 0 else code


def _subject(evidence: Evidence) -> str:
    return {"prepare": "Preparing the rows", "train": "The attempt", "result": "Reading the result"}[evidence.stage]
