"""DeepSpeed's engine around the loss: the only module that imports DeepSpeed."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
import torch

from finetune_api.errors import SpecError
from finetune_api.job import FinetuneJobSpec, Training
from finetune_trainer.batches import collate
from finetune_trainer.dataset import PackedSequence
from finetune_trainer.deepspeed_config import deepspeed_config
from finetune_trainer.distributed import World
from finetune_trainer.loss import LanguageModelLoss
from finetune_trainer.model import full_shape, load_model, optimizer_groups
from finetune_trainer.planning import planned_stage
from finetune_trainer.preference import PreferenceLoss
from finetune_trainer.weights import on_rank_0

_LOGITS_ERROR: Final = 2**-6  # a unit in bfloat16's last place or two; scaled or bounded logits differ by far more


def build_engine(model_path: str, spec: FinetuneJobSpec, world: World, accumulation: int) -> Any:
    """Loads the model and wraps it: `engine(micro_batch)` gives the loss, or sums of which it is the first, and
    `engine.module.model` is the model itself.

    Args:
        accumulation: micro-batches of one worker in each optimizer step.

    Raises:
        ModelError: the model does not load.
        SpecError: LoRA's target modules are not the model's, or float16 is asked for on a CPU.
    """
    if spec.training.precision == "fp16" and world.device.type == "cpu":
        raise SpecError("fp16 needs a GPU", where="spec.training.precision", hint="use bf16 or fp32 on CPUs")
    _silence()
    if spec.deepspeed.zero_stage == "auto" and world.device.type == "cuda":
        memory = torch.cuda.get_device_properties(world.device).total_memory
        stage = on_rank_0(world, lambda: planned_stage(model_path, spec, world.size, memory))
        spec = spec.model_copy(update={"deepspeed": spec.deepspeed.model_copy(update={"zero_stage": stage})})
    deepspeed = _import_deepspeed(world)
    cuda = world.device.type == "cuda"
    config = deepspeed_config(spec, world_size=world.size, accumulation=accumulation, cuda=cuda)
    stage = config["zero_optimization"]["stage"]
    model = load_model(model_path, spec, config)
    loss = PreferenceLoss(model, spec.method.dpo) if spec.method.objective == "dpo" else LanguageModelLoss(model)
    if loss.output is not None and stage == 3:
        for parameter in loss.output.linear.parameters(recurse=False):
            deepspeed.zero.register_external_parameter(loss.output, parameter)
    groups = optimizer_groups(loss, spec.training.weight_decay)
    trained = sum(full_shape(p).numel() for group in groups for p in group["params"])
    config = deepspeed_config(spec, world_size=world.size, accumulation=accumulation, cuda=cuda, trained=trained)
    engine, *_ = deepspeed.initialize(
        model=loss, model_parameters=groups, optimizer=_adamw(groups, spec.training), config=config
    )
    if stage == 0 and engine.optimizer is not engine.basic_optimizer:
        # The wrapper made its states by a step without gradients, which AdamW's bias correction counts.
        engine.basic_optimizer.state.clear()
    if loss.output is not None:
        loss.fused = _logits_are_the_output_layers(engine, world)
    return engine


@torch.no_grad()
def _logits_are_the_output_layers(engine: Any, world: World) -> bool:
    engine.eval()
    ids = np.arange(3, 35, dtype=np.int32)
    batch = collate([PackedSequence(ids, np.ones(32, np.float32), np.array([12, 20], np.int32))])
    return float(engine(batch.to(world.device), logits_error=True)) < _LOGITS_ERROR


def set_learning_rate(engine: Any, rate: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = rate


def optimizer_step(engine: Any) -> float:
    """Ends a global batch: clips, updates, clears the gradients. Returns their norm before clipping."""
    norm = None
    if engine.optimizer is engine.basic_optimizer:  # float32 without ZeRO: DeepSpeed keeps no norm
        norm = float(torch.nn.utils.get_total_norm(p.grad for p in engine.module.parameters() if p.grad is not None))
    engine.step()
    return float(engine.get_global_grad_norm()) if norm is None else norm


def _adamw(groups: list[dict[str, Any]], training: Training) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        groups,
        lr=0.0,  # the loop sets it, step by step
        betas=(training.beta1, training.beta2),
        eps=training.epsilon,
        fused=True,
    )


def _silence() -> None:
    """Keeps the libraries' warnings and progress bars off the terminal: what matters to users is an error or event."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module=r"(transformers|torch|deepspeed|peft)\b")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


def _import_deepspeed(world: World) -> Any:
    if world.device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # without it DeepSpeed looks for a GPU, and may find its driver
    with _hidden("mlflow"):
        import deepspeed
        import deepspeed.ops
    with _without_compiler():
        import deepspeed.runtime.zero.muon.muon_optimizer
    # A shared-memory all-reduce that only its inference uses: compiling it would need a compiler, half a minute, and
    # leave a lock behind when it is interrupted.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


@contextmanager
def _without_compiler() -> Iterator[None]:
    """Makes torch.compile leave functions as they are.

    DeepSpeed's engine imports its Muon optimizer, whose functions are compiled ones: 45 MiB of the compiler's modules
    in every worker, though the optimizer is ours.
    """
    before = os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    try:
        yield
    finally:
        del os.environ["TORCHDYNAMO_DISABLE"]
        if before is not None:
            os.environ["TORCHDYNAMO_DISABLE"] = before


@contextmanager
def _hidden(module: str) -> Iterator[None]:
    """Makes a module that is not imported yet look as if it were not installed.

    DeepSpeed's autotuner, which nothing here calls, imports MLflow where it finds it: 86 MiB in every worker.
    """
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[module]
