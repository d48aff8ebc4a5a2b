"""The children that check the rows and turn them into token sequences, before a GPU is taken: a Job, and for many rows
a Ray cluster of CPU pods that the Job's pod hands the work to.
"""

from __future__ import annotations

import math
from pathlib import PurePosixPath
from typing import Final

from finetune_api.job import FinetuneJobSpec
from finetune_api.runtime import FinetuneRuntimeSpec
from finetune_api.stage import RAY_TOKEN_PATH
from finetune_operator.children.batch import batch_job
from finetune_operator.children.labels import QUEUE_LABEL
from finetune_operator.children.names import prepare_cluster_name, prepare_name, run_config_name
from finetune_operator.children.owner import Manifest, Owner, child_metadata, pod_metadata
from finetune_operator.children.pods import Volume, container, environment, pod_spec, resources, shared_memory, volumes
from finetune_operator.children.rayjob import (
    DASHBOARD_PORT,
    GCS_PORT,
    HEAD_CPUS,
    HEAD_MEMORY_CPUS,
    WORKER_GROUP,
    cluster_spec,
)

_DRIVER_CPUS: Final = 1.0  # it decides; the workers work


def prepare_job(owner: Owner, spec: FinetuneJobSpec, runtime: FinetuneRuntimeSpec, workers: int | None) -> Manifest:
    """The Job of the stage prepare.

    Args:
        workers: more than one: its pod joins the cluster of `prepare_cluster`, without a core for its tasks.
    """
    alone = workers is None or workers == 1
    cluster = prepare_cluster_name(owner.name)
    return batch_job(
        owner,
        spec,
        runtime,
        name=prepare_name(owner.name),
        stage="prepare",
        config_map=run_config_name(owner.name, "prepare"),
        cpus=runtime.resources.prepare_cpus if alone else min(_DRIVER_CPUS, runtime.resources.prepare_cpus),
        memory_cpus=runtime.resources.prepare_cpus,
        more=() if alone else (shared_memory(runtime.resources.shared_memory), _token(cluster)),
        more_environment={}
        if alone
        else {
            "FINETUNE_PREPARE_HEAD": f"{cluster}-head-svc:{GCS_PORT}",
            "FINETUNE_PREPARE_WORKERS": str(workers),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": RAY_TOKEN_PATH,
        },
    )


def prepare_cluster(owner: Owner, spec: FinetuneJobSpec, runtime: FinetuneRuntimeSpec, workers: int) -> Manifest:
    """The RayCluster with so many workers. A pod that is lost, also the head, is made again by KubeRay."""
    used = [
        *volumes(spec, runtime, run_config_name(owner.name, "prepare")),
        shared_memory(runtime.resources.shared_memory),
    ]
    env, cpus = environment(runtime), runtime.resources.prepare_cpus
    ports = {"gcs-server": GCS_PORT, "dashboard": DASHBOARD_PORT}
    needs = resources(runtime, HEAD_CPUS, memory_cpus=HEAD_MEMORY_CPUS)
    head = pod_spec(runtime, container("ray-head", runtime, used, env, needs, ports=ports), used, restart="Never")
    worker = container("ray-worker", runtime, used, env, resources(runtime, cpus))
    pod = pod_metadata(owner, runtime, "prepare")
    metadata = child_metadata(owner, runtime, prepare_cluster_name(owner.name), "prepare")
    if runtime.queue_name is not None:
        metadata["labels"][QUEUE_LABEL] = runtime.queue_name
    group = {
        "groupName": WORKER_GROUP,
        "replicas": workers,
        "minReplicas": workers,
        "maxReplicas": workers,
        "rayStartParams": {"num-cpus": str(math.ceil(cpus))},
        "template": {"metadata": pod, "spec": pod_spec(runtime, worker, used, restart="Always")},
    }
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": metadata,
        "spec": cluster_spec({"metadata": pod, "spec": head}, group),
    }


def _token(cluster: str) -> Volume:
    """The token that KubeRay makes for a cluster, in a secret of its name."""
    folder = str(PurePosixPath(RAY_TOKEN_PATH).parent)
    return Volume(
        {"name": "ray-token", "secret": {"secretName": cluster}},
        ({"name": "ray-token", "mountPath": folder, "readOnly": True},),
    )
