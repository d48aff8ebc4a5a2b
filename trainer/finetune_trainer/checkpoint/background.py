"""Work beside training: its outcome is looked at later, and it never keeps a process from ending."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def in_background(work: Callable[[], T], name: str) -> Future[T]:
    """Runs `work` in a thread of its own. (An executor's threads would be waited for when the process ends.)"""
    future: Future[T] = Future()

    def run() -> None:
        try:
            result = work()
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future


class Superseded(Exception):
    """The work is of no use any more."""


class Pace:
    """Holds an upload back to a number of bytes a second, and ends it when it is of no use any more."""

    def __init__(self, bytes_per_second: float | None) -> None:
        self._rate = bytes_per_second
        self._begun = time.monotonic()
        self._bytes = 0
        self._ended = threading.Event()

    def __call__(self, size: int) -> None:
        """Waits until `size` more bytes may go.

        Raises:
            Superseded: after `end`.
        """
        if self._rate:
            self._ended.wait(max(0.0, self._begun + self._bytes / self._rate - time.monotonic()))
        self._bytes += size
        if self._ended.is_set():
            raise Superseded

    def end(self) -> None:
        self._ended.set()
