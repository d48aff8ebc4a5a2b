"""Gathers what `decide` looks at: the stores, the head of a running attempt, and why something is stuck.

Everything beyond the stores is asked for only when it matters, and not more often than every few seconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from finetune_api.runtime import Accelerator, FinetuneRuntimeSpec
from finetune_api.stage import ProgressReport
from finetune_operator.children.names import prepare_cluster_name, prepare_name, result_name
from finetune_operator.client import EVENTS, NAMESPACES, NODES, WORKLOADS, ApiError, Client, Object
from finetune_operator.controller import Stores
from finetune_operator.head import Heads
from finetune_operator.observe import (
    BatchJob,
    Block,
    Job,
    Observed,
    Pod,
    RayCluster,
    RayJob,
    Refused,
    parse_time,
)
from finetune_operator.observe_children import read_batch_job, read_pod, read_ray_cluster, read_ray_job
from finetune_operator.runtimes import Choice, choose
from finetune_operator.store import Key

# Between the first two questions about why something is stuck, and then ever longer: the API server searches all events
# of the namespace for each answer, and a thousand jobs may wait for their images at the same time.
LOOK_SECONDS: Final = 15.0
LOOK_LIMIT: Final = 60.0
PATIENCE_SECONDS: Final = 3.0  # that a new child may take before anyone asks
FINAL_SECONDS: Final = 2.0  # between two questions to a head whose driver has ended
NAMESPACE_SECONDS: Final = 30.0  # that a namespace's labels are believed
_JOB_UID_LABEL: Final = "kueue.x-k8s.io/job-uid"
_NODES_LOOKED_AT: Final = 16


@dataclass
class Memory:
    """What is known about a job beyond the API server's objects; lost with the process, and found again."""

    report: ProgressReport | None = None
    heard: float = 0.0
    asked: float = 0.0
    ended: float | None = None  # since when the live attempt's driver is known to have ended
    looked: float = 0.0
    pause: float = LOOK_SECONDS
    about: str = ""  # UID of what `troubles` and `queued` are about
    head_lost: float | None = None
    troubles: tuple[Block, ...] = ()
    queued: str = ""
    refused: dict[str, Refused] = field(default_factory=dict)
    attempt: int = 0
    pods: dict[str, Pod] = field(default_factory=dict)

    def is_due(self, about: str, now: float) -> bool:
        """Whether it is time to ask why the child with this UID does not get on; it then counts as asked."""
        if about != self.about:
            self.about, self.pause = about, LOOK_SECONDS
        elif 0 <= now - self.looked < self.pause:
            return False
        else:
            self.pause = min(self.pause * 2, LOOK_LIMIT)
        self.looked = now
        return True


