"""What training has made of the weights: float32 masters and AdamW's moments, as named spans of parameters.

DeepSpeed keeps them in flat buffers whose cut depends on the ZeRO stage and the number of workers. Here every element
has its parameter's name and its place in it, so that any number of workers can go on from what others wrote. Nothing
else is state: the model's own weights follow from the masters, and frozen ones from the base model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

MASTER: Final = "master"
MOMENTS: Final = ("exp_avg", "exp_avg_sq")
KINDS: Final = (MASTER, *MOMENTS)
_SCALE: Final = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # float16's loss scale


class Span(NamedTuple):
    """Elements [start, start + length) of a flattened parameter."""

    name: str
    start: int
    length: int


@dataclass(frozen=True)
class _Place:
    """Where the optimizer keeps a span: in `owner`, flattened, from `offset`."""

    span: Span
    owner: Tensor
    offset: int


class TrainedState:
    """The trained state that a worker's engine holds.

    Attributes:
        held: the spans that this worker needs; without ZeRO all of every parameter.
        written: the spans that this worker saves; over all workers each element once.
        digest: of the trained parameters' names and shapes.
    """

    def __init__(self, engine: Any, rank: int, world_size: int) -> None:
        self._wrapper, self._optimizer = engine.optimizer, engine.basic_optimizer
        trained = [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]
        self._places = {place.span.name: place for place in _places(self._wrapper, self._optimizer, trained)}
        self.held = [place.span for place in self._places.values()]
        shares = self.held if _is_zero(self._wrapper) else [_share(span, rank, world_size) for span in self.held]
        self.written = [span for span in shares if span.length]
        shapes = sorted((name, list(getattr(p, "ds_shape", p.shape))) for name, p in trained)
        self.digest = hashlib.sha256(json.dumps(shapes).encode()).hexdigest()

    def tensor(self, span: Span, kind: str) -> Tensor:
        """The elements of `span`, which lies in a held one, as a view: writing to it changes the optimizer."""
        place = self._places[span.name]
        whole = place.owner.detach() if kind == MASTER else self._of(place.owner)[kind]
        return whole.view(-1).narrow(0, place.offset + span.start - place.span.start, span.length)

    def steps(self, name: str) -> float:
        """Updates that AdamW has made to the parameter; without ZeRO one without a gradient is left out."""
        return float(self._of(self._places[name].owner)["step"])

    def set_steps(self, name: str, steps: float) -> None:
        self._of(self._places[name].owner)["step"].fill_(steps)

    @property
    def loss_scale(self) -> dict[str, float]:
        """The state of float16's dynamic loss scale; empty in other precisions."""
        scaler = self._scaler()
        return {key: getattr(scaler, key) for key in _SCALE if getattr(scaler, key, None) is not None}

    def set_loss_scale(self, values: dict[str, float]) -> None:
        for key, value in values.items():
            setattr(self._scaler(), key, value)

    @torch.no_grad()
    def refresh(self) -> None:
        """Makes the model's weights those of the masters, after these were loaded. A collective."""
        wrapper = self._wrapper
        if _is_zero3(wrapper):
            wrapper._partition_all_parameters()
            for group in range(len(wrapper.fp16_groups)):
                wrapper._reassign_or_swap_out_partitioned_parameters(group)
            if wrapper.persistent_parameters:
                wrapper.persistent_parameters[0].all_gather(wrapper.persistent_parameters)
        elif _is_zero(wrapper):
            wrapper.update_lp_params()
        elif wrapper is not self._optimizer:
            for parameters, masters in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True):
                for parameter, master in zip(parameters, masters, strict=True):
                    parameter.copy_(master)

    def _of(self, owner: Tensor) -> dict[str, Tensor]:
        """AdamW's state of one of its tensors, made as AdamW would when no step was done yet."""
        state: dict[str, Tensor] = self._optimizer.state[owner]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=owner.device)
            for kind in MOMENTS:
                state[kind] = torch.zeros_like(owner, memory_format=torch.preserve_format)
        return state

    def _scaler(self) -> Any:
        scaler = getattr(self._wrapper, "loss_scaler", None) or getattr(self._wrapper, "loss_scale_config", None)
        dynamic = getattr(scaler, "dynamic", False) or getattr(scaler, "dynamic_loss_scale", False)
        return scaler if dynamic else None


def _places(wrapper: Any, optimizer: Any, trained: list[tuple[str, Any]]) -> Iterator[_Place]:
    """Where each trained parameter's elements are, as far as this worker has them."""
    if wrapper is optimizer:  # float32 without ZeRO
        yield from (_Place(Span(name, 0, p.numel()), p, 0) for name, p in trained)
    elif _is_zero3(wrapper):  # each parameter is cut evenly, its end padded
        for name, p in trained:
            group, offset, length = wrapper.grad_position[wrapper.get_param_id(p)]
            start = wrapper._get_param_partition_rank(p) * length
            length = min(length, p.ds_numel - start)
            if length > 0:
                yield _Place(Span(name, start, length), wrapper.fp32_partitioned_groups_flat[group], offset)
    elif _is_zero(wrapper):  # groups of parameters, one after the other, are cut evenly
        flat = getattr(wrapper, "single_partition_of_fp32_groups", None) or wrapper.fp32_groups_flat_partition
        for name, p in trained:
            mapping = p._hp_mapping
            if mapping is not None:
                low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
                yield _Place(Span(name, low.start, low.numel), flat[mapping.param_group_index], high.start)
    else:  # bfloat16 or float16 without ZeRO
        masters = {
            id(p): master
            for parameters, group in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True)
            for p, master in zip(parameters, group, strict=True)
        }
        yield from (_Place(Span(name, 0, p.numel()), masters[id(p)], 0) for name, p in trained)


def _is_zero(wrapper: Any) -> bool:
    """Whether masters and moments are cut over the workers."""
    return _is_zero3(wrapper) or hasattr(wrapper, "update_lp_params")


def _is_zero3(wrapper: Any) -> bool:
    return hasattr(wrapper, "fp32_partitioned_groups_flat")


def _share(span: Span, rank: int, world_size: int) -> Span:
    """This worker's part of what every worker has."""
    first, last = (span.length * r // world_size for r in (rank, rank + 1))
    return Span(span.name, span.start + first, last - first)
