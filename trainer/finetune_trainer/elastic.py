"""Starts of a worker group, one after the other: again when workers died, smaller when nodes are lost, larger when
they are back.

Knows no cluster: how a group is started, and what there is room for, comes from the caller.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Set
from dataclasses import dataclass
from functools import partial
from typing import Final, Protocol

from finetune_api.errors import FinetuneError, Preempted
from finetune_api.job import FinetuneJobSpec
from finetune_trainer.reporter import Event

OnEvent = Callable[[Event], None]
Asked = Callable[[], bool]
# Starts a worker group: its number, its processes, where its events go, what tells it to stop. Returns when it has
# ended: why that was too early, or None.
Start = Callable[[int, int, OnEvent, Asked], FinetuneError | None]

PATIENCE_SECONDS: Final = 60.0  # that lost nodes may take to be replaced, and that new ones must have stayed
_SETTLE_SECONDS: Final = 5.0  # until a node whose process died is known to be gone, too
_LOOK_SECONDS: Final = 1.0


@dataclass(frozen=True)
class Bounds:
    """Numbers of processes that a job can train with: multiples of `multiple` from `least` to `most`."""

    least: int
    most: int
    multiple: int = 1

    @property
    def elastic(self) -> bool:
        return self.least < self.most

    def size(self, room: int) -> int | None:
        """The largest number that fits into `room`; None when there is none."""
        fits = min(room, self.most) // self.multiple * self.multiple
        return fits if fits >= self.least else None


def bounds(spec: FinetuneJobSpec) -> Bounds:
    """Those of a job; without `workers.min` there is one number only."""
    each = max(1, spec.workers.gpus_each)
    least = spec.workers.min or spec.workers.count
    return Bounds(least * each, spec.workers.count * each, spec.deepspeed.sequence_parallel)


class Nodes(Protocol):
    """The cluster as it is now."""

    def room(self) -> int:
        """Processes that the nodes have room for that are there and stay."""

    def leaving(self) -> Set[str]:
        """Nodes that will be taken away soon."""


def train(
    start: Start,
    nodes: Nodes,
    bounds: Bounds,
    on_event: OnEvent,
    should_stop: Asked,
    *,
    again: tuple[type[FinetuneError], ...],
    retries: int,
    patience: float = PATIENCE_SECONDS,
) -> None:
    """Starts worker groups until one ends the run, or the run is asked to stop.

    A node that is to be taken away makes a group checkpoint and leave. Within `bounds` the next one is smaller when
    lost nodes are not replaced, and larger when there are more again.

    Args:
        again: failures after which another group is worth starting.
        retries: how often the same number of processes is started again after such a failure.
        patience: seconds that lost nodes may take to be replaced, and that new ones must have stayed.

    Raises:
        Preempted: a node goes, and the job needs all of its workers.
        FinetuneError: how a group failed, when no other is to be started.
    """
    size, failures = bounds.most, 0
    left: Set[str] = frozenset()  # nodes that go, but without which the group was sized
    for number in itertools.count():
        watch, events = Watch(nodes, bounds, size, left, patience), _Events(on_event)
        failure = start(number, size, events, partial(_any, should_stop, watch.wants_stop))
        if failure is not None and (not isinstance(failure, again) or should_stop()):
            raise failure
        if failure is None and (events.complete or not watch.reason or should_stop()):
            events.end()
            return
        if failure is None and not bounds.elastic:
            raise Preempted(watch.reason, hint="a checkpoint was written; another attempt goes on from it")
        left = nodes.leaving()
        smaller = next_size(nodes, bounds, should_stop, patience) if bounds.elastic else size
        if smaller is None:
            events.end()
            return
        if failure is not None and smaller >= size:
            failures += 1
            if failures > retries:
                raise failure
        size = smaller
        reason = failure.what if failure is not None else watch.reason
        on_event({"event": "retry", "time": time.time(), "attempt": number + 1, "reason": reason})


class _Events:
    """Passes events on, but keeps the end of a group back: it may not be the end of the run."""

    def __init__(self, on_event: OnEvent) -> None:
        self._on_event = on_event
        self._end: Event | None = None

    def __call__(self, event: Event) -> None:
        if event["event"] == "end":
            self._end = event
        else:
            self._on_event(event)

    @property
    def complete(self) -> bool:
        return self._end is not None and self._end["reason"] == "complete"

    def end(self) -> None:
        if self._end is not None:
            self._on_event(self._end)


def _any(first: Asked, second: Asked) -> bool:
    return first() or second()


class Watch:
    """Looks at the nodes while `size` processes train, none of them on the nodes `left`.

    Attributes:
        reason: why the processes should write a checkpoint and leave; empty as long as they need not.
    """

    def __init__(self, nodes: Nodes, bounds: Bounds, size: int, left: Set[str], patience: float) -> None:
        self._nodes, self._bounds, self._size, self._left, self._patience = nodes, bounds, size, left, patience
        self._looked = 0.0
        self._more_since: float | None = None
        self.reason = ""

    def wants_stop(self) -> bool:
        """Whether there is a reason. Looks once a second at most."""
        now = time.monotonic()
        if not self.reason and now - self._looked >= _LOOK_SECONDS:
            self._looked = now
            self._look(now)
        return bool(self.reason)

    def _look(self, now: float) -> None:
        if self._nodes.leaving() - self._left:
            self.reason = "a node is being taken away"
        elif self._size < self._bounds.most and (self._bounds.size(self._nodes.room()) or 0) > self._size:
            self._more_since = self._more_since or now
            if now - self._more_since >= self._patience:
                self.reason = "there are nodes for more workers again"
        else:
            self._more_since = None


def next_size(nodes: Nodes, bounds: Bounds, should_stop: Asked, patience: float) -> int | None:
    """Waits for room: for all processes at first, after `patience` for as many as there may be.

    Returns:
        How many to start; None when asked to stop.
    """
    begun = time.monotonic()
    while not should_stop():
        waited = time.monotonic() - begun
        size = bounds.size(nodes.room())
        if size is not None and waited >= (min(_SETTLE_SECONDS, patience) if size == bounds.most else patience):
            return size
        time.sleep(min(_LOOK_SECONDS, patience))
    return None
