"""Best-fit packing: what must hold for any documents."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_trainer.prepare.pack import pack

CAPACITY = 32
LENGTHS = st.lists(st.integers(1, CAPACITY), max_size=200)


def _best_fit_decreasing(lengths: list[int], capacity: int) -> int:
    """Number of sequences, by the textbook's one document at a time."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            best = rooms.index(min(fitting))
            rooms[best] -= length
        else:
            rooms.append(capacity - length)
    return len(rooms)


@given(LENGTHS)
def test_every_document_is_in_one_sequence_and_no_sequence_is_over_capacity(lengths: list[int]) -> None:
    sequence = pack(np.array(lengths, dtype=np.int32), CAPACITY)
    assert len(sequence) == len(lengths)
    fill = np.bincount(sequence, weights=lengths) if lengths else np.zeros(0)
    assert (fill <= CAPACITY).all()
    assert (fill > 0).all(), "sequence numbers have no gap"


@given(LENGTHS)
def test_packing_is_best_fit_decreasing(lengths: list[int]) -> None:
    sequence = pack(np.array(lengths, dtype=np.int32), CAPACITY)
    assert len(set(sequence.tolist())) == _best_fit_decreasing(lengths, CAPACITY)


@given(LENGTHS)
def test_the_same_lengths_are_packed_the_same(lengths: list[int]) -> None:
    array = np.array(lengths, dtype=np.int32)
    assert pack(array, CAPACITY).tolist() == pack(array.copy(), CAPACITY).tolist()


def test_two_halves_share_a_sequence() -> None:
    assert len(set(pack(np.array([16, 32, 16], dtype=np.int32), CAPACITY).tolist())) == 2


def test_a_million_documents_leave_almost_no_room() -> None:
    lengths = np.random.default_rng(0).integers(1, 2049, 1_000_000).astype(np.int32)
    sequences = int(pack(lengths, 2048).max()) + 1
    assert lengths.sum() / (sequences * 2048) > 0.998


def test_a_document_over_capacity_is_refused() -> None:
    with pytest.raises(ValueError, match="33 tokens does not fit into 32"):
        pack(np.array([33], dtype=np.int32), CAPACITY)
