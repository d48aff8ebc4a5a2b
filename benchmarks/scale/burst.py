"""Many jobs created at once: this operator with FinetuneJobs, then KubeRay with RayJobs, in the same cluster."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.scale.load import JOBS_API, Json, all_of, loader
from benchmarks.scale.measure import WRITES, Audit, Scrape, delays, programs, scrape, summary, usage
from benchmarks.scale.operator import running
from tests.api import jobs
from tests.api.cluster import Cluster, cluster
from tests.api.kubelet import Kubelet
from tests.api.objects import Api, eventually, fresh_namespace
from tests.api.script import Hold, Script, Stage

from finetune_api.job import FinetuneJobSpec
from finetune_api.runtime import FinetuneRuntimeSpec
from finetune_operator.children.labels import JOB_LABEL
from finetune_operator.children.owner import Owner
from finetune_operator.children.rayjob import ray_job

FULL: Final = Script(prepare=Stage(hold=Hold("Unschedulable", "0/4 nodes are available: 4 Insufficient cpu.")))
LIMIT_SECONDS: Final = 600.0
QUIET_SCRAPES: Final = 3  # without a write, and the burst is over


@dataclass(frozen=True)
class Burst:
    """What one side made of the burst. Delays count from the answer to the creation; seconds from the first one.

    Attributes:
        requests: per job, by verb and resource.
        reconciles: of jobs, per second until the last write; None: not told.
    """

    jobs: int
    created_seconds: float
    status_seconds: float
    child_seconds: float
    status_delay: dict[str, float]
    child_delay: dict[str, float]
    requests: dict[str, float]
    writes_per_job: float
    reads_per_job: float
    reconciles_per_second: float | None
    reconciles_per_job: float | None
    errors: dict[str, int]
    cpu_seconds: float
    peak_bytes: int

    @property
    def jobs_per_second(self) -> float:
        return self.jobs / self.child_seconds


def burst(folder: Path, count: int) -> tuple[Burst, Burst]:
    """This operator's and KubeRay's."""
    with (
        cluster(folder / "cluster") as c,
        Api(c.kubeconfig) as api,
        fresh_namespace(api) as namespace,
        jobs.runtime(api) as runtime,
    ):
        ours = _operator(c, folder, namespace, runtime, count)
        spec = api.get(jobs.RUNTIME_KIND, runtime)["spec"]
        return ours, _kuberay(c, api, spec, count)


def _operator(c: Cluster, folder: Path, namespace: str, runtime: str, count: int) -> Burst:
    with running(c, folder) as (operator, port), Kubelet(c, FULL):
        before, used, since = scrape(port), usage(operator.pid), time.time()
        names = [f"burst-{number:05}" for number in range(count)]
        asyncio.run(
            _create(c, f"{JOBS_API}/namespaces/{namespace}/finetunejobs", [jobs.job(n, runtime) for n in names])
        )
        last = _settle(port, before, count)
        after = usage(operator.pid)
    audit = Audit(c)
    created = audit.of("admin", "create", "finetunejobs")
    status = audit.of("finetune-operator", "patch", "finetunejobs/status")
    made = {name.removesuffix("-prepare"): at for name, at in audit.of("finetune-operator", "create", "jobs").items()}
    seconds = last.at - min(created.values())
    return _burst(
        created,
        status,
        made,
        audit.requests("finetune-operator", since, last.at),
        reconciles_per_second=round((last.reconciles - before.reconciles) / seconds, 1),
        reconciles_per_job=round((last.reconciles - before.reconciles) / count, 2),
        errors=dict(last.errors - before.errors),
        cpu_seconds=round(after.cpu - used.cpu, 1),
        peak_bytes=after.peak,
    )


def _settle(port: int, before: Scrape, count: int) -> Scrape:
    """Waits until every job has been started and nothing more is written; the first reading that knew of all writes.

    Raises:
        TimeoutError: that takes too long.
    """
    last, quiet, end = before, 0, time.time() + LIMIT_SECONDS
    while quiet < QUIET_SCRAPES:
        if time.time() > end:
            raise TimeoutError(f"after {LIMIT_SECONDS} s there still are writes: {last}")
        time.sleep(1)
        now = scrape(port)
        # Renewals of the Lease go on for ever.
        leases = sum(number for (_, resource), number in (now.requests - last.requests).items() if resource == "leases")
        if now.phases["Preparing"] == count and now.writes - leases == last.writes:
            quiet += 1
        else:
            last, quiet = now, 0
    return last


def _kuberay(c: Cluster, api: Api, runtime: Json, count: int) -> Burst:
    """The attempts of such jobs, without the label by which the operator and the kubelet know theirs."""
    spec = FinetuneJobSpec.model_validate(jobs.job("burst", "burst")["spec"])
    allowed = FinetuneRuntimeSpec.model_validate(runtime)
    pid = programs()["ray-operator"]
    with fresh_namespace(api) as namespace:
        used, since = usage(pid), time.time()
        manifests = []
        for number in range(count):
            manifest = ray_job(Owner(f"burst-{number:05}", namespace, ""), spec, allowed, 1, 3600)
            manifests.append(_without_owner(manifest))
        asyncio.run(_create(c, f"/apis/ray.io/v1/namespaces/{namespace}/rayjobs", manifests))

        def all_made() -> bool:
            time.sleep(2)  # such a list costs the API server, too
            found = [each.get("status", {}) for each in api.list(jobs.RAY_CLUSTER, namespace)]
            return sum("desiredWorkerReplicas" in each for each in found) == count  # its pods are made

        eventually(all_made, "KubeRay to make all clusters and their pods", LIMIT_SECONDS)
        until, after = time.time(), usage(pid)
    audit = Audit(c)
    created = audit.of("admin", "create", "rayjobs")
    status = audit.of("kuberay", "update|patch", "rayjobs/status")
    made = _by_job(audit.of("kuberay", "create", "rayclusters"), created)
    return _burst(
        created,
        status,
        made,
        audit.requests("kuberay", since, until),
        reconciles_per_second=None,
        reconciles_per_job=None,
        errors={},
        cpu_seconds=round(after.cpu - used.cpu, 1),
        peak_bytes=after.peak,
    )


def _burst(
    created: dict[str, float],
    status: dict[str, float],
    made: dict[str, float],
    requests: Counter[tuple[str, str]],
    **more: Any,
) -> Burst:
    count, start = len(created), min(created.values())
    writes = sum(number for (verb, resource), number in requests.items() if verb in WRITES and resource != "leases")
    reads = sum(number for (verb, _), number in requests.items() if verb not in WRITES)
    return Burst(
        count,
        round(max(created.values()) - start, 1),
        round(max(status.values()) - start, 1),
        round(max(made.values()) - start, 1),
        summary(delays(created, status)),
        summary(delays(created, made)),
        {f"{verb} {resource}": round(number / count, 2) for (verb, resource), number in sorted(requests.items())},
        round(writes / count, 2),
        round(reads / count, 2),
        **more,
    )


async def _create(c: Cluster, path: str, manifests: Sequence[Json]) -> None:
    async with loader(c) as load:
        await all_of(load.send("POST", path, manifest) for manifest in manifests)


def _without_owner(manifest: Json) -> Json:
    del manifest["metadata"]["ownerReferences"]
    cluster_spec = manifest["spec"]["rayClusterSpec"]
    templates = [cluster_spec["headGroupSpec"], *cluster_spec["workerGroupSpecs"]]
    for metadata in [manifest["metadata"], *(each["template"]["metadata"] for each in templates)]:
        metadata["labels"].pop(JOB_LABEL, None)
    return manifest


def _by_job(clusters: dict[str, float], created: dict[str, float]) -> dict[str, float]:
    """KubeRay calls a cluster <job>-<five letters>."""
    return {name: at for each, at in clusters.items() if (name := each.rpartition("-")[0]) in created}
