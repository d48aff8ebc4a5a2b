"""The API server's time, learned from answers that say it in whole seconds."""

from __future__ import annotations

import math
from email.utils import formatdate

from hypothesis import given
from hypothesis import strategies as st

from finetune_operator.clock import OffsetEstimate, ServerClock

TRUE = 1_790_000_000.0  # the server's time when the local monotonic clock says 0


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_local_clock_is_used_until_a_server_has_answered() -> None:
    assert ServerClock(Clock(), lambda: 5.0).now() == 5


def test_a_local_clock_that_is_ten_minutes_off_does_not_matter() -> None:
    local = Clock()
    clock = ServerClock(local, lambda: TRUE - 600)
    local.now = 1.0
    clock.learn(0.9, formatdate(TRUE + 1.0, usegmt=True))
    assert abs(clock.now() - (TRUE + 1)) <= 0.6
    local.now = 3600.0
    assert abs(clock.now() - (TRUE + 3600)) <= 0.6


def test_a_header_that_is_no_date_is_left_aside() -> None:
    clock = ServerClock(Clock(), lambda: 5.0)
    for header in (None, "", "yesterday"):
        clock.learn(0.0, header)
    assert clock.now() == 5


def test_many_answers_bring_the_error_to_milliseconds() -> None:
    estimate = OffsetEstimate()
    for number in range(200):
        sent = number * 1.037
        estimate.learn(sent, sent + 0.004, math.floor(TRUE + sent + 0.002))
    assert abs(estimate.offset - TRUE) < 0.05


def test_a_server_whose_clock_was_set_is_believed() -> None:
    estimate = OffsetEstimate()
    estimate.learn(0.0, 0.01, TRUE)
    estimate.learn(10.0, 10.01, TRUE + 10 - 3600)
    assert abs(estimate.offset - (TRUE - 3600)) <= 1.1


@given(
    offset=st.floats(0, 2e9),
    answers=st.lists(st.tuples(st.floats(0, 100), st.floats(0, 2), st.floats(0, 1)), min_size=1, max_size=30),
)
def test_the_true_offset_is_never_further_away_than_one_answer_allows(
    offset: float, answers: list[tuple[float, float, float]]
) -> None:
    estimate, sent = OffsetEstimate(), 0.0
    for pause, trip, share in answers:
        sent += pause
        estimate.learn(sent, sent + trip, math.floor(offset + sent + trip * share))
        assert abs(estimate.offset - offset) <= (1 + trip) / 2 + 0.03
