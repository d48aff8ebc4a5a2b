"""Brings one job a step further: observe, decide, one status patch, actions, events."""

from __future__ import annotations

import hashlib
from typing import Any, Final

import structlog
from pydantic import ValidationError

from finetune_api.status import FinetuneJobStatus
from finetune_operator.actions import Action, Event, MakeAttempt, MakePrepare, MakePrepareCluster, MakeResult
from finetune_operator.children.names import prepare_cluster_name, prepare_name, ray_job_name, result_name
from finetune_operator.client import EVENTS, FINETUNE_JOBS, ApiError, Client, Object
from finetune_operator.controller import Stores
from finetune_operator.decide import decide
from finetune_operator.draft import Timing
from finetune_operator.head import Heads
from finetune_operator.look import Memory, Observer
from finetune_operator.observe import Block, Job, Observed, Refused, format_time, read_job
from finetune_operator.perform import Hindrance, Performer
from finetune_operator.release import overdue
from finetune_operator.settings import Settings
from finetune_operator.store import Key
from finetune_operator.stuck import stuck

REFUSED_SECONDS: Final = 5.0  # until a refused child is tried again; doubled each time
REFUSED_LIMIT: Final = 120.0
UNREADABLE_SECONDS: Final = 300.0  # between two complaints about a status
SOON: Final = 0.2  # until a decision on something outdated is taken again

log = structlog.get_logger()


class JobReconciler:
    """Reconciles jobs by key; what it remembers of them speeds it up, and may be lost."""

    def __init__(self, client: Client, stores: Stores, settings: Settings) -> None:
        self._client, self._stores, self._clock = client, stores, client.clock
        self._heads = Heads(settings.progress_timeout)
        self._observer = Observer(client, stores, self._heads, settings.progress_interval)
        self._performer = Performer(client, stores, settings)
        self._timing = Timing(
            progress=settings.progress_interval,
            start=settings.start_deadline,
            hang=settings.progress_deadline,
            grace=settings.stop_grace,
        )
        self._memories: dict[Key, Memory] = {}

    async def close(self) -> None:
        """Closes connections to heads."""
        await self._heads.close()

    async def reconcile(self, key: Key) -> float | None:
        """One step for one job; answers in how many seconds the next is due without anything changing.

        Raises:
            ApiError: the API server refused something in passing, or is not there; worth trying again.
        """
        manifest = self._stores.jobs.get(key)
        if manifest is None or "deletionTimestamp" in manifest["metadata"]:
            self._memories.pop(key, None)
            return await self._clean_up(key)
        try:
            job = read_job(manifest)
        except ValidationError as error:
            fields = sorted({".".join(map(str, problem["loc"])) for problem in error.errors()})
            log.error("status cannot be read, so nothing is done; was it written by a newer operator?", fields=fields)
            return UNREADABLE_SECONDS
        memory = self._memories.setdefault(key, Memory())
        now = self._clock.now()
        observed = await self._observer.look(job, memory, now)
        decision = decide(observed, now, self._timing)
        try:
            if decision.status != job.status:
                await self._write(manifest, decision.status)
                _log_change(job.status, decision.status)
            elif any(isinstance(action, MakeAttempt) for action in decision.actions):
                await self._check(job)
        except ApiError as error:
            if error.not_found:
                return None  # deleted: the watch will say so
            if error.conflict:
                return SOON  # decided on an old version: the watch brings the new one
            raise
        refused = False
        for action in decision.actions:
            refused = await self._perform(observed, memory, action) or refused
        for event in decision.events:
            await self._tell(job, event)
        return SOON if refused else decision.wake

    async def _clean_up(self, key: Key) -> float | None:
        """Of a job that is gone: its children are deleted by their owner references; those that stay are made to go."""
        actions, wake = overdue(
            self._observer.attempts(key, "").values(),
            self._observer.pods(key, None),
            self._clock.now(),
            self._timing,
        )
        for action in actions:
            await self._performer.force(key[0], action)
        return wake

    async def _write(self, manifest: Object, status: FinetuneJobStatus) -> None:
        """Patches the status, if the job has not changed since it was observed."""
        metadata = manifest["metadata"]
        new = status.model_dump(mode="json", by_alias=True, exclude_none=True)
        patch = {
            "metadata": {"resourceVersion": metadata["resourceVersion"], "uid": metadata["uid"]},
            "status": merge_patch(manifest.get("status") or {}, new),
        }
        written = await self._client.patch_status(FINETUNE_JOBS, metadata["namespace"], metadata["name"], patch)
        self._stores.jobs.put(written)

    async def _check(self, job: Job) -> None:
        """Makes sure that the status which allows an attempt still stands.

        Raises:
            ApiError: a conflict, when it does not.
        """
        found = await self._client.get(FINETUNE_JOBS, job.namespace, job.name)
        if found["metadata"]["resourceVersion"] != job.resource_version:
            self._stores.jobs.put(found)
            raise ApiError(409, "Conflict", "the job has changed since it was observed")

    async def _perform(self, observed: Observed, memory: Memory, action: Action) -> bool:
        """Does an action; answers whether the cluster refused it, which the status should say."""
        job, name = observed.job, _made_by(observed.job.name, action)
        try:
            await self._performer.perform(job, observed.runtime, action)
        except (ApiError, Hindrance) as error:
            block = _refusal(error, action, job.namespace)
            if name is None or block is None:
                raise
            tries = memory.refused[name].tries + 1 if name in memory.refused else 1
            pause = min(REFUSED_SECONDS * 2 ** (tries - 1), REFUSED_LIMIT)
            memory.refused[name] = Refused(block, self._clock.now() + pause, tries)
            log.warning("refused", child=name, reason=block.reason, message=block.message, again_in=pause)
            return True
        if name is not None:
            memory.refused.pop(name, None)
        return False

    async def _tell(self, job: Job, event: Event) -> None:
        """Writes an event, once. A lost event is no loss: the status says the same."""
        time = format_time(self._clock.now())
        about = f"{job.uid} {event.reason} {event.message} {job.status.attempt}"
        name = f"{job.name}.{hashlib.sha256(about.encode()).hexdigest()[:16]}"
        body = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": name, "namespace": job.namespace},
            "involvedObject": {
                "apiVersion": FINETUNE_JOBS.api_version,
                "kind": FINETUNE_JOBS.kind,
                "name": job.name,
                "namespace": job.namespace,
                "uid": job.uid,
                "resourceVersion": job.resource_version,
            },
            "type": event.type,
            "reason": event.reason,
            "message": event.message,
            "firstTimestamp": time,
            "lastTimestamp": time,
            "count": 1,
            "source": {"component": "finetune-operator"},
        }
        try:
            await self._client.create(EVENTS, job.namespace, body)
        except ApiError as error:
            if not error.already_exists:
                log.info("event not written", reason=event.reason, error=str(error))


