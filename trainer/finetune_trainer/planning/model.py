"""A model as shapes without weights: how many parameters it has, and what a forward and a backward pass of it hold.

It is built from config.json on torch's device "meta", whose tensors have a shape and no memory, with the trainer's own
adapters and loss. So counts are those of the real model whatever its architecture, and a pass over it allocates, in
name, just what the real one allocates: `trace` adds that up.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from finetune_api.errors import ModelError
from finetune_api.job import Dpo, FinetuneJobSpec
from finetune_trainer.batches import MicroBatch
from finetune_trainer.loss import LanguageModelLoss
from finetune_trainer.model import (
    DTYPES,
    add_adapters,
    check_shared_sequence,
    recompute_activations,
    supports_packed_attention,
)
from finetune_trainer.preference import PreferenceLoss
from finetune_trainer.weights import inner_model

Device = Literal["cpu", "cuda"]

_ATTENTION: Final = "planned"
# What models multiply or bound their logits with: then they exist whole (see `loss.LanguageModelLoss.fused`).
_LOGIT_SCALES: Final = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")


@dataclass(frozen=True)
class Sizes:
    """Counts of a model's parameters, tied ones once, adapters included."""

    total: int
    trained: int
    per_value: int  # bytes of one, in the precision of the forward pass
    sizes: tuple[int, ...]  # of each parameter

    @property
    def frozen(self) -> int:
        return self.total - self.trained


@dataclass(frozen=True)
class Pass:
    """Bytes that one micro-batch's forward and backward pass hold, parameters and their gradients apart."""

    saved: int  # for the backward pass, when the loss begins
    peak: int  # at the most, with the loss and the gradients on their way back


def build(folder: Path, spec: FinetuneJobSpec) -> Any:
    """The model that a job trains, on the device "meta": adapters and activation checkpointing are in place.

    Raises:
        ModelError: config.json is missing, or is of no causal language model that transformers knows.
        SpecError: LoRA's target modules are not the model's, or so many workers cannot share its sequences.
    """
    dtype = DTYPES[spec.training.precision]
    with _quiet():
        model = _from_config(folder, dtype)
        if spec.method.tuning == "lora":
            with torch.device("meta"):
                model = add_adapters(model, spec.method.lora)
            # PEFT gives adapters their layer's type only when that layer has weights.
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.to(dtype)
        if spec.training.activation_checkpointing:
            recompute_activations(model, spec.training.recompute_every)
    check_shared_sequence(model, spec.deepspeed.sequence_parallel)
    model.train()
    return model


def _from_config(folder: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError) as error:
        raise ModelError(
            "no model can be made from config.json",
            where=str(folder),
            hint="give a Hugging Face folder of a causal language model that transformers knows",
        ) from error


def sizes(model: nn.Module) -> Sizes:
    """Counts a model's parameters."""
    every = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return Sizes(
        total=sum(n for n, _ in every),
        trained=sum(n for n, trained in every if trained),
        per_value=next(model.parameters()).element_size(),
        sizes=tuple(n for n, _ in every),
    )


def trace(model: Any, tokens: int, device: Device, dpo: Dpo | None = None) -> Pass:
    """What a pass over one document of `tokens` tokens, each of them learned, holds on a device.

    Args:
        dpo: the document is a pair of answers to learn a preference from.

    Raises:
        ModelError: the architecture is not one that trains with packed attention, or its shapes depend on values.
    """
    base = inner_model(model)
    if not supports_packed_attention(model):
        raise _unplanned(base)
    _register_attention(device)
    base.set_attn_implementation(_ATTENTION)
    loss = LanguageModelLoss(model, device) if dpo is None else PreferenceLoss(model, dpo, device)
    config = base.config.get_text_config()
    loss.fused = loss.fused and all(getattr(config, name, None) in (None, 1.0) for name in _LOGIT_SCALES)
    hooks = [p.register_post_accumulate_grad_hook(_drop_gradient) for p in model.parameters() if p.requires_grad]
    allocations = _Allocations([*model.parameters(), *model.buffers()])
    at_loss = [0]
    hooks.append(base.get_decoder().register_forward_hook(lambda *_: at_loss.__setitem__(0, allocations.live)))
    try:
        with _quiet(), allocations:
            loss(_micro_batch(tokens, pairs=dpo is not None)).reshape(-1)[0].backward()
    except (RuntimeError, NotImplementedError, TypeError, ValueError, KeyError) as error:
        raise _unplanned(base) from error
    finally:
        for hook in hooks:
            hook.remove()
    return Pass(saved=at_loss[0], peak=allocations.peak)


def _unplanned(base: nn.Module) -> ModelError:
    return ModelError(
        f"the memory of {type(base).__name__} cannot be planned",
        hint="the job can run; watch the memory that it reports",
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps transformers' and PEFT's warnings, which are for programmers, off the terminal."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(transformers|torch|peft)\b")
        yield


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None  # gradients are another part of the plan


def _micro_batch(tokens: int, pairs: bool) -> MicroBatch:
    def empty(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    return MicroBatch(
        input_ids=empty(1, tokens),
        position_ids=empty(1, tokens),
        boundaries=empty(3 if pairs else 2, dtype=torch.int32),
        longest=tokens,
        predicting=empty(tokens),
        targets=empty(tokens),
        weights=empty(tokens, dtype=torch.float32),
        owners=empty(tokens),
        references=empty(2 if pairs else 0, dtype=torch.float32),
        lengths=np.array([tokens]),
    )


class _Allocations(TorchDispatchMode):
    """Adds up the memory of tensors that are made inside, and takes it off when nothing refers to it any more."""

    def __init__(self, before: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        self._known: dict[int, object] = {tensor.untyped_storage()._cdata: tensor for tensor in before}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._note(value.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self.live += size
        self.peak = max(self.peak, self.live)
        self._known[key] = weakref.ref(storage, self._forget(key, size))

    def _forget(self, key: int, size: int) -> Callable[[object], None]:
        def freed(_: object) -> None:
            del self._known[key]
            self.live -= size

        return freed


class _FlashAttention(torch.autograd.Function):
    """What flash attention keeps: its inputs, its output, and a float32 for each query and head."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out, torch.empty_like(query[..., 0], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _register_attention(device: Device) -> None:
    """Stands in for `attention.packed_attention`, whose kernels look at where documents end."""
    from transformers import AttentionInterface

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **_: object
    ) -> tuple[Tensor, None]:
        if device == "cuda":
            return _FlashAttention.apply(query, key, value).transpose(1, 2), None
        groups = query.shape[1] // key.shape[1]
        dtype = query.dtype
        query, key, value = query.float(), key.float(), value.float()
        if groups > 1:
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        return torch.cat([_FlashAttention.apply(query, key, value)], 2).transpose(1, 2).to(dtype), None

    AttentionInterface.register(_ATTENTION, attend)
