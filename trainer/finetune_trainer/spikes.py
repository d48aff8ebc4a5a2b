"""Tells a loss that jumps from one that only wobbles. Pure."""

from __future__ import annotations

import statistics
from collections import deque
from typing import Any, Final

import numpy as np
import numpy.typing as npt

WINDOW: Final = 64  # steps that a loss is compared with
MOST_SEQUENCES: Final = 16  # of a batch that are named
FEWEST: Final = 16  # of them, before anything is said: the first steps fall too fast to be a measure
_DEVIATIONS: Final = 6.0
_SHARE: Final = 0.3  # and at least this much over the median: the spread of a loss that hardly moves is no measure
_NORMAL: Final = 1.4826  # standard deviation of normally distributed values, over their median absolute deviation


class SpikeDetector:
    """Compares each step's loss with the median of those before it, in units of their median absolute deviation.

    Both are robust: a spike among the steps before does not hide the next one. Only the first step of a spike is told.
    """

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._high = False

    def expected(self, loss: float) -> float | None:
        """Takes a step's loss in; the loss that was to be expected when this one starts a spike, else None."""
        found = None
        if len(self._losses) >= FEWEST:
            middle = statistics.median(self._losses)
            spread = _NORMAL * statistics.median(abs(other - middle) for other in self._losses)
            high = loss > middle + max(_DEVIATIONS * spread, _SHARE * abs(middle))
            if high and not self._high:
                found = middle
            self._high = high
        self._losses.append(loss)
        return found

    def event(self, step: int, loss: float, positions: npt.NDArray[np.int64]) -> dict[str, Any] | None:
        """The fields of a `spike` event, if this step starts one; `positions`: training sequences of its batch."""
        expected = self.expected(loss)
        if expected is None:
            return None
        return {"step": step, "loss": loss, "expected": expected, "sequences": positions[:MOST_SEQUENCES].tolist()}
