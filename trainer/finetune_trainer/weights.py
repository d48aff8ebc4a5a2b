"""Streams a model's weights to safetensors, also out of ZeRO-3's partitions and with LoRA merged in.

The layout is the one that `save_pretrained` writes. At most one shard is in memory at a time, on rank 0 only.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeAlias, TypeVar, cast

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from typing_extensions import TypeIs

from finetune_api.errors import ExportError
from finetune_trainer.distributed import World

SHARD_BYTES: Final = 2 * 1024**3
ADAPTER: Final = "default"  # PEFT's name of the only adapter

if TYPE_CHECKING:  # 35 MiB in each process, which full tuning has no use for
    from peft import PeftModel
    from peft.tuners import lora

T = TypeVar("T")
Mergeable: TypeAlias = "lora.Linear | lora.Embedding"


@dataclass(frozen=True)
class Weight:
    """A tensor of the model that is written, before its name and shape go back to the checkpoint's own layout.

    `layer` is the LoRA layer whose delta belongs onto it, if there is one.
    """

    name: str
    tensor: torch.Tensor
    layer: Mergeable | None = None

    @property
    def parts(self) -> list[torch.Tensor]:
        """The tensors that must be whole on rank 0 to compute the value."""
        return [self.tensor, *(_factors(self.layer) if self.layer else ())]

    @property
    def shape(self) -> torch.Size:
        return cast(torch.Size, getattr(self.tensor, "ds_shape", self.tensor.shape))

    def value(self, parts: list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """What is written, from whole copies of `parts`; the sum with a delta is taken in fp32 and rounded once."""
        if self.layer is None:
            return _cast(parts[0], dtype)
        weight, a, b = (part.float() for part in parts)
        turned = _is_embedding(self.layer) or self.layer.fan_in_fan_out  # stored as (in, out)
        delta = (b @ a).T if turned else b @ a
        return _cast(weight + delta * self.layer.scaling[ADAPTER], dtype)


def write_model(model: PreTrainedModel | PeftModel, folder: Path, dtype: torch.dtype, world: World) -> None:
    """Writes all weights, with an adapter merged in, as `model.safetensors` or as shards with an index.

    Collective: every rank calls it. Shards hold up to 2 GiB, or one larger tensor. Tied weights are written once.
    """
    inner = inner_model(model)
    shards = list(_shards(inner, dtype))
    index: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        copies: list[list[torch.Tensor]] = []
        for weight in shard:
            with gathered(weight.parts):
                if world.rank == 0:
                    copies.append([part.detach().to("cpu", copy=True) for part in weight.parts])
        written = on_rank_0(world, lambda: _write_shard(inner, shard, copies, dtype, folder / name))  # noqa: B023
        index |= dict.fromkeys(written, name)
        total += sum(written.values())
    if len(shards) > 1 and world.rank == 0:
        content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(content, indent=2) + "\n")


def _write_shard(
    model: PreTrainedModel, shard: list[Weight], copies: list[list[torch.Tensor]], dtype: torch.dtype, file: Path
) -> dict[str, int]:
    """Writes one file; its tensors' names and sizes in bytes."""
    tensors: dict[str, torch.Tensor] = {}
    for weight in shard:
        tensors |= _original(model, weight.name, weight.value(copies.pop(0), dtype))
    save_file(tensors, file, metadata={"format": "pt"})
    return {name: _bytes([tensor]) for name, tensor in tensors.items()}


def write_adapter(model: PeftModel, folder: Path, dtype: torch.dtype, world: World) -> None:
    """Writes `adapter_model.safetensors`. Collective; one parameter is gathered at a time."""
    from peft import get_peft_model_state_dict

    state: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        if not _is_adapter(name):
            continue
        with gathered([parameter]):
            if world.rank == 0:
                state[name] = parameter.detach().to("cpu", dtype, copy=True)

    def save() -> None:
        tensors = get_peft_model_state_dict(model, state_dict=state, adapter_name=ADAPTER, save_embedding_layers=False)
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})

    on_rank_0(world, save)


def inner_model(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The transformers model itself, with LoRA layers in it when there is an adapter."""
    base = getattr(model, "get_base_model", None)  # PEFT's wrapper has it
    return cast("PreTrainedModel", base() if base else model)


def gathered(tensors: Iterable[torch.Tensor]) -> AbstractContextManager[None]:
    """Makes parameters that ZeRO-3 has partitioned whole within the context; collective when there are any."""
    partitioned = [t for t in tensors if hasattr(t, "ds_id")]
    if not partitioned:
        return nullcontext()
    import deepspeed

    return cast(AbstractContextManager[None], deepspeed.zero.GatheredParameters(partitioned))


def on_rank_0(world: World, action: Callable[[], T]) -> T:
    """Runs `action` on rank 0 and gives its value, or raises its error, on every rank: nobody waits for ever."""
    outcome: tuple[T | None, Exception | None] = (None, None)
    if world.rank == 0:
        try:
            outcome = (action(), None)
        except Exception as error:
            outcome = (None, error)
    value, failure = world.from_first(outcome)
    if failure is not None:
        raise failure
    return cast(T, value)


def _shards(model: PreTrainedModel, dtype: torch.dtype) -> Iterator[list[Weight]]:
    """Weights in the model's order, cut where the next would exceed a shard. Equal on all ranks: shapes decide."""
    shard: list[Weight] = []
    size = 0
    for weight in _weights(model):
        meta = _cast(torch.empty(weight.shape, dtype=weight.tensor.dtype, device="meta"), dtype)
        new = _bytes(_original(model, weight.name, meta).values())
        if shard and size + new > SHARD_BYTES:
            yield shard
            shard, size = [], 0
        shard.append(weight)
        size += new
    yield shard


def _weights(model: PreTrainedModel) -> Iterator[Weight]:
    """Parameters, tied ones once, and the buffers that belong into a checkpoint; none of the adapter's own."""
    for name, parameter in model.named_parameters():
        if _is_adapter(name):
            continue
        owner = model.get_submodule(name.rpartition(".base_layer.")[0]) if ".base_layer." in name else None
        layer = owner if name.endswith(".base_layer.weight") else None
        if layer is not None and not _is_mergeable(layer):
            raise ExportError(
                f"a {type(layer).__name__} with an adapter cannot be merged",
                where=name,
                hint="set output.merge to false, or choose other method.lora.targetModules",
            )
        yield Weight(name.replace(".base_layer.", "."), parameter, layer)
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield Weight(f"{prefix}.{name}".lstrip(".").replace(".base_layer.", "."), buffer)


def _is_adapter(name: str) -> bool:
    return ".lora_" in name


def _is_mergeable(layer: object) -> bool:
    from peft.tuners import lora

    return isinstance(layer, lora.Linear | lora.Embedding)


def _is_embedding(layer: Mergeable) -> TypeIs[lora.Embedding]:
    from peft.tuners import lora

    return isinstance(layer, lora.Embedding)


def _factors(layer: Mergeable) -> tuple[torch.Tensor, torch.Tensor]:
    """A of shape (r, in) and B of shape (out, r)."""
    if _is_embedding(layer):
        return layer.lora_embedding_A[ADAPTER], layer.lora_embedding_B[ADAPTER]
    return cast("tuple[torch.Tensor, torch.Tensor]", (layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight))


def _original(model: PreTrainedModel, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Name and shape as in the checkpoint that was loaded: transformers fuses some, such as a MoE's experts."""
    tensors = cast("dict[str, torch.Tensor]", revert_weight_conversion(model, {name: tensor}))
    # What was split shares memory, which safetensors refuses.
    return {k: v if v is tensor else v.clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
