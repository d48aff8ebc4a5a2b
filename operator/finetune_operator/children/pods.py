"""What the pods of every stage share: volumes, environment, resources and the restricted Pod Security profile.

Nothing here takes an image, a command, a path of the host or a service account from the job: they are the admin's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Final, Literal

from finetune_api.job import FinetuneJobSpec
from finetune_api.runtime import FinetuneRuntimeSpec, Hub, Storage
from finetune_api.stage import CA_PATH, MODEL_CLAIM_PATH, RUN_PATH, SCRATCH_PATH, STORAGE_SECRET_PATH
from finetune_operator.children.owner import Manifest

_PATIENCE_SECONDS: Final = 600  # that storage may be away before a stage fails
_CLAIM: Final = re.compile(r"pvc://([a-z0-9][-a-z0-9.]*)(?:/|$)")
_MEBIBYTES: Final = {"Mi": 1, "Gi": 1024}


@dataclass(frozen=True)
class Volume:
    """A volume, and where a container sees it."""

    volume: Manifest
    mounts: tuple[Manifest, ...]


def volumes(spec: FinetuneJobSpec, runtime: FinetuneRuntimeSpec, config_map: str) -> list[Volume]:
    """Volumes of every pod: configuration, local disk, the storage's secret and a model's claim."""
    found = [
        Volume(
            {"name": "config", "configMap": {"name": config_map}},
            ({"name": "config", "mountPath": str(PurePosixPath(RUN_PATH).parent), "readOnly": True},),
        ),
        Volume(
            {"name": "scratch", "emptyDir": {"sizeLimit": runtime.resources.scratch}},
            # The root is read-only; /tmp counts as local disk too.
            (
                {"name": "scratch", "mountPath": SCRATCH_PATH},
                {"name": "scratch", "mountPath": "/tmp", "subPath": "tmp"},
            ),
        ),
    ]
    if runtime.storage.secret_name is not None:
        found.append(
            Volume(
                {"name": "storage", "secret": {"secretName": runtime.storage.secret_name}},
                ({"name": "storage", "mountPath": STORAGE_SECRET_PATH, "readOnly": True},),
            )
        )
    if claim := _CLAIM.match(spec.model.source):
        found.append(
            Volume(
                {"name": "model", "persistentVolumeClaim": {"claimName": claim[1], "readOnly": True}},
                ({"name": "model", "mountPath": MODEL_CLAIM_PATH, "readOnly": True},),
            )
        )
    return found


def shared_memory(size: str) -> Volume:
    """/dev/shm: a container has 64 MiB of it unless it is given more."""
    return Volume(
        {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": size}},
        ({"name": "shared-memory", "mountPath": "/dev/shm"},),
    )


def environment(runtime: FinetuneRuntimeSpec, attempt: int | None = None) -> dict[str, str]:
    """Environment of every container. Credentials are files, since an environment is shown and inherited."""
    found = {
        "HOME": SCRATCH_PATH,  # caches of libraries go below it
        "USER": "finetune",  # the image's user may have no name, and torch asks for one
        "PYTHONUNBUFFERED": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    if attempt is not None:
        found["FINETUNE_ATTEMPT"] = str(attempt)
    return found | _storage_environment(runtime.storage) | _hub_environment(runtime.hub)


def _storage_environment(storage: Storage) -> dict[str, str]:
    chosen = {
        "AWS_ENDPOINT_URL": storage.endpoint,
        "AWS_REGION": storage.region,
        "AWS_CA_BUNDLE": CA_PATH if storage.ca_bundle is not None else None,
        "FINETUNE_S3_PATH_STYLE": str(int(storage.path_style)) if storage.endpoint is not None else None,
        "FINETUNE_STORAGE_PATIENCE": str(_PATIENCE_SECONDS),
        # With keys of its own, a pod need not wait for a metadata address that the NetworkPolicy closes.
        "AWS_EC2_METADATA_DISABLED": "true" if storage.secret_name is not None else None,
    }
    return {name: value for name, value in chosen.items() if value is not None}


def _hub_environment(hub: Hub) -> dict[str, str]:
    chosen = {"HF_ENDPOINT": hub.endpoint, "FINETUNE_HF_MIRROR": hub.mirror_uri}
    return {name: value for name, value in chosen.items() if value is not None}


def resources(
    runtime: FinetuneRuntimeSpec, cpus: float, *, gpus: int = 0, memory_cpus: float | None = None
) -> Manifest:
    """Requests and limits of a container. CPU has no limit: throttling slows the step of every rank.

    Args:
        cpus: cores.
        gpus: devices of the runtime's accelerator.
        memory_cpus: cores whose memory it gets, where that is not `cpus`.
    """
    cores = cpus if memory_cpus is None else memory_cpus
    memory = f"{math.ceil(cores * mebibytes(runtime.resources.memory_per_cpu))}Mi"
    found: Manifest = {"requests": {"cpu": _cores(cpus), "memory": memory}, "limits": {"memory": memory}}
    if gpus:
        found["limits"][runtime.accelerator.resource_name] = str(gpus)
    return found


def container(
    name: str,
    runtime: FinetuneRuntimeSpec,
    used: Sequence[Volume],
    env: dict[str, str],
    needs: Manifest,
    *,
    command: Sequence[str] = (),
    ports: dict[str, int] | None = None,
) -> Manifest:
    """A container of the runtime's image; without `command` KubeRay gives it one."""
    found: Manifest = {
        "name": name,
        "image": runtime.images.trainer,
        "imagePullPolicy": runtime.images.pull_policy,
        "env": [{"name": key, "value": value} for key, value in env.items()],
        "resources": needs,
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
            "runAsNonRoot": True,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        # Never the log: it could carry a user's rows into the status.
        "terminationMessagePolicy": "File",
        "volumeMounts": [mount for volume in used for mount in volume.mounts],
    }
    if command:
        found["command"] = list(command)
    if ports:
        found["ports"] = [{"name": key, "containerPort": port} for key, port in ports.items()]
    return found


def pod_spec(
    runtime: FinetuneRuntimeSpec,
    only: Manifest,
    used: Sequence[Volume],
    *,
    restart: Literal["Always", "Never"],
    grace_seconds: int = 30,
) -> Manifest:
    """The spec of a pod with one container, which has no credentials for the API server."""
    found: Manifest = {
        "automountServiceAccountToken": False,
        "containers": [only],
        "enableServiceLinks": False,  # a Service called `ray` would set RAY_PORT
        "restartPolicy": restart,
        "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
        "terminationGracePeriodSeconds": grace_seconds,
        "volumes": [volume.volume for volume in used],
    }
    if runtime.images.pull_secrets:
        found["imagePullSecrets"] = [{"name": name} for name in runtime.images.pull_secrets]
    if runtime.service_account_name is not None:
        found["serviceAccountName"] = runtime.service_account_name
    if runtime.priority_class_name is not None:
        found["priorityClassName"] = runtime.priority_class_name
    return found


def mebibytes(size: str) -> int:
    """A size of a runtime, such as 4Gi, in MiB."""
    return int(size[:-2]) * _MEBIBYTES[size[-2:]]


def _cores(cpus: float) -> str:
    return f"{math.ceil(cpus * 1000)}m"
