from __future__ import annotations

from typing import Any

import pytest

from finetune_api.job import Training
from finetune_trainer.schedule import learning_rate


def rates(total: int, **training: Any) -> list[float]:
    settings = Training(learning_rate=1.0, **training)
    return [learning_rate(step, total, settings) for step in range(total)]


def test_warm_up_rises_in_equal_steps_from_above_zero_to_the_peak() -> None:
    assert rates(8, warmup=3, schedule="constant") == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 1])


def test_a_warm_up_below_one_is_a_fraction_of_all_steps() -> None:
    assert rates(20, warmup=0.15, schedule="cosine") == rates(20, warmup=3, schedule="cosine")


def test_a_warm_up_longer_than_the_run_never_passes_the_peak() -> None:
    assert max(rates(5, warmup=50, schedule="linear")) < 1


def test_linear_falls_in_equal_steps_towards_the_minimum() -> None:
    assert rates(4, warmup=0, schedule="linear", minimum_learning_rate=0.2) == pytest.approx([1, 0.8, 0.6, 0.4])


def test_cosine_is_half_way_in_the_middle() -> None:
    got = rates(10, warmup=0, schedule="cosine", minimum_learning_rate=0.1)
    assert (got[0], got[5]) == pytest.approx((1, 0.55))
    assert got == sorted(got, reverse=True)


def test_wsd_is_stable_and_falls_only_in_its_last_part() -> None:
    got = rates(10, warmup=2, schedule="wsd", decay=0.4, minimum_learning_rate=0)
    assert got == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25])
