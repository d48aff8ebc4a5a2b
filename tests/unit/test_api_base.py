"""Durations are written the way they are read."""

from __future__ import annotations

import pytest

from finetune_api.base import format_duration, parse_duration


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (45, "45s"), (1800, "30m"), (5400, "1h30m"), (43_200, "12h"), (604_800, "7d")]
)
def test_a_duration_is_said_as_a_user_would_write_it(seconds: int, text: str) -> None:
    assert format_duration(seconds) == text
    assert parse_duration(text) == seconds


def test_no_more_than_two_units_are_shown() -> None:
    assert format_duration(90_061.9) == "1d1h"
