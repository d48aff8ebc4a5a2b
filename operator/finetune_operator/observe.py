"""What is there: a job and its children as small values, made from the API server's JSON.

Times are Unix seconds. Nothing here talks to anyone or knows what should be done.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import ValidationError

from finetune_api.checks import check_document
from finetune_api.documents import MAX_DEPTH, Document, Mark
from finetune_api.job import FinetuneJobSpec
from finetune_api.runtime import FinetuneRuntimeSpec
from finetune_api.stage import ProgressReport, StageReport
from finetune_api.status import FinetuneJobStatus
from finetune_operator.nesting import depth_of

Json = Mapping[str, Any]


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
class RayCluster:
    """The Ray cluster of the stage prepare.

    Attributes:
        begun: since when its pods may be there: it was made, or is not suspended any more.
        ready: all of its pods were ready at once.
        trouble: KubeRay's words on pods that the API server refuses.
    """

    name: str
    uid: str
    begun: float
    deleting: float | None
    foreign: bool
    suspended: bool
    ready: bool
    trouble: str


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
        prepare_cluster: the Ray cluster that prepares, where one pod is not enough.
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
    prepare_cluster: RayCluster | None = None
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


def owned(metadata: Json, owner: str) -> bool:
    """Whether an object is a child of the one with this UID."""
    return any(reference.get("uid") == owner for reference in metadata.get("ownerReferences", []))
