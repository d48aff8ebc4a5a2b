"""The Kubernetes Jobs of the stages that need no Ray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, Literal

from finetune_api.errors import DataError, GateFailed, ModelError, SpecError, TooManyRows
from finetune_api.job import FinetuneJobSpec
from finetune_api.runtime import FinetuneRuntimeSpec
from finetune_api.stage import RUN_PATH
from finetune_operator.children.owner import Manifest, Owner, child_metadata, pod_metadata
from finetune_operator.children.pods import Volume, container, environment, pod_spec, resources, volumes

RETRIES: Final = 3
# What trying again does not mend: the job, the rows, the model or a gate is at fault, or one pod is not enough.
FINAL_EXIT_CODES: Final = sorted(
    error.exit_code for error in (SpecError, DataError, ModelError, GateFailed, TooManyRows)
)


def batch_job(
    owner: Owner,
    spec: FinetuneJobSpec,
    runtime: FinetuneRuntimeSpec,
    *,
    name: str,
    stage: Literal["prepare", "result"],
    config_map: str,
    cpus: float,
    memory_cpus: float | None = None,
    attempt: int | None = None,
    more: Sequence[Volume] = (),
    more_environment: Mapping[str, str] | None = None,
) -> Manifest:
    """A Job with one pod of `finetune <stage>` on CPUs, which says in its termination message how it ended.

    A failure that is worth it is tried again RETRIES times; a pod that is taken away costs no retry.
    """
    used = [*volumes(spec, runtime, config_map), *more]
    only = container(
        stage,
        runtime,
        used,
        environment(runtime, attempt) | dict(more_environment or {}),
        resources(runtime, cpus, memory_cpus=memory_cpus),
        command=("finetune", stage, "--run", RUN_PATH),
    )
    policy = [
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {
            "action": "FailJob",
            "onExitCodes": {"containerName": stage, "operator": "In", "values": FINAL_EXIT_CODES},
        },
    ]
    template = {
        "metadata": pod_metadata(owner, runtime, stage, attempt),
        "spec": pod_spec(runtime, only, used, restart="Never"),
    }
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": child_metadata(owner, runtime, name, stage, attempt),
        "spec": {"backoffLimit": RETRIES, "podFailurePolicy": {"rules": policy}, "template": template},
    }
