"""What is there: a job and its children as small values, made from the API server's JSON.

Times are Unix seconds. Nothing here talks to anyone or knows what should be done.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final, Literal

from pydantic import ValidationError

from finetune_api.checks import check_document
from finetune_api.documents import MAX_DEPTH, Document, Mark
from finetune_api.job import FinetuneJobSpec
from finetune_api.runtime import FinetuneRuntimeSpec
from finetune_api.stage import ProgressReport, StageReport
from finetune_api.status import FinetuneJobStatus
from finetune_operator.children.labels import STAGE_LABEL
from finetune_operator.children.names import attempt_of
from finetune_operator.nesting import depth_of

Json = Mapping[str, Any]

_PODS: Final = re.compile(r'pods "[^"]*"')  # KubeRay tries with a new name each time


@dataclass(frozen=True)
class Block:
    """Why something does not go on: a word for programs and a sentence for people."""

    reason: str
    message: str


@dataclass(frozen=True)
class Refused:
    """A child that the API server did not let us make; it is tried again at `until`."""

    block: Block
    until: float
    tries: int


@dataclass(frozen=True)
class Stop:
    """A container that has ended. `message` is its termination message."""

    container: str
    exit_code: int
    reason: str
    message: str


@dataclass(frozen=True)
class Pod:
    """A pod of a job.

    Attributes:
        scheduled: when it was given a node, and so held what it asked for.
        ended: when its containers had all ended; None: it still holds what it has.
        waiting: why a container cannot start, such as ImagePullBackOff.
        unschedulable: the scheduler's words, while it finds no node.
        disrupted: why the pod is taken away: reason and message of its DisruptionTarget condition.
        gpus: devices that it asks for.
    """

    name: str
    uid: str
    stage: str
    attempt: int | None
    role: Literal["head", "worker", "other"]
    node: str
    ip: str
    phase: str
    created: float
    scheduled: float | None
    ended: float | None
    deleting: float | None
    gpus: int
    reason: str
    message: str
    waiting: Block | None
    unschedulable: str | None
    disrupted: Block | None
    stops: tuple[Stop, ...]

    @property
    def live(self) -> bool:
        return self.ended is None


@dataclass(frozen=True)
class BatchJob:
    """A Kubernetes Job of the stages prepare and result. `foreign`: it belongs to another FinetuneJob."""

    name: str
    uid: str
    created: float
    deleting: float | None
    foreign: bool
    complete: bool
    failed: Block | None

    @property
    def running(self) -> bool:
        return not self.complete and self.failed is None


@dataclass(frozen=True)
class RayJob:
    """One attempt. `deployment` and `outcome` are KubeRay's jobDeploymentStatus and jobStatus."""

    name: str
    uid: str
    attempt: int
    created: float
    deleting: float | None
    foreign: bool
    suspended: bool
    deployment: str
    outcome: str
    reason: str
    message: str
    cluster: str
    cluster_trouble: str


@dataclass(frozen=True)
class Job:
    """A FinetuneJob as it is. `problem` says why there is no `spec`: what is wrong in it, with the fields' paths."""

    name: str
    namespace: str
    uid: str
    generation: int
    resource_version: str
    spec: FinetuneJobSpec | None
    problem: str
    status: FinetuneJobStatus


@dataclass(frozen=True)
class Observed:
    """Everything that `decide` looks at.

    Attributes:
        runtime: spec of the runtime that the job runs on, if it may.
        runtime_name: its name.
        blocked: why no runtime can be used.
        attempts: RayJobs by attempt number.
        report: the newest answer of the current attempt's head; None: there is none yet.
        report_time: when it was had.
        refused: children that the API server did not let us make, by name.
        troubles: the cluster's words on why no pod of the current stage gets on.
        head_lost: since when a running attempt has no head pod.
        ended: since when the current attempt's driver is known to have ended; by our clock, not its node's.
        queued: why Kueue lets the current attempt wait.
        lost_nodes: nodes of the job's pods that are not ready or gone.
        gone: pods of the current attempt as last seen before they were deleted: they may say why it failed.
    """

    job: Job
    runtime: FinetuneRuntimeSpec | None = None
    runtime_name: str = ""
    blocked: Block | None = None
    prepare: BatchJob | None = None
    result: BatchJob | None = None
    attempts: Mapping[int, RayJob] = field(default_factory=dict)
    pods: Sequence[Pod] = ()
    report: ProgressReport | None = None
    report_time: float = 0.0
    refused: Mapping[str, Refused] = field(default_factory=dict)
    troubles: Sequence[Block] = ()
    queued: str = ""
    head_lost: float | None = None
    ended: float | None = None
    lost_nodes: frozenset[str] = frozenset()
    gone: Sequence[Pod] = ()

    def pods_of(self, stage: str, attempt: int | None = None) -> list[Pod]:
        """Pods of a stage, and of one attempt where it is given."""
        return [pod for pod in self.pods if pod.stage == stage and (attempt is None or pod.attempt == attempt)]


