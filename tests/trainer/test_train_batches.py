from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from finetune_api.run import PREPARED
from finetune_trainer.batches import collate, micro_batch_count, micro_batches
from finetune_trainer.dataset import PackedDataset, PackedSequence
from tests.trainer.runs import documents, prepare_sequences


def test_positions_restart_in_every_document() -> None:
    ids, weights = np.arange(60, dtype=np.int32), np.ones(60, np.float32)
    batch = collate([PackedSequence(ids, weights, np.array([40, 20], np.int32))])
    assert batch.position_ids[0].tolist() == [*range(40), *range(20), *range(4)]      # the last four are filling
    assert batch.boundaries.tolist() == [0, 40, 60, 64]
    assert batch.lengths.tolist() == [40, 20]


def test_each_weight_is_on_the_prediction_of_its_token_from_the_one_before() -> None:
    weights = np.array([0, 0, 1, 0.5], np.float32)
    batch = collate([PackedSequence(np.array([7, 8, 9, 5], np.int32), weights, np.array([4], np.int32))])
    assert batch.predicting[:2].tolist() == [1, 2]
    assert batch.targets[:2].tolist() == [9, 5]
    assert batch.weights[:2].tolist() == [1, 0.5]
    assert not batch.weights[2:].any()


def test_shapes_are_multiples_so_that_few_kernels_are_compiled() -> None:
    shapes = set()
    for size in range(2, 129):
        sequence = PackedSequence(np.ones(size, np.int32), np.ones(size, np.float32), np.array([size], np.int32))
        batch = collate([sequence])
        shapes.add((*batch.input_ids.shape, *batch.targets.shape))
        assert int(batch.boundaries[-1]) == batch.input_ids.shape[1]
    assert len(shapes) == 4


def test_the_workers_share_a_batch_of_any_size_in_equally_many_micro_batches(tmp_path: Path) -> None:
    some = documents(11, seed=0)
    prepare_sequences(tmp_path, [[document] for document in some])
    data = PackedDataset(tmp_path / PREPARED, "train")
    positions = np.array([3, 1, 4, 10, 5, 9, 2])
    for world_size in (1, 2, 3, 8):
        for size in (1, 2, 3):
            count = micro_batch_count(len(positions), world_size=world_size, size=size)
            shares = [
                list(micro_batches(data, positions, rank=rank, world_size=world_size, size=size, count=count))
                for rank in range(world_size)
            ]
            assert {len(share) for share in shares} == {count}
            targets = torch.cat([batch.targets[batch.weights > 0] for share in shares for batch in share])
            expected = np.concatenate([data[int(p)].input_ids[data[int(p)].weights > 0] for p in positions])
            assert sorted(targets.tolist()) == sorted(expected.tolist())
