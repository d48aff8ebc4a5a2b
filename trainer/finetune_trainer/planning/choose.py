"""Whether a job fits its GPUs: the ZeRO stage for `auto`, a larger micro-batch, and what to change when it does not.

All of it tries settings and asks `memory`. A model is built and followed once for each setting that its passes depend
on, which takes a second or so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from finetune_api.job import FinetuneJobSpec
from finetune_trainer.deepspeed_config import merged, zero_stage
from finetune_trainer.model import sequence_shares
from finetune_trainer.planning.memory import Memory, memory
from finetune_trainer.planning.model import Device, Pass, Sizes, build, sizes, trace
from finetune_trainer.sampling import batch_sequences

# Not the tensors': CUDA's context, NCCL's buffers, and room that the allocator's pieces leave between them.
_CONTEXT: Final = 1 << 30
_FRAGMENTS: Final = 0.06
_MULTIPLE: Final = 32  # rows are filled up to it (`batches`)
_SHORTEST: Final = 512  # a shorter sequence is not advised
_MOST_GPUS: Final = 64  # nor are more GPUs


@dataclass(frozen=True)
class Fit:
    """What a job needs of each device, at a ZeRO stage."""

    spec: FinetuneJobSpec
    stage: int
    memory: Memory
    fits: bool  # also when the device's memory is not known


@dataclass(frozen=True)
class Change:
    """A setting to change: its field, and the value to give it."""

    field: str
    value: str

    def __str__(self) -> str:
        return f"{self.field}: {self.value}"


def usable(device_memory: int) -> int:
    """Bytes of a GPU's memory that tensors can have."""
    return int(device_memory * (1 - _FRAGMENTS)) - _CONTEXT


def world_size(spec: FinetuneJobSpec) -> int:
    """Processes that train."""
    return spec.workers.count * max(1, spec.workers.gpus_each)


def stages(spec: FinetuneJobSpec, processes: int) -> list[int]:
    """ZeRO stages that may be used, the one that costs the least time first.

    Stage 1 sends as much as no ZeRO at all; 2 reduces gradients after every micro-batch; 3 also gathers parameters in
    every pass. Without ZeRO gradients would add up in bf16 or fp16.
    """
    if spec.deepspeed.zero_stage != "auto":
        return [spec.deepspeed.zero_stage]
    if processes == 1:
        return [zero_stage(spec, 1)]
    return [1, 2, 3]


