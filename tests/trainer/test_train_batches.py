"""Rows of a micro-batch: what stands where, and how they are filled up."""

from __future__ import annotations

import numpy as np

from finetune_trainer.batches import collate
from finetune_trainer.dataset import PackedSequence


def sequence(*lengths: int) -> PackedSequence:
    """Token ids 1, 2, 3 …; all are learned but the first of each document."""
    weights = np.concatenate([np.arange(length) > 0 for length in lengths])
    return PackedSequence(
        input_ids=np.arange(1, sum(lengths) + 1, dtype=np.int32),
        weights=weights.astype(np.float32),
        documents=np.array(lengths, np.int32),
    )


def test_documents_stand_side_by_side_and_filling_is_one_of_its_own() -> None:
    batch = collate([sequence(9, 3), sequence(17)])

    assert batch.boundaries.tolist() == [0, 9, 12, 29, 32]
    assert batch.input_ids[0].tolist() == [*range(1, 13), *range(1, 18), 0, 0, 0]
    assert batch.position_ids[0].tolist() == [*range(9), *range(3), *range(17), *range(3)]
    assert (batch.longest, batch.lengths.tolist()) == (17, [9, 3, 17])


def test_only_what_is_learned_is_predicted_and_filling_weighs_nothing() -> None:
    batch = collate([sequence(9, 3), sequence(17)])

    learned = batch.weights > 0
    assert learned.tolist() == [True] * 26 + [False] * 6
    assert (batch.input_ids[0, batch.predicting[learned] + 1] == batch.targets[learned]).all()
    assert 9 - 1 not in batch.predicting[learned]  # nothing predicts the first token of the document after it


def test_rows_of_similar_length_have_one_shape() -> None:
    assert len({collate([sequence(n)]).input_ids.shape for n in range(97, 129)}) == 1
    assert len({collate([sequence(n)]).targets.shape for n in range(98, 130)}) == 1


def test_a_worker_without_samples_gets_a_row_from_which_nothing_is_learned() -> None:
    batch = collate([])

    assert batch.input_ids.shape[1] == batch.targets.shape[0] == 32
    assert not batch.weights.any()
    assert not batch.lengths.size
