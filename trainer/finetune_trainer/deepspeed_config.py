"""DeepSpeed's configuration as a pure function of the job's spec."""

from __future__ import annotations

from typing import Any, Final

from finetune_api.job import FinetuneJobSpec

# Values that are sent at once. DeepSpeed's default on GPUs.
_BUCKET_CUDA: Final = 500_000_000
_BUCKET_CPU: Final = 50_000_000


def zero_stage(spec: FinetuneJobSpec, world_size: int) -> int:
    """The ZeRO stage: as given; `auto` shards gradients and optimizer states. (On GPUs `planning` decides `auto`.)

    In bf16 and fp16 so also on one worker, since without ZeRO gradients would add up in that precision.
    """
    if spec.deepspeed.zero_stage == "auto":
        return 0 if world_size == 1 and spec.training.precision == "fp32" else 2
    return spec.deepspeed.zero_stage


def deepspeed_config(
    spec: FinetuneJobSpec, *, world_size: int, accumulation: int, cuda: bool, trained: int | None = None
) -> dict[str, Any]:
    """The dictionary for `deepspeed.initialize`; raw keys of the spec are merged last.

    Only micro-batch and accumulation are set, since the global batch follows from them. Optimizer and learning rate
    are the loop's own.

    Args:
        accumulation: micro-batches of one worker in a global batch.
        trained: parameters that get gradients. The buckets, which DeepSpeed allocates whole, are no larger: for an
            adapter that saves it most of 2 GiB.
    """
    stage = zero_stage(spec, world_size)
    precision = spec.training.precision
    offload = spec.deepspeed.offload
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": cuda and stage > 1}
    bucket = min(_BUCKET_CUDA if cuda else _BUCKET_CPU, trained or _BUCKET_CUDA)
    zero |= {"reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    if offload.optimizer == "cpu" and stage > 0:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": cuda}
    if offload.parameters == "cpu" and stage == 3:
        zero["offload_param"] = {"device": "cpu", "pin_memory": cuda}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": spec.training.micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": spec.training.clipping,
        "bf16": {"enabled": precision == "bf16"},
        "fp16": {"enabled": precision == "fp16"},
        "zero_optimization": zero,
        # torch's AdamW is as fast as DeepSpeed's own on either device, and needs no compiler.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1_000_000_000,
    }
    # Without ZeRO, DeepSpeed accumulates in the model's precision and refuses anything else.
    if stage > 0:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return merged(config, spec.deepspeed.config)


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with `over` put on it, key by key down to the leaves."""
    result = dict(base)
    for key, value in over.items():
        below = result.get(key)
        result[key] = merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return result
