"""Times the parts of a step; on a GPU by events, so that measuring does not make the host wait."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

import torch

Part = Literal["data", "forward", "backward", "optimizer"]


class StepClock:
    """`start()`, then `end(part)` as often as there are parts, then `seconds()`."""

    def __init__(self, device: torch.device, on: Callable[[str], None] = lambda part: None) -> None:
        self._on = on  # told of every part that is done
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[Part | None, float | torch.cuda.Event]] = []

    def start(self) -> None:
        self._marks = [(None, self._now())]

    def end(self, part: Part) -> None:
        self._marks.append((part, self._now()))
        self._on(part)

    def seconds(self) -> dict[Part, float]:
        """Seconds of each part since `start`. On a GPU waits for its work."""
        if self._cuda:
            torch.cuda.synchronize()
        parts: dict[Part, float] = {"data": 0.0, "forward": 0.0, "backward": 0.0, "optimizer": 0.0}
        for (_, before), (part, after) in zip(self._marks, self._marks[1:], strict=False):
            assert part is not None
            parts[part] += _between(before, after)
        return parts

    def _now(self) -> float | torch.cuda.Event:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _between(before: float | torch.cuda.Event, after: float | torch.cuda.Event) -> float:
    if isinstance(before, float) and isinstance(after, float):
        return after - before
    assert isinstance(before, torch.cuda.Event)
    assert isinstance(after, torch.cuda.Event)
    milliseconds: float = before.elapsed_time(after)
    return milliseconds / 1000
