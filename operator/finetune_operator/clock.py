"""The API server's time. All times in objects come from its clock, so deadlines are counted on it, not on ours.

A machine whose own clock is off by ten minutes must make no wrong timeout. The `Date` header has whole seconds, and the
answer takes time to arrive; each answer therefore bounds the offset from both sides, and the bounds of several answers
together leave some milliseconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import Final

_DRIFT: Final = 200e-6  # seconds per second that two clocks may drift apart: twice what a bad quartz does


class OffsetEstimate:
    """Bounds of (server's Unix time - local monotonic time), from what was seen so far."""

    def __init__(self) -> None:
        self._low = self._high = self._at = 0.0
        self.known = False

    def learn(self, sent: float, received: float, date: float) -> None:
        """Takes up one answer.

        Args:
            sent: local monotonic time before the request was sent, in seconds.
            received: local monotonic time when the answer's headers were there.
            date: the answer's Date header as Unix time, which the server cut to whole seconds.
        """
        low, high = date - received, date + 1 - sent
        if self.known:
            drift = _DRIFT * max(0.0, received - self._at)
            kept_low, kept_high = max(low, self._low - drift), min(high, self._high + drift)
            if kept_low <= kept_high:
                low, high = kept_low, kept_high
            # Else a clock was set, or another server answers: what was learned before no longer holds.
        self._low, self._high, self._at, self.known = low, high, received, True

    @property
    def offset(self) -> float:
        """The middle of the bounds, in seconds."""
        return (self._low + self._high) / 2


class ServerClock:
    """Unix time on the API server."""

    def __init__(self, monotonic: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time) -> None:
        self.monotonic = monotonic
        self._wall = wall
        self._estimate = OffsetEstimate()

    def now(self) -> float:
        """Unix seconds by the API server's clock; by the local one until a server has answered."""
        return self.monotonic() + self._estimate.offset if self._estimate.known else self._wall()

    def learn(self, sent: float, date_header: str | None) -> None:
        """Takes up the Date header of an answer that has just arrived to a request sent at monotonic time `sent`."""
        if not date_header:
            return
        try:
            date = parsedate_to_datetime(date_header).timestamp()
        except ValueError:
            return
        self._estimate.learn(sent, self.monotonic(), date)