class Planner:
    """Plans for the model in a folder, of which only config.json is read.

    Args:
        device: the kind of the workers' devices.
        device_memory: bytes of one of them; None: every job fits.
    """

    def __init__(self, folder: Path, device: Device, device_memory: int | None) -> None:
        self._folder = folder
        self._device = device
        self._device_memory = device_memory
        self._followed: dict[object, tuple[Sizes, Pass]] = {}

    def fit(self, spec: FinetuneJobSpec, processes: int | None = None) -> Fit:
        """What `spec` needs: at the first stage that fits, or at the last one.

        Raises:
            ModelError: config.json is not of a model whose memory can be planned.
            SpecError: LoRA's target modules are not the model's.
        """
        processes = processes or world_size(spec)
        counted, held = self._follow(spec)
        tried = [
            (stage, memory(counted, held, spec, stage=stage, world_size=processes, cuda=self._device == "cuda"))
            for stage in stages(spec, processes)
        ]
        stage, needed = next((each for each in tried if self._holds(each[1])), tried[-1])
        return Fit(spec, stage, needed, self._holds(needed))

    def larger_micro_batch(self, fit: Fit) -> int | None:
        """The largest micro-batch that fits at the same stage, when that is more than the job's; powers of 2 times it,
        and no more than a worker's share of the global batch."""
        spec = fit.spec
        shares = world_size(spec) // spec.deepspeed.sequence_parallel
        most = batch_sequences(spec.training, spec.data.sequence_length) // shares
        found, size = None, spec.training.micro_batch * 2
        while self._device_memory is not None and fit.fits and size <= most:
            larger = self.fit(_with(spec, training={"microBatch": size}, deepspeed={"zeroStage": fit.stage}))
            if not larger.fits:
                break
            found, size = size, size * 2
        return found

    def remedy(self, spec: FinetuneJobSpec) -> list[Change]:
        """The fewest settings, those that cost the least first, that make the job fit; empty when none do."""
        changes: list[tuple[Change, Callable[[FinetuneJobSpec], FinetuneJobSpec]]] = []
        for step in _steps(spec, sequence_shares(build(self._folder, spec))):
            # A later value of a field takes the place of an earlier one.
            changes = [each for each in changes if each[0].field != step[0].field] + [step]
            if self.fit(_apply(spec, changes)).fits:
                break
        else:
            return []
        for change in list(changes[:-1]):
            without = [each for each in changes if each is not change]
            if self.fit(_apply(spec, without)).fits:
                changes = without
        return [change for change, _ in changes]

    def _holds(self, needed: Memory) -> bool:
        return self._device_memory is None or needed.peak <= usable(self._device_memory)

    def _follow(self, spec: FinetuneJobSpec) -> tuple[Sizes, Pass]:
        training, method = spec.training, spec.method
        shared = spec.deepspeed.sequence_parallel
        tokens = -(-training.micro_batch * spec.data.sequence_length // (shared * _MULTIPLE)) * _MULTIPLE
        lora = method.lora.model_dump_json() if method.tuning == "lora" else None
        dpo = method.dpo if method.objective == "dpo" else None
        recomputed = training.activation_checkpointing and training.recompute_every
        key = (tokens, shared, lora, training.precision, recomputed, dpo is None)
        if key not in self._followed:
            model = build(self._folder, spec)
            self._followed[key] = sizes(model), trace(model, tokens, self._device, dpo)
        return self._followed[key]


_Step = tuple[Change, Callable[[FinetuneJobSpec], FinetuneJobSpec]]


def _steps(spec: FinetuneJobSpec, shares: list[int]) -> Iterator[_Step]:
    """Settings that save memory and that the job does not have yet, in the order to try them.

    Args:
        shares: numbers of workers that can share one of the model's sequences.
    """
    training, deepspeed = spec.training, spec.deepspeed
    if training.micro_batch > 1:
        yield _step("training.microBatch", 1)
    if world_size(spec) > 1 and deepspeed.zero_stage in (0, 1):
        yield _step("deepspeed.zeroStage", 2)
    if not training.activation_checkpointing:
        yield _step("training.activationCheckpointing", True)
    elif training.recompute_every > 1:
        yield _step("training.recomputeEvery", 1)
    if world_size(spec) > 1 and deepspeed.zero_stage in (0, 1, 2):
        yield _step("deepspeed.zeroStage", 3)
    if deepspeed.offload.optimizer == "none":
        if world_size(spec) == 1 and deepspeed.zero_stage == 0:
            yield _step("deepspeed.zeroStage", 2)
        yield _step("deepspeed.offload.optimizer", "cpu")
    shorter = length = spec.data.sequence_length
    yield from _shared_sequences(spec, shares)
    while (shorter := shorter // 2) >= _SHORTEST:
        yield _step("data.sequenceLength", shorter)
    if deepspeed.zero_stage != "auto":
        yield _step("deepspeed.zeroStage", 3)
    count, most = spec.workers.count, min(_MOST_GPUS, batch_sequences(spec.training, length))
    while (count := count * 2) * max(1, spec.workers.gpus_each) <= most:
        yield _step("workers.count", count)
    if spec.method.tuning == "full":
        yield _step("method.tuning", "lora")


def _shared_sequences(spec: FinetuneJobSpec, shares: list[int]) -> Iterator[_Step]:
    for workers in shares:  # among the GPUs of one pod, which are near one another
        possible = spec.workers.gpus_each % workers == spec.data.sequence_length % workers == 0
        if possible and workers > spec.deepspeed.sequence_parallel:
            yield _step("deepspeed.sequenceParallel", workers)


def _step(field: str, value: Any) -> _Step:
    change: Any = value
    for part in reversed(field.split(".")):
        change = {part: change}
    shown = str(value).lower() if isinstance(value, bool) else str(value)
    return Change(field, shown), lambda spec: _with(spec, **change)


def _apply(spec: FinetuneJobSpec, changes: list[_Step]) -> FinetuneJobSpec:
    for _, change in changes:
        spec = change(spec)
    return spec


def _with(spec: FinetuneJobSpec, **changes: Any) -> FinetuneJobSpec:
    return FinetuneJobSpec.model_validate(merged(spec.model_dump(mode="json", by_alias=True), changes))
