"""One worker's file of a checkpoint: safetensors, with spans of parameters instead of whole ones.

Its metadata say where in its parameter each span starts; masters and moments of a span are one tensor each.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pyarrow.fs as pafs
import torch
from safetensors import safe_open

from finetune_trainer.checkpoint.state import KINDS, Span, TrainedState

_TYPES: Final = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_ALIGNMENT: Final = 8


@dataclass(frozen=True)
class Header:
    """What a shard holds."""

    spans: dict[str, Span]  # by the parameter's name
    steps: dict[str, float]  # AdamW's updates of each parameter
    loss_scale: dict[str, float]


def shard_name(rank: int, world_size: int) -> str:
    return f"shard-{rank:05d}-of-{world_size:05d}.safetensors"


def write_shard(path: Path, state: TrainedState) -> int:
    """Writes what this worker saves, tensor by tensor; returns its bytes. Not yet on the disk for sure.

    Raises:
        OSError: the disk is full, or refuses.
    """
    tensors = [(f"{kind}/{span.name}", state.tensor(span, kind)) for span in state.written for kind in KINDS]
    header: dict[str, Any] = {
        "__metadata__": {
            "starts": json.dumps({span.name: span.start for span in state.written}),
            "steps": json.dumps({span.name: state.steps(span.name) for span in state.written}),
            "lossScale": json.dumps(state.loss_scale),
        }
    }
    size = 0
    for name, tensor in tensors:
        end = size + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _TYPES[tensor.dtype], "shape": [tensor.numel()], "data_offsets": [size, end]}
        size = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("wb", buffering=0) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in tensors:
            rest = memoryview(tensor.cpu().view(torch.uint8).numpy().data)
            while rest:
                rest = rest[file.write(rest) :]
    return 8 + len(text) + size


def read_header(fs: pafs.FileSystem, path: str) -> Header:
    """What the shard at `path` holds, from its first bytes.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no shard.
    """
    with fs.open_input_file(path) as file:
        length = int.from_bytes(file.read_at(8, 0), "little")
        if length > file.size():
            raise ValueError("no shard: its header is longer than itself")
        header = json.loads(file.read_at(length, 8))
    try:
        metadata = header.pop("__metadata__")
        starts = json.loads(metadata["starts"])
        lengths = {name: header[f"{KINDS[0]}/{name}"]["shape"][0] for name in starts}
        return Header(
            {name: Span(name, start, lengths[name]) for name, start in starts.items()},
            json.loads(metadata["steps"]),
            json.loads(metadata["lossScale"]),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"no shard: {error}") from None


def overlap(wanted: Span, there: Span | None) -> Span | None:
    """The elements that are in both; None when there are none."""
    if there is None:
        return None
    start = max(wanted.start, there.start)
    end = min(wanted.start + wanted.length, there.start + there.length)
    return Span(wanted.name, start, end - start) if end > start else None


def missing(wanted: Iterable[Span], headers: Iterable[Header]) -> Iterator[str]:
    """Parameters of which no element, or not every one, is in the shards. Shards do not overlap."""
    headers = list(headers)
    for span in wanted:
        found = (overlap(span, header.spans.get(span.name)) for header in headers)
        if sum(part.length for part in found if part) != span.length:
            yield span.name


def load_shard(path: Path, header: Header, state: TrainedState) -> None:
    """Copies what this worker needs from a shard into its optimizer."""
    with safe_open(path, framework="pt") as file:
        for wanted in state.held:
            there = header.spans.get(wanted.name)
            part = overlap(wanted, there)
            if there is None or part is None:
                continue
            first = part.start - there.start
            for kind in KINDS:
                values = file.get_slice(f"{kind}/{part.name}")[first : first + part.length]
                state.tensor(part, kind).copy_(values)
            state.set_steps(part.name, header.steps[part.name])
    state.set_loss_scale(header.loss_scale)
