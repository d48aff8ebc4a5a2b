"""The plan of a job: memory, time and cost, worked out from its spec and its model's config.json alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_api.errors import ModelError, SpecError
from finetune_api.job import FinetuneJobSpec
from finetune_api.run import Device
from finetune_api.status import Plan
from finetune_trainer.deepspeed_config import zero_stage
from finetune_trainer.manifest import Manifest
from finetune_trainer.planning import duration
from finetune_trainer.planning.choose import Change, Fit, Planner, usable, world_size
from finetune_trainer.planning.duration import Speed
from finetune_trainer.planning.model import Sizes, build, sizes
from finetune_trainer.sampling import batch_sequences, order

PLAN_FILE = "plan.json"  # in the prepared folder
_GIB = 2**30


@dataclass(frozen=True)
class JobPlan:
    """What a job needs. Figures that depend on facts nobody gave are None."""

    spec: FinetuneJobSpec
    sizes: Sizes
    processes: int
    device: Device
    fit: Fit | None  # None: the architecture's memory cannot be planned
    larger_micro_batch: int | None
    remedy: list[Change]  # when it does not fit
    speed: Speed | None
    manifest: Manifest | None  # None: the rows are not prepared yet

    @property
    def fits(self) -> bool:
        return self.fit is None or self.fit.fits

    @property
    def steps(self) -> int | None:
        """Optimizer steps of the run. Without a manifest only `maxSteps` alone tells."""
        training = self.spec.training
        if self.manifest is None:
            return training.max_steps if training.epochs is None else None
        return order(training, self.manifest.splits.train.sequences, self.manifest.sequence_length).steps

    @property
    def tokens(self) -> int | None:
        """Tokens of the run; without a manifest sequences count as full."""
        training, length = self.spec.training, self.spec.data.sequence_length
        if self.manifest is not None:
            train = self.manifest.splits.train
            return round(order(training, train.sequences, length).samples * train.tokens / train.sequences)
        return None if self.steps is None else self.steps * batch_sequences(training, length) * length

    @property
    def seconds(self) -> float | None:
        """Time of training, without start, evaluation and export."""
        if self.speed is None or self.tokens is None:
            return None
        return self.speed.seconds(self.tokens + self._reference_tokens)

    @property
    def _reference_tokens(self) -> float:
        """With objective dpo, tokens' worth of the forward pass over all pairs that finds their references."""
        if self.spec.method.objective != "dpo" or self.manifest is None:
            return 0.0
        # Of 6 operations a weight 2 are the forward pass's, of 4 where it is frozen.
        return self.manifest.splits.train.tokens * (1 / 3 if self.spec.method.tuning == "full" else 1 / 2)

    def cost(self, seconds: float | None) -> float | None:
        """What the GPUs cost for so long, in the device's currency."""
        price = self.device.price_per_hour
        return None if seconds is None or price is None else price * self.processes * seconds / 3600

    def status(self) -> Plan:
        """The plan as the operator shows it."""
        train = self.manifest.splits.train if self.manifest else None
        gpus = self.spec.workers.gpus_each > 0
        return Plan(
            total_steps=self.steps,
            sequences=train.sequences if train else None,
            tokens=train.tokens if train else None,
            target_tokens=round(train.target_tokens) if train else None,
            zero_stage=self.fit.stage if self.fit else None,
            gpu_memory_bytes=self.fit.memory.peak if self.fit and gpus else None,
            seconds=self.seconds,
            cost=self.cost(self.seconds),
        )

    def as_json(self) -> dict[str, Any]:
        """Everything, for programs: the fields of `status.plan`, and what they come from."""
        memory = self.fit.memory if self.fit else None
        return self.status().model_dump(mode="json", exclude_none=True) | {
            "fits": self.fits,
            "processes": self.processes,
            "parameters": self.sizes.total,
            "trainableParameters": self.sizes.trained,
            "memoryBytes": memory.parts() | {"peak": memory.peak} if memory else None,
            "hostMemoryBytes": memory.host if memory else None,
            "usableMemoryBytes": None if self.device.memory_bytes is None else usable(self.device.memory_bytes),
            "largerMicroBatch": self.larger_micro_batch,
            "changes": {change.field: change.value for change in self.remedy},
            "tokensPerSecond": self.speed.tokens_per_second if self.speed else None,
            "mfu": self.speed.mfu if self.speed else None,
            "currency": self.device.currency,
        }

    def refusal(self) -> SpecError:
        """Why the job must not take a GPU, and what to change."""
        assert self.fit is not None
        assert self.device.memory_bytes is not None
        need, have = self.fit.memory.peak / _GIB, usable(self.device.memory_bytes) / _GIB
        hint = "no setting makes it fit: use GPUs with more memory, or a smaller model"
        if self.remedy:
            hint = f"it fits with {' and '.join(map(str, self.remedy))}"
        return SpecError(
            f"the job needs {need:.1f} GiB on each GPU at ZeRO stage {self.fit.stage}, and {have:.1f} GiB of "
            f"{self.device.memory_bytes / _GIB:.1f} GiB are usable",
            where="spec",
            hint=hint,
        )


def plan(spec: FinetuneJobSpec, folder: Path, device: Device, manifest: Manifest | None = None) -> JobPlan:
    """Plans a job; of the model's `folder` only config.json is read.

    Args:
        device: the workers' GPU; what is not known of it stays open in the plan.
        manifest: of the prepared rows, if there are any yet.

    Raises:
        ModelError: config.json is missing, or is of no causal language model that transformers knows.
        SpecError: LoRA's target modules are not the model's.
    """
    model = build(folder, spec)
    gpus = spec.workers.gpus_each > 0
    planner = Planner(folder, "cuda" if gpus else "cpu", device.memory_bytes if gpus else None)
    try:
        fit = planner.fit(spec)
    except ModelError:
        fit = None
    processes = world_size(spec)
    peak = duration.peak_of(device.product) if gpus and device.product else None
    return JobPlan(
        spec=spec,
        sizes=sizes(model),
        processes=processes,
        device=device,
        fit=fit,
        larger_micro_batch=planner.larger_micro_batch(fit) if fit else None,
        remedy=[] if fit is None or fit.fits else planner.remedy(spec),
        speed=None if peak is None else duration.speed(model, spec, world_size=processes, peak=peak),
        manifest=manifest,
    )


def planned_stage(model_path: str, spec: FinetuneJobSpec, processes: int, device_memory: int) -> int:
    """The ZeRO stage for `auto` on GPUs of that many bytes: the first that fits, or else the last.

    Raises:
        SpecError: LoRA's target modules are not the model's.
    """
    if processes == 1:
        return zero_stage(spec, 1)
    try:
        return Planner(Path(model_path), "cuda", device_memory).fit(spec, processes).stage
    except ModelError:
        return zero_stage(spec, processes)
