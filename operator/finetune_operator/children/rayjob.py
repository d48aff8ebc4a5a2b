"""The RayJob of one attempt: a Ray cluster of its own that trains, and is gone afterwards."""

from __future__ import annotations

import math
from typing import Final

from finetune_api.job import FinetuneJobSpec
from finetune_api.runtime import FinetuneRuntimeSpec
from finetune_api.stage import PROBE_VARIABLE, PROGRESS_PORT, RUN_PATH
from finetune_operator.children.labels import QUEUE_LABEL
from finetune_operator.children.names import attempt_suffix, ray_job_name, run_config_name
from finetune_operator.children.owner import Manifest, Owner, child_metadata, pod_metadata
from finetune_operator.children.pods import (
    Volume,
    container,
    environment,
    pod_spec,
    resources,
    shared_memory,
    volumes,
)

RAY_VERSION: Final = "2.60.0"  # what the trainer's image holds; KubeRay chooses its probes by it
ENTRYPOINT: Final = f"finetune train --run {RUN_PATH}"
GCS_PORT: Final = 6379
DASHBOARD_PORT: Final = 8265
METRICS_PORT: Final = 8080  # KubeRay adds it to every Ray container
WORKER_GROUP: Final = "workers"
CLEAN_UP_SECONDS: Final = 600  # KubeRay frees the GPUs this long after the end, when no operator did
GRACE_SECONDS: Final = 120
_DRAIN_SECONDS: Final = 100  # below the grace period: time for a checkpoint before the kubelet kills
HEAD_CPUS: Final = 0.5  # GCS, dashboard and driver mostly wait, and no task runs there …
HEAD_MEMORY_CPUS: Final = 1.0  # … but they need the memory of a core
_INT32_MAX: Final = 2**31 - 1

_HEAD_PORTS: Final = {"gcs-server": GCS_PORT, "dashboard": DASHBOARD_PORT, "progress": PROGRESS_PORT}
_RAY_ENVIRONMENT: Final = {
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(_DRAIN_SECONDS),
    "RAY_JOB_STOP_WAIT_TIME_S": str(_DRAIN_SECONDS),
    # Workers end this long after their head, which never comes back; the next attempt waits for them.
    "RAY_gcs_rpc_server_reconnect_timeout_s": "20",
}
# A head that comes back knows nothing of the attempt: workers would be killed and the driver run again, unfenced.
_RAY_JOB_ANNOTATIONS: Final = {"ray.io/disable-provisioned-head-restart": "true"}
_POD_ANNOTATIONS: Final = {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false"}


def ray_job(
    owner: Owner,
    spec: FinetuneJobSpec,
    runtime: FinetuneRuntimeSpec,
    attempt: int,
    start_deadline_seconds: int,
    active_deadline_seconds: int | None = None,
    probe_address: str = "",
) -> Manifest:
    """The RayJob of an attempt.

    Args:
        start_deadline_seconds: how long its pods may take to be scheduled, pull images and become ready.
        active_deadline_seconds: how long it may live at most; None: as long as it takes.
        probe_address: what workers ask that they should not reach, beside the internet; empty: they ask nothing.
    """
    metadata = child_metadata(owner, runtime, ray_job_name(owner.name, attempt), "train", attempt)
    metadata["annotations"] |= _RAY_JOB_ANNOTATIONS
    if runtime.queue_name is not None:
        metadata["labels"][QUEUE_LABEL] = runtime.queue_name
    job: Manifest = {
        "backoffLimit": 0,
        "entrypoint": ENTRYPOINT,
        "preRunningDeadlineSeconds": _seconds(start_deadline_seconds),
        "rayClusterSpec": _ray_cluster(owner, spec, runtime, attempt, probe_address),
        "shutdownAfterJobFinishes": True,
        # KubeRay's SidecarMode adds a container without a security context, which restricted namespaces refuse.
        "submissionMode": "HTTPMode",
        "ttlSecondsAfterFinished": CLEAN_UP_SECONDS,
    }
    if active_deadline_seconds is not None:
        job["activeDeadlineSeconds"] = _seconds(active_deadline_seconds)
    return {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": metadata, "spec": job}


def _ray_cluster(
    owner: Owner, spec: FinetuneJobSpec, runtime: FinetuneRuntimeSpec, attempt: int, probe_address: str
) -> Manifest:
    used = [
        *volumes(spec, runtime, run_config_name(owner.name, attempt_suffix(attempt))),
        shared_memory(runtime.resources.shared_memory),
    ]
    env = environment(runtime, attempt) | _RAY_ENVIRONMENT
    workers_env = env | {PROBE_VARIABLE: probe_address} if probe_address else env
    metadata = pod_metadata(owner, runtime, "train", attempt)
    metadata["annotations"] |= _POD_ANNOTATIONS
    head = {"metadata": metadata, "spec": _head(runtime, used, env)}
    return cluster_spec(head, _workers(spec, runtime, used, workers_env, metadata))


def cluster_spec(head: Manifest, group: Manifest) -> Manifest:
    """The spec of a RayCluster: the template of its head, on which no task runs, and its group of workers."""
    return {
        "authOptions": {"mode": "token"},
        "enableInTreeAutoscaling": False,
        "headGroupSpec": {
            "rayStartParams": {"dashboard-host": "0.0.0.0", "num-cpus": "0"},
            "template": head,
        },
        "rayVersion": RAY_VERSION,
        "workerGroupSpecs": [group],
    }


def _head(runtime: FinetuneRuntimeSpec, used: list[Volume], env: dict[str, str]) -> Manifest:
    needs = resources(runtime, HEAD_CPUS, memory_cpus=HEAD_MEMORY_CPUS)
    only = container("ray-head", runtime, used, env, needs, ports=_HEAD_PORTS)
    return pod_spec(runtime, only, used, restart="Never", grace_seconds=GRACE_SECONDS)


def _workers(
    spec: FinetuneJobSpec, runtime: FinetuneRuntimeSpec, used: list[Volume], env: dict[str, str], metadata: Manifest
) -> Manifest:
    workers = spec.workers
    cpus = workers.cpus_each * max(1, workers.gpus_each)
    only = container("ray-worker", runtime, used, env, resources(runtime, cpus, gpus=workers.gpus_each))
    # Restarted in its place, a worker keeps its node and image, and its status says how it ended before.
    pod = pod_spec(runtime, only, used, restart="Always", grace_seconds=GRACE_SECONDS)
    if runtime.node_selector:
        pod["nodeSelector"] = dict(runtime.node_selector)
    if runtime.tolerations:
        pod["tolerations"] = [toleration.model_dump(exclude_none=True) for toleration in runtime.tolerations]
    return {
        "groupName": WORKER_GROUP,
        "replicas": workers.count,
        "minReplicas": workers.min or workers.count,
        "maxReplicas": workers.count,
        # Said here, since KubeRay takes only resources that are called gpu for GPUs.
        "rayStartParams": {"num-cpus": str(math.ceil(cpus)), "num-gpus": str(workers.gpus_each)},
        "template": {"metadata": metadata, "spec": pod},
    }


def _seconds(seconds: int) -> int:
    return max(1, min(seconds, _INT32_MAX))
