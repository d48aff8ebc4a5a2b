"""Trying again what a store refused or the network lost: with growing waits, within a budget of time."""

from __future__ import annotations

import errno
import logging
import os
import random
import re
import time
from collections.abc import Callable
from typing import Final, TypeVar

T = TypeVar("T")

_SECONDS: Final = 10.0  # a person waits; pods are given more by FINETUNE_STORAGE_PATIENCE
_FIRST_WAIT: Final = 0.5
_LONGEST_WAIT: Final = 30.0
# The same request would be answered the same way.
_FINAL_WORDS: Final = (
    "NO_SUCH_BUCKET",
    "NO_SUCH_KEY",
    "ACCESS_DENIED",
    "INVALID_ACCESS_KEY_ID",
    "SIGNATURE",
    "HTTP status 401",
    "HTTP status 403",
    "HTTP status 404",
    "] 401 ",  # Azure: its own word stands in the brackets
    "] 403 ",
    "] 404 ",
    "UNAUTHENTICATED",  # Google
    "PERMISSION_DENIED",
)
_PASSING: Final = (errno.ECONNREFUSED, errno.ECONNRESET, errno.EPIPE, errno.ETIMEDOUT, errno.EIO, errno.EAGAIN)

_log = logging.getLogger(__name__)


def persistently(
    action: Callable[[], T],
    *,
    moved: Callable[[], int] = lambda: 0,
    sleep: Callable[[float], None] = time.sleep,
    now: Callable[[], float] = time.monotonic,
) -> T:
    """The result of `action`, which is called again after an OSError that may pass.

    The budget is FINETUNE_STORAGE_PATIENCE in seconds, counted from the last time that something moved.

    Args:
        moved: grows when an attempt got on, such as by bytes that it need not bring again.

    Raises:
        OSError: the last one, when it will not pass or the budget is used.
    """
    patience = float(os.environ.get("FINETUNE_STORAGE_PATIENCE", _SECONDS))
    started, wait, before = now(), _FIRST_WAIT, moved()
    while True:
        try:
            return action()
        except OSError as error:
            if not may_pass(error):
                raise
            if moved() > before:
                started, wait, before = now(), _FIRST_WAIT, moved()
            pause = wait * random.uniform(0.5, 1.0)
            if now() - started + pause > patience:
                raise
            _log.warning("storage: %s; trying again in %.1f s", words(str(error))[:300], pause)
            sleep(pause)
            wait = min(2 * wait, _LONGEST_WAIT)


def words(said: str) -> str:
    """What a store said, in one line, without the queries of its URLs: Azure's hold a shared access signature."""
    return re.sub(r"(://[^\s?]*)\?[^\s']*", r"\1", " ".join(said.split()))


def may_pass(error: OSError) -> bool:
    """Whether the same request may be answered otherwise later: not for what a disk says, nor for a clear refusal."""
    if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError):
        return False
    if error.errno is not None:
        return error.errno in _PASSING
    return not any(word in str(error) for word in _FINAL_WORDS)
