"""Raw DeepSpeed keys that `spec.deepspeed.config` must not hold, and why.

Some were removed from DeepSpeed and raise when the engine starts (runtime/config.py, `_REMOVED_TOP_LEVEL_CONFIG_KEYS`);
some would contradict a field of the job, which is then the one place to say it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal


@dataclass(frozen=True)
class RefusedKey:
    """A dotted key, the type its value usually has, why it is refused, and what to do."""

    key: str
    type: Literal["object", "boolean", "number", "string"]
    why: str
    do: str


_GONE: Final = "was removed from DeepSpeed"
_OURS: Final = "is worked out from the job's own fields"

REFUSED_KEYS: Final = (
    RefusedKey("elasticity", "object", _GONE, "set workers.min instead"),
    RefusedKey("nebula", "object", _GONE, "checkpoints go to object storage without it"),
    RefusedKey("amp", "object", _GONE, "set training.precision instead"),
    RefusedKey("compression_training", "object", _GONE, "remove it"),
    RefusedKey("quantize_training", "object", _GONE, "remove it"),
    RefusedKey("eigenvalue", "object", _GONE, "remove it"),
    RefusedKey("sparse_attention", "object", _GONE, "remove it"),
    RefusedKey("sparse_gradients", "boolean", _GONE, "remove it"),
    RefusedKey("graph_harvesting", "boolean", _GONE, "remove it"),
    RefusedKey("curriculum_learning", "object", _GONE, "remove it"),
    RefusedKey("progressive_layer_drop", "object", _GONE, "remove it"),
    RefusedKey("zero_optimization.mics_shard_size", "number", _GONE, "remove it"),
    RefusedKey("zero_optimization.mics_hierarchical_params_gather", "boolean", _GONE, "remove it"),
    RefusedKey("zero_optimization.zeropp_loco_param", "object", _GONE, "remove it"),
    RefusedKey("checkpoint.writer", "object", "writes checkpoints that cannot be loaded again", "remove it"),
    RefusedKey("checkpoint.load_universal", "boolean", "is set when the number of workers changed", "remove it"),
    RefusedKey("train_batch_size", "number", _OURS, "set training.tokensPerBatch or sequencesPerBatch"),
    RefusedKey("train_micro_batch_size_per_gpu", "number", _OURS, "set training.microBatch"),
    RefusedKey("gradient_accumulation_steps", "number", _OURS, "set training.tokensPerBatch or sequencesPerBatch"),
    RefusedKey("gradient_clipping", "number", _OURS, "set training.clipping"),
    RefusedKey("optimizer", "object", _OURS, "set training.learningRate, weightDecay, beta1, beta2 and epsilon"),
    RefusedKey("scheduler", "object", _OURS, "set training.schedule and warmup"),
    RefusedKey("bf16.enabled", "boolean", _OURS, "set training.precision"),
    RefusedKey("fp16.enabled", "boolean", _OURS, "set training.precision"),
    RefusedKey("torch_autocast", "object", _OURS, "set training.precision"),
    RefusedKey("zero_optimization.stage", "number", _OURS, "set deepspeed.zeroStage"),
    RefusedKey("zero_optimization.offload_optimizer.device", "string", _OURS, "set deepspeed.offload.optimizer"),
    RefusedKey("zero_optimization.offload_param.device", "string", _OURS, "set deepspeed.offload.parameters"),
    RefusedKey("sequence_parallel_size", "number", _OURS, "set deepspeed.sequenceParallel"),
    RefusedKey("data_efficiency", "object", "would change the order of rows, which a restart relies on", "remove it"),
    RefusedKey("tensor_parallel", "object", "is not supported", "use ZeRO 3 or deepspeed.sequenceParallel"),
)
