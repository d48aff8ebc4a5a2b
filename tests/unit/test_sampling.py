from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_api.job import Training
from finetune_trainer.sampling import Order, batch_sequences, order, permutation


@given(sequences=st.integers(1, 40), batch=st.integers(1, 17), epochs=st.integers(1, 4), seed=st.integers(0, 2**31 - 1))
def test_every_epoch_takes_every_sequence_once(sequences: int, batch: int, epochs: int, seed: int) -> None:
    plan = Order(sequences=sequences, batch=batch, samples=epochs * sequences, seed=seed)
    taken = np.concatenate([plan.positions(step) for step in range(plan.steps)])
    passes = taken.reshape(epochs, sequences).tolist()
    assert passes == [permutation(seed, epoch, sequences).tolist() for epoch in range(epochs)]
    assert all(sorted(positions) == list(range(sequences)) for positions in passes)


def test_the_order_changes_with_seed_and_epoch() -> None:
    orders = {tuple(permutation(seed, epoch, 50)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_the_order_is_the_same_on_every_machine_and_version() -> None:
    assert permutation(7, 2, 8).tolist() == [6, 7, 4, 0, 1, 5, 3, 2]


def test_one_epoch_when_neither_epochs_nor_steps_are_given() -> None:
    assert order(Training(sequences_per_batch=4), 10, 64).steps == 3


def test_whichever_of_epochs_and_steps_ends_first() -> None:
    assert order(Training(epochs=2, max_steps=3, sequences_per_batch=4), 10, 64).steps == 3
    assert order(Training(epochs=1, max_steps=30, sequences_per_batch=4), 10, 64).steps == 3


def test_steps_alone_go_on_over_epochs_with_whole_batches() -> None:
    plan = order(Training(max_steps=7, sequences_per_batch=4), 10, 64)
    assert [len(plan.positions(step)) for step in range(plan.steps)] == [4] * 7
    assert plan.epoch(7) == pytest.approx(2.8)


def test_the_last_batch_holds_what_is_left() -> None:
    plan = order(Training(epochs=1, sequences_per_batch=4), 10, 64)
    assert [len(plan.positions(step)) for step in range(plan.steps)] == [4, 4, 2]
    assert plan.epoch(plan.steps) == 1


def test_a_part_of_an_epoch_takes_that_part_of_the_rows() -> None:
    assert order(Training(epochs=0.5, sequences_per_batch=1), 10, 64).samples == 5


@pytest.mark.parametrize(("tokens", "expected"), [(64, 1), (65, 1), (640, 10), (16, 1)])
def test_tokens_per_batch_are_rounded_down_to_whole_sequences(tokens: int, expected: int) -> None:
    assert batch_sequences(Training(tokens_per_batch=tokens), 64) == expected


def test_a_run_of_a_thousand_epochs_is_finite() -> None:
    assert math.isfinite(order(Training(epochs=1000), 3, 64).steps)