def merge_patch(old: Any, new: Any) -> Any:
    """The JSON merge patch (RFC 7386) that turns an object into another; lists are replaced whole."""
    patch: dict[str, Any] = dict.fromkeys(old.keys() - new.keys())
    for name, value in new.items():
        before = old.get(name)
        if isinstance(before, dict) and isinstance(value, dict):
            if below := merge_patch(before, value):
                patch[name] = below
        elif before != value:
            patch[name] = value
    return patch


def _log_change(before: FinetuneJobStatus, after: FinetuneJobStatus) -> None:
    if (before.phase, before.reason) != (after.phase, after.reason):
        log.info("phase", phase=after.phase, reason=after.reason, message=after.message or "")


def _made_by(job: str, action: Action) -> str | None:
    match action:
        case MakePrepare():
            return prepare_name(job)
        case MakePrepareCluster():
            return prepare_cluster_name(job)
        case MakeAttempt(number):
            return ray_job_name(job, number)
        case MakeResult():
            return result_name(job)
        case _:
            return None


def _refusal(error: ApiError | Hindrance, action: Action, namespace: str) -> Block | None:
    """Why a child is refused, in words for the user; None: the request failed in passing."""
    if isinstance(error, Hindrance):
        return error.block
    if error.not_found and isinstance(action, MakeAttempt | MakePrepareCluster):
        kind = "RayJobs" if isinstance(action, MakeAttempt) else "RayClusters"
        said = f"The cluster has no {kind}: KubeRay is not installed. The admin must install it."
        return Block("KubeRayMissing", said)
    webhook = error.status >= 500 and "webhook" in error.message
    if (error.retryable and not webhook) or error.conflict:
        return None
    words = stuck((), (Block(error.reason or "Refused", error.message),), namespace=namespace)
    return words or Block("Refused", error.message)
