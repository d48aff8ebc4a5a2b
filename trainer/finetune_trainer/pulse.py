"""A worker's side of the watch: the loop says when it gets on, a thread beside it tells that to the watch."""

from __future__ import annotations

import os
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Final, Protocol

from finetune_trainer.stacks import all_threads, stack_of
from finetune_trainer.watch import Beat, Order, Watch, interval

EXIT_CODE: Final = 6  # TrainingError's


class Watcher(Protocol):
    """`watch.Watch`, here or in another process."""

    def beat(self, beat: Beat) -> Order: ...

    def done(self, rank: int) -> None: ...


class Pulse:
    """What the loop has done so far. Made in the thread that trains; every worker calls `on` at the same places."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.moves, self.doing, self.step = 0, "start", 0
        self._started: float | None = None  # when the step began; the first one loads and compiles, and is not usual
        self._seconds: deque[float] = deque(maxlen=16)

    def on(self, doing: str) -> None:
        """The loop got on: it has done this, or begins what may take long (`watch.py`)."""
        self.doing = doing
        self.moves += 1

    def step_done(self, step: int) -> None:
        """An optimizer step is finished, so many in all."""
        now = time.monotonic()
        if self._started is not None:
            self._seconds.append(now - self._started)
        self._started, self.step = now, step

    def beat(self, rank: int, node: str) -> Beat:
        """Where the worker is now."""
        usual = statistics.median(list(self._seconds)) if self._seconds else 0.0
        return Beat(rank, node, self.moves, self.doing, self.step, usual)


_current: ContextVar[Pulse | None] = ContextVar("pulse", default=None)


def current_pulse() -> Pulse:
    """The pulse of the `watched` block around this call; one that nobody takes where there is none."""
    return _current.get() or Pulse()


@contextmanager
def watched(watcher: Watcher, rank: int, node: str, limit: float) -> Iterator[None]:
    """Tells `watcher` every few seconds where this worker, whose thread this is, stands, until the block is left.

    When the watcher has seen a hang it takes the stacks and ends this process: a thread that waits in a collective
    cannot be woken by anything else.
    """
    pulse, left = Pulse(), threading.Event()
    token = _current.set(pulse)
    arguments = (pulse, watcher, rank, node, interval(limit), left)
    thread = threading.Thread(target=_tell, args=arguments, name="watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        left.set()
        _current.reset(token)
        thread.join(timeout=5.0)  # the watcher's process may be gone


class Alone:
    """Watches one worker from its own process, where nobody sees them all (torchrun); stacks go to stderr."""

    def __init__(self, rank: int, limit: float) -> None:
        self._watch = Watch([rank], limit)

    def beat(self, beat: Beat) -> Order:
        order = self._watch.beat(beat)
        verdict = self._watch.verdict()
        if order == "leave" and verdict:
            print(f"{verdict.hang}\n{verdict.stacks}", file=sys.stderr, flush=True)
        return order

    def done(self, rank: int) -> None:
        self._watch.done(rank)


def _tell(pulse: Pulse, watcher: Watcher, rank: int, node: str, seconds: float, left: threading.Event) -> None:
    try:
        while not left.wait(seconds):
            order = watcher.beat(pulse.beat(rank, node))
            if order == "tell":
                beat = pulse.beat(rank, node)
                order = watcher.beat(replace(beat, stack=stack_of(pulse.thread), threads=all_threads()))
            if order == "leave":
                sys.stdout.flush()
                os._exit(EXIT_CODE)
        watcher.done(rank)
    except Exception as error:  # whoever watches is gone; that is no reason to stop training
        print(f"no longer watched for hangs: {type(error).__name__}", file=sys.stderr)
