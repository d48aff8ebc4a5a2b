"""Log-probabilities of all answers in the reference model, which preferences are learned against.

The workers compute them at the run's first start, when the weights are still the base model's: no second model is in
memory, and a step needs no second pass. They are kept beside the checkpoints for later starts. At every start the base
model comes first and the checkpoint is loaded onto it, so a file that is lost or damaged is made again.
"""

from __future__ import annotations

import hashlib
import io
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from finetune_api.errors import StorageError
from finetune_trainer import storage
from finetune_trainer.batches import micro_batch_count, micro_batches
from finetune_trainer.dataset import PackedDataset
from finetune_trainer.distributed import World
from finetune_trainer.weights import on_rank_0

FILE: Final = "references.npz"  # in the run's folder; its first line is the SHA-256 of the key and of what follows
_EVERY_SECONDS: Final = 10.0  # between reports

Values = dict[str, npt.NDArray[np.float32]]  # by split: one for each document


class _Stopped(Exception):
    """The run was asked to stop meanwhile."""


def find(
    engine: Any,
    splits: Mapping[str, PackedDataset],
    world: World,
    *,
    size: int,
    kept: storage.Location,
    key: str,
    report: Callable[..., None],
    should_stop: Callable[[], bool],
) -> bool:
    """Gives every split its references: those that are kept, or new ones, which are kept then. A collective.

    Args:
        engine: around a `PreferenceLoss` of the base model, before anything was trained.
        size: sequences in a micro-batch.
        kept: the file.
        key: what the values depend on.
        report: takes events.
        should_stop: asked on every worker, often.

    Returns:
        False when the run was asked to stop; nothing is kept then.
    """
    started = time.monotonic()
    values, problem = on_rank_0(world, lambda: _read(kept, key))
    if problem:
        report("warning", message=f"{FILE} {problem}: the base model is asked again")
    if values is None:
        total = sum(len(data) for data in splits.values())
        report("references", done=0, total=total, seconds=0.0)
        try:
            values = {
                name: _compute(
                    engine,
                    data,
                    world,
                    size,
                    lambda done: report("references", done=done, total=total, seconds=time.monotonic() - started),
                    should_stop,
                )
                for name, data in splits.items()
            }
        except _Stopped:
            return False
        found = values
        try:
            on_rank_0(world, lambda: _keep(found, kept, key))
        except StorageError as error:
            report("warning", message=f"{FILE} could not be kept, so a restart computes it again: {error}")
        report("references", done=total, total=total, seconds=time.monotonic() - started)
    for name, data in splits.items():
        data.references = values[name]
    return True


@torch.no_grad()
def _compute(
    engine: Any,
    data: PackedDataset,
    world: World,
    size: int,
    done: Callable[[int], None],
    should_stop: Callable[[], bool],
) -> npt.NDArray[np.float32]:
    """The log-probability of each document's answer, float32 [documents]. A collective."""
    engine.eval()
    positions = np.arange(len(data))
    count = micro_batch_count(len(positions), shares=world.data_size, size=size)
    found = torch.zeros(int(data.documents.sum()), dtype=torch.float64, device=world.device)
    mine = positions[world.data_rank :: world.data_size]
    told = time.monotonic()
    for number, batch in enumerate(micro_batches(data, positions, world, size=size, count=count)):
        sums = engine(batch, reference=True)
        part = mine[number * size : (number + 1) * size]
        places = [np.arange(data.documents[p]) + data.document_starts[p] for p in part]
        found[torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *places])).to(world.device)] = sums.double()
        if world.sums([should_stop()])[0]:
            raise _Stopped
        if time.monotonic() - told >= _EVERY_SECONDS:
            done(min((number + 1) * size * world.data_size, len(data)))
            told = time.monotonic()
    dist.all_reduce(found)
    return found.to("cpu", torch.float32).numpy()


def _read(kept: storage.Location, key: str) -> tuple[Values | None, str]:
    """What is kept under this key; or why it is not used, which is nothing when there is no file."""
    content = storage.read_bytes(kept)
    if content is None:
        return None, ""
    digest, _, arrays = content.partition(b"\n")
    if digest != _digest(key, arrays):
        return None, "is damaged, or of other data or of another model"
    with np.load(io.BytesIO(arrays), allow_pickle=False) as opened:
        return {name: opened[name] for name in opened.files}, ""


def _keep(values: Values, kept: storage.Location, key: str) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **values)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, FILE)
        file.write_bytes(_digest(key, buffer.getvalue()) + b"\n" + buffer.getvalue())
        storage.upload(file, kept)


def _digest(key: str, arrays: bytes) -> bytes:
    return hashlib.sha256(key.encode() + b"\n" + arrays).hexdigest().encode()
