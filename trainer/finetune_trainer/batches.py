"""Micro-batches: sequences side by side in one row without padding, and the positions where something is learned."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from finetune_trainer.dataset import PackedDataset, PackedSequence

# Two tokens that nothing is learned from: keeps a worker with no sample left in step with the others' collectives.
_EMPTY = PackedSequence(
    input_ids=np.zeros(2, np.int32),
    weights=np.zeros(2, np.float32),
    documents=np.array([2], np.int32),
)


@dataclass(frozen=True)
class MicroBatch:
    """Documents of one or more sequences, one after the other: T tokens, D documents, P predicted tokens."""

    input_ids: Tensor       # [1, T]
    position_ids: Tensor    # [1, T], from 0 in every document
    boundaries: Tensor      # [D + 1], int32: where documents start, and T
    predicting: Tensor      # [P]: where the model predicts a token that counts
    targets: Tensor         # [P]: the token that follows there
    weights: Tensor         # [P], float32: how much it counts
    lengths: npt.NDArray[np.int64]      # [D]: tokens of each document

    @property
    def longest(self) -> int:
        return int(self.lengths.max())

    def to(self, device: torch.device) -> MicroBatch:
        if device.type == "cpu":
            return self
        moved = {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in vars(self).items()}
        return MicroBatch(**moved)


def collate(sequences: Sequence[PackedSequence]) -> MicroBatch:
    """Puts sequences side by side in one row. With nothing to learn, one prediction of weight 0 is left."""
    ids = np.concatenate([s.input_ids for s in sequences]).astype(np.int64)
    weights = np.concatenate([s.weights for s in sequences])
    lengths = np.concatenate([s.documents for s in sequences]).astype(np.int64)
    ends = np.cumsum(lengths)
    learned = np.flatnonzero(weights)
    if not learned.size:
        learned = np.array([1])
    return MicroBatch(
        input_ids=torch.from_numpy(ids)[None],
        position_ids=torch.from_numpy(np.arange(ids.size) - np.repeat(ends - lengths, lengths))[None],
        boundaries=torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32)),
        predicting=torch.from_numpy(learned - 1),
        targets=torch.from_numpy(ids[learned]),
        weights=torch.from_numpy(weights[learned]),
        lengths=lengths,
    )


def micro_batches(
    dataset: PackedDataset, positions: npt.NDArray[np.int64], *, rank: int, world_size: int, size: int, count: int
) -> Iterator[MicroBatch]:
    """This worker's share of a global batch, `size` sequences at a time.

    Worker r takes every `world_size`-th position from r. Every worker yields `count` micro-batches: when its samples
    are used up it goes on with empty ones, since under ZeRO each forward and backward pass is a collective.
    """
    mine = positions[rank::world_size]
    for start in range(0, count * size, size):
        yield collate([dataset[int(p)] for p in mine[start : start + size]] or [_EMPTY])


def micro_batch_count(samples: int, *, world_size: int, size: int) -> int:
    """Micro-batches of `size` sequences that the worker with the largest share of `samples` needs."""
    return math.ceil(math.ceil(samples / world_size) / size)
