"""A job's children as the small values of `observe`, made from the API server's JSON."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from typing import Final

from finetune_operator.children.labels import STAGE_LABEL
from finetune_operator.children.names import attempt_of
from finetune_operator.observe import BatchJob, Block, Json, Pod, RayCluster, RayJob, Stop, owned, parse_time

_PODS: Final = re.compile(r'pods "[^"]*"')  # KubeRay tries with a new name each time
_SUSPENDED: Final = {"RayClusterSuspending", "RayClusterSuspended"}


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
        cluster_trouble=_cluster_trouble(cluster),
    )


def read_ray_cluster(manifest: Json, owner: str) -> RayCluster:
    """The RayCluster of the stage prepare. `owner` is the FinetuneJob's UID."""
    metadata, status = manifest["metadata"], manifest.get("status") or {}
    suspensions = [each for each in status.get("conditions") or [] if each["type"] == "RayClusterSuspended"]
    times = [metadata["creationTimestamp"], *(each["lastTransitionTime"] for each in suspensions)]
    return RayCluster(
        name=metadata["name"],
        uid=metadata["uid"],
        begun=max(map(_time, times)),
        deleting=parse_time(metadata.get("deletionTimestamp")),
        foreign=not owned(metadata, owner),
        suspended=bool(manifest["spec"].get("suspend")) or bool(_SUSPENDED & _holding(manifest).keys()),
        ready=status.get("state") == "ready",
        trouble=_cluster_trouble(status),
    )


def _cluster_trouble(status: Json) -> str:
    refused = _holding({"status": status}).get("ReplicaFailure", {})
    return _PODS.sub("pods", refused.get("message") or status.get("reason", ""))


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


def _time(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


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
