"""Jobs and runtimes that children are built from, and all children of one."""

from __future__ import annotations

from typing import Any, Final

from finetune_api.job import FinetuneJobSpec
from finetune_api.runtime import FinetuneRuntimeSpec
from finetune_operator.children.config import run_config_map
from finetune_operator.children.network import network_policy
from finetune_operator.children.owner import Owner
from finetune_operator.children.prepare import prepare_cluster, prepare_job
from finetune_operator.children.rayjob import ray_job
from finetune_operator.children.result import result_job
from tests.unit.api_cases import JOB, RUNTIME, changed

Manifest = dict[str, Any]

OWNER: Final = Owner("support-chat", "team-a", "0b1f6a51-8f07-4b5b-9f0e-6f4f3f1f0001")
EVERYTHING: Final = changed(
    RUNTIME,
    {
        "spec.images.pullPolicy": "Always",
        "spec.images.pullSecrets": ["registry"],
        "spec.accelerator": {"resourceName": "example.com/npu", "pricePerHour": 4.5},
        "spec.resources": {"memoryPerCpu": "2Gi", "sharedMemory": "16Gi", "scratch": "50Gi", "prepareCpus": 2.5},
        "spec.nodeSelector": {"pool": "gpu"},
        "spec.tolerations": [
            {"key": "pool", "operator": "Equal", "value": "gpu", "effect": "NoExecute", "tolerationSeconds": 60}
        ],
        "spec.storage": {
            "endpoint": "https://minio.storage.svc:9000",
            "region": "eu-west-1",
            "pathStyle": True,
            "secretName": "bucket",
            "caBundle": {"name": "storage-ca"},
            "workUri": "s3://scratch/finetune/",
        },
        "spec.networkPolicy": {"egress": [{"cidr": "10.20.0.0/16", "ports": [9000]}, {"cidr": "10.30.0.1/32"}]},
        "spec.serviceAccountName": "storage-identity",
        "spec.queueName": "gpus",
        "spec.priorityClassName": "batch",
        "spec.labels": {"cost-centre": "ml"},
        "spec.annotations": {"example.com/contact": "ml@example.com"},
    },
)


def job(**changes: Any) -> FinetuneJobSpec:
    """The spec of a valid job; `workers__count=2` sets spec.workers.count."""
    paths = {f"spec.{path.replace('__', '.')}": value for path, value in changes.items()}
    return FinetuneJobSpec.model_validate(changed(JOB, paths)["spec"])


def runtime(document: Manifest = RUNTIME, **changes: Any) -> FinetuneRuntimeSpec:
    """The spec of a valid runtime, with changes as in `job`."""
    paths = {f"spec.{path.replace('__', '.')}": value for path, value in changes.items()}
    return FinetuneRuntimeSpec.model_validate(changed(document, paths)["spec"])


JOBS: Final = {
    "on CPUs": job(),
    "on GPUs": job(workers={"count": 4, "min": 2, "gpusEach": 8, "cpusEach": 2.5}),
    "with a model in a volume": job(model__source="pvc://models/llama"),
    "with many rows": job(data__prepare={"workers": 3}),
}
RUNTIMES: Final = {"least": runtime(), "everything": runtime(EVERYTHING)}


def children(spec: FinetuneJobSpec, on: FinetuneRuntimeSpec, owner: Owner = OWNER) -> list[Manifest]:
    """Every child of a job that is in its third attempt."""
    policy = network_policy(owner, on, "finetune-system")
    return [
        run_config_map(owner, spec, on, "prepare", "PEM" if on.storage.ca_bundle else None),
        run_config_map(owner, spec, on, 3, "PEM" if on.storage.ca_bundle else None),
        prepare_job(owner, spec, on, spec.data.prepare.workers),
        *([prepare_cluster(owner, spec, on, workers)] if (workers := spec.data.prepare.workers or 1) > 1 else []),
        ray_job(owner, spec, on, 3, 1800, 7200),
        result_job(owner, spec, on, 3),
        *([policy] if policy else []),
    ]


def pod_templates(manifest: Manifest) -> list[Manifest]:
    """The pod templates of a child: those of a RayJob and of a RayCluster are the head's and the workers'."""
    spec = manifest.get("spec", {})
    if manifest["kind"] == "Job":
        return [spec["template"]]
    if manifest["kind"] in ("RayJob", "RayCluster"):
        cluster = spec.get("rayClusterSpec", spec)
        return [cluster["headGroupSpec"]["template"], *(group["template"] for group in cluster["workerGroupSpecs"])]
    return []