class Observer:
    """Makes an `Observed` of a job."""

    def __init__(self, client: Client, stores: Stores, heads: Heads, progress_interval: float) -> None:
        self._client, self._stores, self._heads = client, stores, heads
        self._interval = progress_interval
        self._namespaces: dict[str, tuple[float, dict[str, str]]] = {}
        self._runtimes: dict[str, tuple[str, FinetuneRuntimeSpec]] = {}

    async def look(self, job: Job, memory: Memory, now: float) -> Observed:
        """Everything there is to know about a job now.

        Raises:
            ApiError: the API server does not answer.
        """
        key = (job.namespace, job.name)
        choice = await self._choice(job, now)
        pods = self.pods(key, choice.spec)
        jobs = {each["metadata"]["name"]: read_batch_job(each, job.uid) for each in self._stores.kube_jobs.of_job(key)}
        prepare, result = jobs.get(prepare_name(job.name)), jobs.get(result_name(job.name))
        cluster = self._prepare_cluster(job)
        attempts = self.attempts(key, job.uid)
        lost: frozenset[str] = frozenset()
        there = {pod.uid for pod in pods}
        live = attempts.get(job.status.attempt or 0) if job.status.completion_time is None else None
        if live:
            _remember(live.attempt, pods, memory)
            await self._hear(live, pods, memory, now)
            if live.deployment == "Failed" or memory.head_lost is not None:
                lost = await self._lost_nodes(pods)
        if job.status.completion_time is None:
            running = [each for each in (prepare, result) if each and each.running]
            suspended = next((each for each in (live, cluster) if each and each.suspended), None)
            await self._ask_why(job, live, suspended, running, pods, memory, now)
        return Observed(
            job=job,
            runtime=choice.spec,
            runtime_name=choice.name,
            blocked=choice.blocked,
            prepare=prepare,
            prepare_cluster=cluster,
            result=result,
            attempts=attempts,
            pods=pods,
            report=memory.report,
            report_time=memory.heard,
            refused=dict(memory.refused),
            troubles=memory.troubles,
            queued=memory.queued,
            head_lost=memory.head_lost,
            ended=memory.ended if live else None,
            lost_nodes=lost,
            gone=[pod for uid, pod in memory.pods.items() if uid not in there],
        )

    def pods(self, key: Key, runtime: FinetuneRuntimeSpec | None) -> list[Pod]:
        """The job's pods."""
        accelerator = (runtime.accelerator if runtime else Accelerator()).resource_name
        return [read_pod(pod, accelerator) for pod in self._stores.pods.of_job(key)]

    def attempts(self, key: Key, uid: str) -> dict[int, RayJob]:
        """The job's RayJobs by attempt."""
        found = (read_ray_job(each, uid) for each in self._stores.ray_jobs.of_job(key))
        return {each.attempt: each for each in found if each}

    def _prepare_cluster(self, job: Job) -> RayCluster | None:
        name = prepare_cluster_name(job.name)
        found = self._stores.ray_clusters.of_job((job.namespace, job.name))
        return next((read_ray_cluster(each, job.uid) for each in found if each["metadata"]["name"] == name), None)

    async def _choice(self, job: Job, now: float) -> Choice:
        if job.spec is None:
            return Choice()
        runtimes = self._all_runtimes()
        restricted = any(
            each.namespaces.match_labels or each.namespaces.match_expressions for each in runtimes.values()
        )
        labels = await self._labels(job.namespace, now) if restricted else {}
        return choose(job.spec, job.namespace, labels, runtimes)

    def _all_runtimes(self) -> dict[str, FinetuneRuntimeSpec]:
        """Every runtime; each version of one is read once."""
        found: dict[str, tuple[str, FinetuneRuntimeSpec]] = {}
        for key in self._stores.runtimes.keys():  # noqa: SIM118 - a store is no mapping
            manifest = self._stores.runtimes.get(key)
            if manifest is None:
                continue
            name, version = manifest["metadata"]["name"], manifest["metadata"]["resourceVersion"]
            known = self._runtimes.get(name)
            if known is None or known[0] != version:
                known = version, FinetuneRuntimeSpec.model_validate(manifest["spec"], by_alias=True, by_name=False)
            found[name] = known
        self._runtimes = found
        return {name: spec for name, (_, spec) in found.items()}

    async def _labels(self, namespace: str, now: float) -> Mapping[str, str]:
        known = self._namespaces.get(namespace)
        if known is None or not 0 <= now - known[0] < NAMESPACE_SECONDS:
            found = await self._client.get(NAMESPACES, None, namespace)
            known = now, found["metadata"].get("labels") or {}
            self._namespaces[namespace] = known
        return known[1]

    async def _hear(self, live: RayJob, pods: Sequence[Pod], memory: Memory, now: float) -> None:
        """Asks the head of the live attempt, when it is time to."""
        heads = [pod for pod in pods if pod.attempt == live.attempt and pod.role == "head" and pod.live]
        if live.deployment == "Running" and not heads:
            memory.head_lost = memory.head_lost or now
        else:
            memory.head_lost = None
        if memory.report and memory.report.attempt != live.attempt:
            memory.report, memory.heard = None, 0.0
        ended = live.outcome in ("SUCCEEDED", "FAILED", "STOPPED") or live.deployment in ("Complete", "Failed")
        # What was heard just before the end does not say why: it is asked at once.
        pause = (0.0 if memory.ended is None else FINAL_SECONDS) if ended else self._interval * 0.9
        memory.ended = (memory.ended or now) if ended else None
        head = next((pod for pod in heads if pod.ip and pod.phase == "Running"), None)
        if head is None or 0 <= now - memory.asked < pause:
            return
        memory.asked = now
        report = await self._heads.ask(head)
        if report and report.attempt == live.attempt:
            memory.report, memory.heard = report, self._client.clock.now()

    async def _ask_why(
        self,
        job: Job,
        live: RayJob | None,
        suspended: RayJob | RayCluster | None,
        jobs: Sequence[BatchJob],
        pods: Sequence[Pod],
        memory: Memory,
        now: float,
    ) -> None:
        """Asks the cluster why the current stage does not get on, if it does not."""
        about = suspended.uid if suspended else _stuck(live, jobs, pods, now)
        if not memory.is_due(about, now):
            return
        memory.troubles, memory.queued = (), ""
        if suspended:
            memory.queued = await self._queue_words(job.namespace, suspended.uid)
        elif about:
            placed = any(pod.uid == about and pod.node for pod in pods)
            troubles = await self._warnings(job.namespace, about)
            memory.troubles = tuple(each for each in troubles if not placed or each.reason != "FailedScheduling")

    async def _warnings(self, namespace: str, about: str) -> tuple[Block, ...]:
        """Warnings about an object, newest first."""
        events: list[Object] = []
        async for page in self._client.list(
            EVENTS, namespace, field_selector=f"involvedObject.uid={about},type=Warning"
        ):
            events += page.items
        events.sort(key=lambda event: parse_time(event.get("lastTimestamp") or event.get("eventTime")) or 0.0)
        return tuple(Block(event.get("reason") or "", event.get("message") or "") for event in reversed(events[-5:]))

    async def _queue_words(self, namespace: str, uid: str) -> str:
        """Kueue's own words on why the child with this UID waits; empty without Kueue."""
        try:
            async for page in self._client.list(WORKLOADS, namespace, label_selector=f"{_JOB_UID_LABEL}={uid}"):
                for workload in page.items:
                    queue = (workload.get("spec") or {}).get("queueName", "")
                    for condition in (workload.get("status") or {}).get("conditions", []):
                        if condition["type"] == "QuotaReserved" and condition["status"] == "False":
                            return f"Waits in Kueue's queue {queue}: {condition.get('message', '')}"
                    return f"Waits in Kueue's queue {queue}."
        except ApiError as error:
            if not error.not_found:
                raise
        return ""

    async def _lost_nodes(self, pods: Sequence[Pod]) -> frozenset[str]:
        """Nodes of these pods that are gone or not ready."""
        lost = set()
        for name in sorted({pod.node for pod in pods if pod.node})[:_NODES_LOOKED_AT]:
            try:
                node = await self._client.get(NODES, None, name)
            except ApiError as error:
                if not error.not_found:
                    raise
                lost.add(name)
                continue
            conditions = (node.get("status") or {}).get("conditions", [])
            if any(each["type"] == "Ready" and each["status"] != "True" for each in conditions):
                lost.add(name)
        return frozenset(lost)


