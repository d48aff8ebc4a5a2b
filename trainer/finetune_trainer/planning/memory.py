"""Memory of one worker by part: what DeepSpeed keeps at each ZeRO stage, around the passes that `model.trace` follows.

The terms are those of the ZeRO paper (https://arxiv.org/abs/1910.02054, section 3) for AdamW: a float32 copy of each
trained parameter and two float32 moments. What DeepSpeed 0.19 holds beside them was read in its source and measured:
`tests/trainer/test_plan_memory.py` compares every stage with the live tensors of real runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from finetune_api.job import FinetuneJobSpec
from finetune_trainer.deepspeed_config import deepspeed_config
from finetune_trainer.planning.model import Pass, Sizes

_MOMENTS: Final = 8
_MASTER: Final = 4
_FLOAT32: Final = 4
_FLOAT64: Final = 8
_REDUCED_AT_ONCE: Final = 500_000_000  # gradients that DeepSpeed flattens for one all-reduce without ZeRO 2 or 3
# DeepSpeed's defaults (runtime/zero/config.py).
_LIVE: Final = 1_000_000_000
_PREFETCH: Final = 50_000_000
_PERSISTENT: Final = 100_000


@dataclass(frozen=True)
class Memory:
    """Bytes of one worker's device at the peak, by part, and of host memory that its offload takes."""

    parameters: int
    gradients: int
    optimizer: int  # float32 copies of the trained parameters, and AdamW's moments
    activations: int  # kept for the backward pass
    loss: int  # the loss, and gradients of activations on their way back
    buffers: int  # to reduce gradients and to gather parameters
    update: int  # what the optimizer's step takes beyond the room that activations leave
    host: int

    @property
    def peak(self) -> int:
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """Parts of the device's memory; they add up to the peak."""
        return {name: value for name, value in vars(self).items() if name != "host"}


def memory(sizes: Sizes, held: Pass, spec: FinetuneJobSpec, *, stage: int, world_size: int, cuda: bool) -> Memory:
    """Memory of each of `world_size` workers at a ZeRO stage, for more than one micro-batch a step.

    With a single micro-batch it is less by up to the gradients.
    """
    zero = _zero(spec, stage, world_size, cuda, sizes.trained)
    value, trained, share = sizes.per_value, sizes.trained, _share(sizes.trained, world_size)
    optimizer_offloaded = stage > 0 and spec.deepspeed.offload.optimizer == "cpu"
    parameters_offloaded = stage == 3 and spec.deepspeed.offload.parameters == "cpu"
    gradients, at_step = _gradients(sizes, spec.training.precision, stage, world_size, optimizer_offloaded)
    optimizer = _optimizer(sizes, stage, share)
    parameters = _parameters(sizes, zero, stage, world_size)
    activations = held.peak
    host = 0
    if optimizer_offloaded:
        # Beside the states: float32 gradients, and a copy of gradients and of updated parameters on their way.
        host += optimizer + (_FLOAT32 + 2 * value) * share
        optimizer = 0
    if parameters_offloaded:
        host += parameters
        parameters = 0
    return Memory(
        parameters=parameters,
        gradients=gradients,
        optimizer=optimizer,
        activations=held.saved,
        loss=activations - held.saved,
        buffers=_buffers(sizes, spec.training.precision, zero, stage, world_size, optimizer_offloaded),
        update=max(0, (at_step if trained else 0) - activations),
        host=host,
    )


def _zero(spec: FinetuneJobSpec, stage: int, world_size: int, cuda: bool, trained: int) -> dict[str, Any]:
    """DeepSpeed's settings as the trainer will give them, raw keys included."""
    fixed = spec.model_copy(update={"deepspeed": spec.deepspeed.model_copy(update={"zero_stage": stage})})
    settings: dict[str, Any] = deepspeed_config(
        fixed, world_size=world_size, accumulation=2, cuda=cuda, trained=trained
    )["zero_optimization"]
    return settings


def _share(count: int, world_size: int) -> int:
    return -(-count // world_size)


def _parameters(sizes: Sizes, zero: dict[str, Any], stage: int, world_size: int) -> int:
    if stage < 3:
        return sizes.per_value * sizes.total
    persistent = sum(n for n in sizes.sizes if n <= zero.get("stage3_param_persistence_threshold", _PERSISTENT))
    return sizes.per_value * (_share(sizes.total - persistent, world_size) + persistent)


def _optimizer(sizes: Sizes, stage: int, share: int) -> int:
    if stage > 0:
        return (_MASTER + _MOMENTS) * share
    # Without ZeRO, float32 parameters are their own masters.
    return (_MOMENTS + (_MASTER if sizes.per_value < _FLOAT32 else 0)) * sizes.trained


def _gradients(sizes: Sizes, precision: str, stage: int, world_size: int, offloaded: bool) -> tuple[int, int]:
    """Gradients that are kept while micro-batches go on, and what the update needs in addition to them."""
    trained, share = sizes.trained, _share(sizes.trained, world_size)
    at_once = min(trained, _REDUCED_AT_ONCE)
    # The norm is taken in float64, a parameter at a time.
    norm = _FLOAT64 * min(max(sizes.sizes), share)
    low = sizes.per_value < _FLOAT32
    if stage == 0:
        return sizes.per_value * trained, (_FLOAT32 * trained if low else _FLOAT32 * at_once)
    if stage == 1:
        if precision == "bf16" and not offloaded:  # DeepSpeed's BF16_Optimizer keeps both, and reduces copies of both
            return (_FLOAT32 + sizes.per_value) * trained, (_FLOAT32 + sizes.per_value) * at_once
        return _FLOAT32 * trained, max(_FLOAT32 * share, norm)
    if offloaded:
        return 0, norm
    if stage == 2:
        # In float32 new gradients lie beside those that are added up.
        return (_FLOAT32 if low else 2 * _FLOAT32) * share, norm
    return _FLOAT32 * share, max(_FLOAT32 * share, norm)


def _buffers(sizes: Sizes, precision: str, zero: dict[str, Any], stage: int, world_size: int, offloaded: bool) -> int:
    if stage == 0 or (stage == 1 and precision == "bf16" and not offloaded):
        return 0
    bucket = zero["reduce_bucket_size"] * (_FLOAT32 if stage == 1 else sizes.per_value)
    if stage < 3:
        both = bucket * (2 if zero.get("overlap_comm") else 1)
        return int(both) + (sizes.per_value * max(sizes.sizes) if offloaded else 0)
    gathered = 0
    if world_size > 1 or zero.get("offload_param"):
        # Parameters stay while they will be used again within this many others, or as long as there is room. Those that
        # are gathered ahead lie twice: as they came from the workers, and put together.
        live = max(zero.get("stage3_max_live_parameters", _LIVE), zero.get("stage3_max_reuse_distance", _LIVE))
        gathered = sum(min(sizes.total, most) for most in (live, zero.get("stage3_prefetch_bucket_size", _PREFETCH)))
    return int(bucket + sizes.per_value * gathered)
