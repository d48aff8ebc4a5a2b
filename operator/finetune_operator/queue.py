"""A keyed work queue: a key waits in it once, is worked on once at a time, and comes back after a delay when it failed.

Every call takes O(log n). Time and randomness are arguments.
"""

from __future__ import annotations

import asyncio
import heapq
import random
import time
from collections import deque
from collections.abc import Callable, Hashable
from typing import Final, Generic, TypeVar

K = TypeVar("K", bound=Hashable)

FIRST_DELAY: Final = 0.2
LAST_DELAY: Final = 60.0
_JITTER: Final = 0.5  # a delay d becomes d..1.5 d, so that what failed together does not come back together


class KeyedQueue(Generic[K]):
    """Keys to work on, oldest first. One task takes them with `get`; whoever worked on a key says `done`."""

    def __init__(
        self, monotonic: Callable[[], float] = time.monotonic, uniform: Callable[[], float] = random.random
    ) -> None:
        self._monotonic = monotonic
        self._uniform = uniform
        self._ready: deque[K] = deque()
        self._waiting: set[K] = set()  # in _ready, or to be put there when its worker is done
        self._working: set[K] = set()
        self._timers: dict[K, tuple[float, int]] = {}
        self._heap: list[tuple[float, int, K]] = []  # holds outdated timers too; _timers knows the true ones
        self._serial = 0
        self._failures: dict[K, int] = {}
        self._changed = asyncio.Event()

    def __len__(self) -> int:
        """Keys that wait to be worked on now; those with a delay do not count."""
        return len(self._waiting)

    @property
    def working(self) -> int:
        """Keys that are being worked on."""
        return len(self._working)

    def add(self, key: K) -> None:
        """Asks for work on the key; while it is being worked on, for once more afterwards."""
        if key in self._waiting:
            return
        self._waiting.add(key)
        if key not in self._working:
            self._ready.append(key)
            self._changed.set()

    def add_after(self, key: K, seconds: float) -> None:
        """Asks for work on the key in some seconds. The earliest of several such wishes wins."""
        if seconds <= 0:
            self.add(key)
            return
        when = self._monotonic() + seconds
        if key in self._timers and self._timers[key][0] <= when:
            return
        self._serial += 1
        self._timers[key] = (when, self._serial)
        heapq.heappush(self._heap, (when, self._serial, key))
        self._changed.set()

    def add_limited(self, key: K, at_least: float = 0, at_most: float = LAST_DELAY) -> float:
        """Asks for work on a key that failed, later each time; answers after how many seconds."""
        failures = self._failures.get(key, 0)
        self._failures[key] = failures + 1
        delay = max(at_least, min(at_most, FIRST_DELAY * 2.0 ** min(failures, 30)))
        delay *= 1 + _JITTER * self._uniform()
        self.add_after(key, delay)
        return delay

    def forget(self, key: K) -> None:
        """The key's work went well: its next failure waits the shortest time again."""
        self._failures.pop(key, None)

    def take(self) -> K | None:
        """The next key to work on now, if there is one. Timers of it are answered by this work."""
        self._ring()
        if not self._ready:
            return None
        key = self._ready.popleft()
        self._waiting.discard(key)
        self._timers.pop(key, None)
        self._working.add(key)
        return key

    def done(self, key: K) -> None:
        """Ends the work on a key."""
        self._working.discard(key)
        if key in self._waiting:
            self._ready.append(key)
            self._changed.set()

    def seconds_to_next(self) -> float | None:
        """Seconds until the next timer rings; None when there is none."""
        self._drop_outdated()
        return max(0.0, self._heap[0][0] - self._monotonic()) if self._heap else None

    async def get(self) -> K:
        """Waits for the next key. For one waiting task."""
        while (key := self.take()) is None:
            self._changed.clear()
            try:
                async with asyncio.timeout(self.seconds_to_next()):
                    await self._changed.wait()
            except TimeoutError:
                pass
        return key

    def _ring(self) -> None:
        now = self._monotonic()
        self._drop_outdated()
        while self._heap and self._heap[0][0] <= now:
            _, _, key = heapq.heappop(self._heap)
            del self._timers[key]
            self.add(key)
            self._drop_outdated()

    def _drop_outdated(self) -> None:
        while self._heap and self._timers.get(self._heap[0][2]) != self._heap[0][:2]:
            heapq.heappop(self._heap)
