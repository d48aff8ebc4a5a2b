"""Puts the parts together: watches fill stores and name jobs, workers reconcile them while this replica leads."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol

import structlog

from finetune_operator.children.labels import STAGE_LABEL
from finetune_operator.client import (
    FINETUNE_JOBS,
    FINETUNE_RUNTIMES,
    JOBS,
    PODS,
    RAY_CLUSTERS,
    RAY_JOBS,
    ApiError,
    Client,
    Resource,
)
from finetune_operator.election import Election, LeadershipLost
from finetune_operator.health import Sites, checked, page, serve
from finetune_operator.metrics import CONTENT_TYPE, JobCollector, JobSummary, Metrics, summarize
from finetune_operator.nesting import prune
from finetune_operator.queue import LAST_DELAY, KeyedQueue
from finetune_operator.reflector import Reflector
from finetune_operator.settings import Settings
from finetune_operator.store import JOB_LABEL, Key, Object, Store, trim_metadata

RECONCILE_LIMIT: Final = 120.0  # seconds; its requests are bounded one by one, so this is for what nobody foresaw
STOP_LIMIT: Final = 10.0
WATCH_AGE_LIMIT: Final = 75.0
# With an API server that refuses or is away a restart would only lose the cache; but a client whose certificates or
# addresses are out of date is helped by one, in the end.
OUTAGE_LIMIT: Final = 600.0
STUCK_LIMIT: Final = 120.0
OUTAGE_DELAY: Final = 8.0  # between two tries while the API server is in trouble, so that its return is soon noticed

CHILDREN: Final = (RAY_JOBS, RAY_CLUSTERS, JOBS, PODS)
# KubeRay gives the RayCluster of an attempt the labels of its RayJob, which says all of it that is wanted.
_PREPARE_CLUSTERS: Final = f"{JOB_LABEL},{STAGE_LABEL}=prepare"

_log = structlog.get_logger(__name__)


class Reconciler(Protocol):
    """Brings one job to where it should be."""

    async def reconcile(self, key: Key) -> float | None:
        """Looks at a job and does what is next; answers after how many seconds to look again without an event.

        The job may be gone. What it raises makes the key come back later.
        """

    async def close(self) -> None:
        """Gives back what it holds; nothing is reconciled any more."""


@dataclass(frozen=True)
class Stores:
    """What is known of the cluster."""

    jobs: Store[JobSummary]
    runtimes: Store[None]
    ray_jobs: Store[None]
    ray_clusters: Store[None]
    kube_jobs: Store[None]
    pods: Store[None]


ReconcilerFactory = Callable[[Client, Stores, Settings], Reconciler]


class Controller:
    """One replica of the operator.

    Args:
        election: None: this is the only replica.
        on_lost: called as soon as the Lease is lost, before anything is put in order.
    """

    def __init__(
        self,
        settings: Settings,
        client: Client,
        reconciler: ReconcilerFactory,
        election: Election | None = None,
        on_lost: Callable[[LeadershipLost], None] = lambda lost: None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.election = election
        self.stores = Stores(
            Store(trim_job, summarize, self._on_summary),
            Store(trim_metadata),
            Store(trim_ray_job),
            Store(trim_ray_cluster),
            Store(trim_kube_job),
            Store(trim_pod),
        )
        self.queue: KeyedQueue[Key] = KeyedQueue(monotonic)
        self.reflectors = self._reflectors(client)
        self.listening: list[tuple[str, int]] = []
        self._on_lost = on_lost
        self._monotonic = monotonic
        self._leading = False
        self._moved = monotonic()
        self._running: set[asyncio.Task[None]] = set()
        self._lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._reconciler = reconciler(client, self.stores, settings)
        client.count = self.metrics.count_request
        if election:
            client.guard = election.guard
        self.metrics.registry.register(JobCollector(self._exported, self._cost_bounds))

    async def run(self, stop: asyncio.Event) -> None:
        """Works until `stop` is set, then finishes what it has begun and gives the Lease up.

        Raises:
            LeadershipLost: another replica may write now; the process must end at once.
        """
        async with serve(self._sites()) as self.listening:
            watching = [asyncio.create_task(reflector.run()) for reflector in self.reflectors]
            electing = asyncio.create_task(self.election.run()) if self.election else None
            leading = asyncio.create_task(self._lead())
            stopping = asyncio.create_task(stop.wait())
            endless: list[asyncio.Future[Any]] = [*watching, leading, self._lost, *([electing] if electing else [])]
            try:
                await asyncio.wait([*endless, stopping], return_when=asyncio.FIRST_COMPLETED)
                for task in endless:
                    if task.done():
                        task.result()
                _log.info("stopping")
                leading.cancel()
                if self._running:
                    await asyncio.wait(self._running, timeout=STOP_LIMIT)
                await cancel([electing] if electing else [])
                await cancel([*self._running])
                if self.election:
                    await self.election.release()
            except LeadershipLost as lost:
                self._on_lost(lost)
                raise
            finally:
                await cancel([stopping, leading, *watching, *self._running, *([electing] if electing else [])])
                await self._reconciler.close()

    def unhealthy(self) -> list[str]:
        """Why this process should be started again."""
        problems = []
        for reflector in self.reflectors:
            limit = OUTAGE_LIMIT if reflector.failed else WATCH_AGE_LIMIT
            if reflector.age() > limit:
                problems.append(f"{reflector.resource.plural}: nothing certain for {reflector.age():.0f} s")
        still = self._monotonic() - self._moved
        if self._leading and (len(self.queue) or self.queue.working) and still > STUCK_LIMIT:
            problems.append(f"{len(self.queue)} jobs wait and none was finished for {still:.0f} s")
        return problems

    def unready(self) -> list[str]:
        """Why this replica could not take over now."""
        return [
            f"{reflector.resource.plural}: {reflector.failed or 'not listed yet'}"
            for reflector in self.reflectors
            if reflector.failed or not reflector.synced.is_set()
        ]

    def _sites(self) -> Sites:
        sites: Sites = {self.settings.health_bind_address: {}, self.settings.metrics_bind_address: {}}
        sites[self.settings.health_bind_address] |= {
            "/healthz": checked(self.unhealthy),
            "/readyz": checked(self.unready),
        }
        sites[self.settings.metrics_bind_address]["/metrics"] = page(self._page, CONTENT_TYPE)
        return sites

    def _reflectors(self, client: Client) -> list[Reflector]:
        stores = self.stores
        wanted: list[tuple[Resource, Store[Any], Callable[[Key], None], str | None]] = [
            (FINETUNE_JOBS, stores.jobs, self._enqueue, None),
            (FINETUNE_RUNTIMES, stores.runtimes, self._runtime_changed, None),
        ]
        children = (stores.ray_jobs, stores.ray_clusters, stores.kube_jobs, stores.pods)
        for resource, store in zip(CHILDREN, children, strict=True):
            selector = _PREPARE_CLUSTERS if resource is RAY_CLUSTERS else JOB_LABEL
            wanted.append((resource, store, self._child_changed(store), selector))
        return [
            Reflector(client, resource, store, on_change, label_selector=selector, namespace=namespace)
            for resource, store, on_change, selector in wanted
            for namespace in (self.settings.namespaces if resource.namespaced else ()) or (None,)
        ]

    async def _lead(self) -> None:
        """Waits for the caches and for the Lease, then hands out keys; each reconcile is a task."""
        for reflector in self.reflectors:
            await reflector.synced.wait()
        if self.election:
            await self.election.leading.wait()
            # A job's status may have come by a watch that works, and its attempt not by one that has died without a
            # sign: the attempt would be taken for deleted. An old status is harmless, nothing can be written on it.
            await asyncio.gather(*(each.catch_up() for each in self.reflectors if each.resource in CHILDREN))
        self._leading = True
        self.metrics.leader.set(1)
        for key in self.stores.jobs:
            self.queue.add(key)
        slots = asyncio.Semaphore(self.settings.concurrency)
        while True:
            await slots.acquire()
            key = await self.queue.get()
            if not self._running:
                self._moved = self._monotonic()
            task = asyncio.create_task(self._work(key))
            self._running.add(task)
            task.add_done_callback(self._running.discard)
            task.add_done_callback(lambda _: slots.release())

    async def _work(self, key: Key) -> None:
        started = self._monotonic()
        summary = self.stores.jobs.summary(key)
        structlog.contextvars.bind_contextvars(
            job="/".join(key), uid=summary.uid if summary else "", attempt=summary.attempt if summary else 0
        )
        try:
            async with asyncio.timeout(RECONCILE_LIMIT):
                again = await self._reconciler.reconcile(key)
            self.queue.forget(key)
            if again is not None:
                self.queue.add_after(key, again)
        except LeadershipLost as error:
            if not self._lost.done():
                self._lost.set_exception(error)
        except ApiError as error:
            self.metrics.errors.labels(error.reason or str(error.status)).inc()
            longest = OUTAGE_DELAY if error.retryable else LAST_DELAY
            delay = self.queue.add_limited(key, error.retry_after or 0, longest)
            # A conflict is what a cache that is a moment behind looks like.
            (_log.debug if error.conflict else _log.warning)("again", error=str(error), seconds=round(delay, 1))
        except Exception as error:
            self.metrics.errors.labels(type(error).__name__).inc()
            delay = self.queue.add_limited(key)
            _log.exception("reconcile failed", seconds=round(delay, 1))
        finally:
            self.queue.done(key)
            self._moved = self._monotonic()
            self.metrics.duration.observe(self._moved - started)

    def _enqueue(self, key: Key) -> None:
        if self._leading:  # whoever starts to lead looks at every job first
            self.queue.add(key)

    def _child_changed(self, store: Store[Any]) -> Callable[[Key], None]:
        def on_change(key: Key) -> None:
            if job := store.job_of(key):
                self._enqueue(job)

        return on_change

    def _runtime_changed(self, key: Key) -> None:
        for job, summary in self.stores.jobs.summaries():
            if key[1] in (summary.runtime_ref, summary.runtime) or summary.phase == "Pending":
                self._enqueue(job)

    def _on_summary(self, _key: Key, before: JobSummary | None, after: JobSummary | None) -> None:
        if self._leading:
            self.metrics.count_failures(before, after)

    def _exported(self) -> list[tuple[Key, JobSummary]]:
        return list(self.stores.jobs.summaries()) if self._leading else []

    def _cost_bounds(self) -> dict[str, float]:
        """The highest cost of a job in each runtime that bounds it."""
        specs = {key[1]: (self.stores.runtimes.get(key) or {}).get("spec") or {} for key in self.stores.runtimes}
        bounds = {name: (spec.get("limits") or {}).get("maxCost") for name, spec in specs.items()}
        return {name: bound for name, bound in bounds.items() if bound is not None}

    def _page(self) -> bytes:
        self.metrics.depth.set(len(self.queue))
        for resource in {reflector.resource for reflector in self.reflectors}:
            ages = [reflector.age() for reflector in self.reflectors if reflector.resource == resource]
            self.metrics.watch_age.labels(resource.plural).set(max(ages))
        return self.metrics.text()


async def cancel(tasks: list[asyncio.Task[Any]]) -> None:
    """Cancels tasks and waits for their end."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def trim_job(job: Object) -> Object:
    """All of it, but nothing nested deeper than anything that is meant."""
    trimmed: Object = prune(trim_metadata(job))
    return trimmed


def trim_ray_job(ray_job: Object) -> Object:
    """Of the spec only whether it is suspended: the rest is ours, and large."""
    spec = ray_job.get("spec") or {}
    return trim_metadata(ray_job) | {"spec": {"suspend": spec.get("suspend", False)}}


def trim_ray_cluster(cluster: Object) -> Object:
    """Of the spec only whether it is suspended; of the status what does not change each second."""
    spec, status = cluster.get("spec") or {}, cluster.get("status") or {}
    kept = {name: status[name] for name in ("state", "reason", "conditions") if name in status}
    return trim_metadata(cluster) | {"spec": {"suspend": spec.get("suspend", False)}, "status": kept}


def trim_kube_job(job: Object) -> Object:
    """Nothing of the spec is read."""
    return trim_metadata(job) | {"spec": {}}


def trim_pod(pod: Object) -> Object:
    """Of the spec the node, and what the containers ask for."""
    spec = pod.get("spec") or {}
    containers = [
        {"name": container["name"], "resources": container.get("resources") or {}}
        for container in spec.get("containers") or []
    ]
    return trim_metadata(pod) | {"spec": {"nodeName": spec.get("nodeName", ""), "containers": containers}}
