"""Micro-batches: sequences side by side in one row without padding, and the positions where something is learned."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from finetune_trainer.dataset import PackedDataset, PackedSequence
from finetune_trainer.distributed import SequenceGroup, World

# On a CPU every new shape compiles kernels that stay in memory, some 13 MB for a micro-batch of 2,000 tokens: rows and
# predictions are filled up to a multiple of this, so that shapes come back.
_MULTIPLE: Final = 32


@dataclass(frozen=True)
class MicroBatch:
    """Documents of one or more sequences, one after the other: T tokens, D documents, P predictions.

    The last document may be filling, and so may the last predictions: nothing is learned from them.
    """

    input_ids: Tensor  # [1, T]
    position_ids: Tensor  # [1, T], from 0 in every document
    boundaries: Tensor  # [D + 1], int32: where documents start, and T
    longest: int  # tokens of the longest document
    predicting: Tensor  # [P]: where the model predicts a token that counts
    targets: Tensor  # [P]: the token that follows there
    weights: Tensor  # [P], float32: how much it counts
    owners: Tensor  # [P]: the document that the token is of; the first one for filling
    references: Tensor  # [D], float32: for preferences, the documents' log-probabilities in the reference model; or [0]
    lengths: npt.NDArray[np.int64]  # tokens of each document, without filling
    sequence: SequenceGroup | None = None  # shares the row: ids, positions and predictions are this worker's part of it

    def to(self, device: torch.device) -> MicroBatch:
        if device.type == "cpu":
            return self
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        moved: dict[str, Any] = {name: value.to(device, non_blocking=True) for name, value in tensors.items()}
        return replace(self, **moved)


def collate(sequences: Sequence[PackedSequence], sequence: SequenceGroup | None = None) -> MicroBatch:
    """Puts sequences side by side in one row. Without any the row is filling.

    Args:
        sequence: cut the row into equal parts for these workers; boundaries and lengths stay those of the whole row.
    """
    parts = sequence.size if sequence else 1
    ids = _filled([s.input_ids for s in sequences], np.int64, parts)
    weights = _filled([s.weights for s in sequences], np.float32, parts)
    lengths = np.concatenate([np.zeros(0, np.int64), *(s.documents for s in sequences)])
    filling = ids.size - lengths.sum()
    every = np.append(lengths, filling) if filling else lengths
    ends = np.cumsum(every)
    start, end = _part(ids.size, sequence)
    learned = np.flatnonzero(weights)
    learned = learned[(learned > start) & (learned <= end)]  # a token is predicted where the one before it is
    return MicroBatch(
        input_ids=torch.from_numpy(ids[start:end])[None],
        position_ids=torch.from_numpy((np.arange(ids.size) - np.repeat(ends - every, every))[start:end])[None],
        boundaries=torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32)),
        longest=int(every.max()),
        predicting=torch.from_numpy(_filled([learned - 1 - start], np.int64)),
        targets=torch.from_numpy(_filled([ids[learned]], np.int64)),
        weights=torch.from_numpy(_filled([weights[learned]], np.float32)),
        owners=torch.from_numpy(_filled([np.repeat(np.arange(every.size), every)[learned]], np.int64)),
        references=torch.from_numpy(np.concatenate([np.zeros(0, np.float32), *(s.references for s in sequences)])),
        lengths=lengths,
        sequence=sequence,
    )


def _part(tokens: int, sequence: SequenceGroup | None) -> tuple[int, int]:
    """Where this worker's part of a row of so many tokens begins and ends."""
    if sequence is None:
        return 0, tokens
    each = tokens // sequence.size
    return each * sequence.rank, each * (sequence.rank + 1)


def _filled(values: Sequence[npt.NDArray[Any]], dtype: npt.DTypeLike, parts: int = 1) -> npt.NDArray[Any]:
    """The values one after the other, with zeros up to a multiple of `parts` times `_MULTIPLE`, and never empty."""
    multiple = parts * _MULTIPLE
    joined = np.concatenate([np.zeros(0, dtype), *values], dtype=dtype)
    return np.pad(joined, (0, -joined.size % multiple if joined.size else multiple))


def micro_batches(
    dataset: PackedDataset, positions: npt.NDArray[np.int64], world: World, *, size: int, count: int
) -> Iterator[MicroBatch]:
    """This worker's share of a global batch, `size` sequences at a time, on its device.

    Share r has every `data_size`-th position from r; workers that share sequences take the same ones, and of each its
    part. Every worker yields `count` micro-batches: when its samples are used up it goes on with empty ones, since
    under ZeRO each forward and backward pass is a collective.
    """
    mine = positions[world.data_rank :: world.data_size]
    for start in range(0, count * size, size):
        yield collate([dataset[int(p)] for p in mine[start : start + size]], world.sequence).to(world.device)


def micro_batch_count(samples: int, *, shares: int, size: int) -> int:
    """Micro-batches of `size` sequences that the worker with the largest of so many shares of `samples` needs."""
    return math.ceil(math.ceil(samples / shares) / size)