def _remember(attempt: int, pods: Sequence[Pod], memory: Memory) -> None:
    """Keeps what the attempt's pods were like: a preempted one is gone before KubeRay says that something failed."""
    if memory.attempt != attempt:
        memory.attempt, memory.pods = attempt, {}
    memory.pods |= {pod.uid: pod for pod in pods if pod.attempt == attempt and (pod.disrupted or pod.stops)}


def _stuck(live: RayJob | None, jobs: Sequence[BatchJob], pods: Sequence[Pod], now: float) -> str:
    """UID of the child whose events say why the current stage has not started; empty when it has, or says so itself."""
    waiting = [
        pod
        for pod in pods
        if pod.phase == "Pending" and pod.deleting is None and (not live or pod.attempt in (None, live.attempt))
    ]
    if waiting:
        pod = waiting[0]
        silent = pod.waiting is None and pod.unschedulable is None
        return pod.uid if silent and now - pod.created > PATIENCE_SECONDS else ""
    child = live if live and live.deployment != "Running" else jobs[0] if jobs else None
    if child is None or now - child.created <= PATIENCE_SECONDS:
        return ""
    mine = [pod for pod in pods if (pod.stage == "train" if child is live else pod.role == "other")]
    return "" if any(pod.live for pod in mine) else child.uid