def parse_time(text: str | None) -> float | None:
    """Unix seconds of an RFC 3339 time."""
    return None if not text else datetime.fromisoformat(text).timestamp()


def format_time(seconds: float) -> str:
    """RFC 3339 in UTC, to the second."""
    return datetime.fromtimestamp(int(seconds), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def read_job(manifest: Json) -> Job:
    """A FinetuneJob. Fields of its status that only a newer operator knows are left out.

    Raises:
        ValidationError: the status cannot be read; who took it for an empty one would begin the job anew.
    """
    metadata = manifest["metadata"]
    spec, problem = None, ""
    if depth_of(manifest["spec"]) >= MAX_DEPTH:
        problem = f"spec.deepspeed.config: values are nested deeper than {MAX_DEPTH} levels"
    else:
        try:
            spec = FinetuneJobSpec.model_validate(manifest["spec"], by_alias=True, by_name=False)
        except ValidationError:
            problem = _problem(manifest)
    written = manifest.get("status") or {}
    status = FinetuneJobStatus.model_validate(written, extra="ignore", by_alias=True, by_name=False)
    return Job(
        name=metadata["name"],
        namespace=metadata["namespace"],
        uid=metadata["uid"],
        generation=metadata.get("generation", 0),
        resource_version=metadata["resourceVersion"],
        spec=spec,
        problem=problem,
        status=status,
    )


def read_batch_job(manifest: Json, owner: str) -> BatchJob:
    """A Kubernetes Job. `owner` is the FinetuneJob's UID."""
    metadata, conditions = manifest["metadata"], _holding(manifest)
    failed = conditions.get("Failed") or conditions.get("FailureTarget")
    return BatchJob(
        name=metadata["name"],
        uid=metadata["uid"],
        created=_time(metadata["creationTimestamp"]),
        deleting=parse_time(metadata.get("deletionTimestamp")),
        foreign=not owned(metadata, owner),
        complete="Complete" in conditions or "SuccessCriteriaMet" in conditions,
        failed=Block(failed.get("reason", ""), failed.get("message", "")) if failed else None,
    )


def read_ray_job(manifest: Json, owner: str) -> RayJob | None:
    """A RayJob; None when it carries no attempt number, and so is not one of ours."""
    metadata, status = manifest["metadata"], manifest.get("status") or {}
    attempt = attempt_of(metadata.get("labels", {}))
    if attempt is None:
        return None
    cluster = status.get("rayClusterStatus") or {}
    refused = _holding({"status": cluster}).get("ReplicaFailure", {})
    return RayJob(
        name=metadata["name"],
        uid=metadata["uid"],
        attempt=attempt,
        created=_time(metadata["creationTimestamp"]),
        deleting=parse_time(metadata.get("deletionTimestamp")),
        foreign=not owned(metadata, owner),
        suspended=bool(manifest["spec"].get("suspend")),
        deployment=status.get("jobDeploymentStatus", ""),
        outcome=status.get("jobStatus", ""),
        reason=status.get("reason", ""),
        message=status.get("message", ""),
        cluster=status.get("rayClusterName", ""),
        cluster_trouble=_PODS.sub("pods", refused.get("message") or cluster.get("reason", "")),
    )


def read_pod(manifest: Json, accelerator: str) -> Pod:
    """A pod. `accelerator` is the extended resource whose devices are counted, such as nvidia.com/gpu."""
    metadata, spec, status = manifest["metadata"], manifest["spec"], manifest.get("status") or {}
    conditions = {condition["type"]: condition for condition in status.get("conditions", [])}
    containers = [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]
    scheduled, target = conditions.get("PodScheduled", {}), conditions.get("DisruptionTarget", {})
    labels = metadata.get("labels", {})
    role = labels.get("ray.io/node-type")
    return Pod(
        name=metadata["name"],
        uid=metadata["uid"],
        stage=labels.get(STAGE_LABEL, ""),
        attempt=attempt_of(labels),
        role=role if role in ("head", "worker") else "other",
        node=spec.get("nodeName", ""),
        ip=status.get("podIP", ""),
        phase=status.get("phase", "Pending"),
        created=_time(metadata["creationTimestamp"]),
        scheduled=parse_time(scheduled.get("lastTransitionTime")) if _holds(scheduled) else None,
        ended=_ended(status, containers),
        deleting=parse_time(metadata.get("deletionTimestamp")),
        gpus=sum(_devices(container, accelerator) for container in spec["containers"]),
        reason=status.get("reason", ""),
        message=status.get("message", ""),
        waiting=next(filter(None, map(_waiting, containers)), None),
        unschedulable=scheduled.get("message", "") if scheduled.get("status") == "False" else None,
        disrupted=Block(target.get("reason", ""), target.get("message", "")) if _holds(target) else None,
        stops=tuple(filter(None, map(_stop, containers))),
    )


def stage_report(pods: Iterable[Pod]) -> StageReport | None:
    """The newest termination message of these pods that is a report."""
    for pod in sorted(pods, key=lambda pod: pod.created, reverse=True):
        for stop in pod.stops:
            try:
                return StageReport.model_validate_json(stop.message, by_alias=True, by_name=False)
            except ValidationError:
                continue  # the container was killed before it could write one
    return None


def read_report(body: bytes) -> ProgressReport | None:
    """A head's answer to GET /progress; None when it is not one."""
    try:
        return ProgressReport.model_validate_json(body, by_alias=True, by_name=False)
    except ValidationError:
        return None


def _problem(manifest: Json) -> str:
    problems = check_document(Document(Mark(1, 1), value=dict(manifest) | {"status": None})).problems
    sentences = [f"{problem.what}{f'; {problem.hint}' if problem.hint else ''}" for problem in problems]
    more = f" (and {len(sentences) - 3} more)" if len(sentences) > 3 else ""
    return ". ".join(sentences[:3]) + more


def _time(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def owned(metadata: Json, owner: str) -> bool:
    """Whether an object is a child of the one with this UID."""
    return any(reference.get("uid") == owner for reference in metadata.get("ownerReferences", []))


def _holding(manifest: Json) -> dict[str, Json]:
    """Conditions that are True, by type."""
    found = (manifest.get("status") or {}).get("conditions") or []
    return {condition["type"]: condition for condition in found if _holds(condition)}


def _holds(condition: Json) -> bool:
    return condition.get("status") == "True"


def _devices(container: Json, accelerator: str) -> int:
    return int((container.get("resources", {}).get("limits") or {}).get(accelerator, 0))


def _ended(status: Json, containers: Sequence[Json]) -> float | None:
    """When the last container of a pod that is over ended."""
    if status.get("phase") not in ("Succeeded", "Failed"):
        return None
    times = [parse_time(each.get("state", {}).get("terminated", {}).get("finishedAt")) for each in containers]
    return max((time for time in times if time is not None), default=parse_time(status.get("startTime")) or 0.0)


def _waiting(container: Json) -> Block | None:
    waiting = container.get("state", {}).get("waiting") or {}
    reason = waiting.get("reason", "")
    return None if reason in ("", "ContainerCreating", "PodInitializing") else Block(reason, waiting.get("message", ""))


def _stop(container: Json) -> Stop | None:
    ended = container.get("state", {}).get("terminated") or container.get("lastState", {}).get("terminated")
    if not ended:
        return None
    return Stop(container["name"], ended.get("exitCode", -1), ended.get("reason", ""), ended.get("message") or "")
