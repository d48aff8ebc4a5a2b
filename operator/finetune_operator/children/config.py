"""The ConfigMap that brings a stage its run.json, and the work folder that this names."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Final, Literal

from finetune_api.errors import SpecError
from finetune_api.job import FinetuneJobSpec
from finetune_api.run import Device, RunConfig
from finetune_api.runtime import FinetuneRuntimeSpec
from finetune_api.stage import CA_PATH, MODEL_PATH, RUN_PATH
from finetune_operator.children.names import attempt_suffix, run_config_name
from finetune_operator.children.owner import Manifest, Owner, child_metadata
from finetune_operator.children.pods import mebibytes

RUN_KEY: Final = PurePosixPath(RUN_PATH).name
CA_KEY: Final = PurePosixPath(CA_PATH).name
_PRODUCT: Final = "nvidia.com/gpu.product"  # the label that NVIDIA's feature discovery gives nodes
_MAX_BYTES: Final = 1 << 20  # of all values together: the API server's limit


def run_config_map(
    owner: Owner,
    spec: FinetuneJobSpec,
    runtime: FinetuneRuntimeSpec,
    stage_or_attempt: Literal["prepare"] | int,
    ca: str | None,
    prepare_workers: int | None = None,
) -> Manifest:
    """The ConfigMap of the stage prepare, or of an attempt.

    Args:
        prepare_workers: how many prepare; None: nobody has said so yet, and the stage may ask for several.
        ca: certificates (PEM) that the storage's endpoint is checked with; the runtime keeps them in a ConfigMap of
            the operator's namespace, which pods of the job cannot mount.

    Raises:
        SpecError: the job is too large for a ConfigMap.
    """
    attempt = None if stage_or_attempt == "prepare" else stage_or_attempt
    suffix = "prepare" if attempt is None else attempt_suffix(attempt)
    run = RunConfig(
        name=owner.name,
        uid=owner.uid,
        spec=spec,
        base_dir="/",
        model_path=MODEL_PATH,
        work=work_uri(owner, spec, runtime),
        device=_device(runtime) if spec.workers.gpus_each else None,
        prepare_bytes=_prepare_bytes(runtime) if attempt is None and prepare_workers is None else None,
    )
    data = {RUN_KEY: run.model_dump_json(exclude_none=True)} | ({CA_KEY: ca} if ca is not None else {})
    size = sum(len(text.encode()) for text in data.values())
    if size > _MAX_BYTES:
        raise SpecError(
            f"the job takes {size:,} bytes with its defaults and the storage's certificates, "
            f"and pods can be given {_MAX_BYTES:,}",
            where="spec",
            hint="shorten evaluation.prompts, or give fewer of them",
        )
    stage: Literal["prepare", "train"] = "prepare" if attempt is None else "train"
    metadata = child_metadata(owner, runtime, run_config_name(owner.name, suffix), stage, attempt)
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}


def _prepare_bytes(runtime: FinetuneRuntimeSpec) -> int | None:
    """What one pod may prepare; None where the runtime allows a job no second one."""
    alone = runtime.limits.max_workers == 1
    return None if alone else mebibytes(runtime.resources.prepare_bytes) << 20


def _device(runtime: FinetuneRuntimeSpec) -> Device:
    accelerator = runtime.accelerator
    return Device(
        memory_bytes=accelerator.memory_bytes,
        product=runtime.node_selector.get(_PRODUCT),
        price_per_hour=accelerator.price_per_hour,
        currency=accelerator.currency,
    )


def work_uri(owner: Owner, spec: FinetuneJobSpec, runtime: FinetuneRuntimeSpec) -> str:
    """The folder for a job's shards and checkpoints: the same over attempts, and no other job's."""
    short = owner.uid[:8]
    if runtime.storage.work_uri is not None:
        return f"{runtime.storage.work_uri.rstrip('/')}/{owner.namespace}/{owner.name}-{short}"
    return f"{spec.output.uri.rstrip('/')}/.finetune/{short}"
