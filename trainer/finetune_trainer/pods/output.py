"""A process's output, copied to its container's log line by line.

Ray keeps the output of its workers, and of a driver that KubeRay submits, in files of its own: `kubectl logs` shows
what the container's first process writes.
"""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path
from typing import Final

from finetune_api.stage import RANK_MARK

_STREAMS: Final = (1, 2)


def copy_output(container: Path, rank: int | None = None) -> bool:
    """From now on lines of this process also go to the container's log; False where that cannot be.

    Args:
        container: the file that is the container's log.
        rank: marks each line as this worker's.
    """
    try:
        log = os.open(container, os.O_WRONLY | os.O_APPEND | os.O_NOCTTY)
    except OSError:
        return False  # another user's, or no container: Ray's own files have it all the same
    if os.path.sameopenfile(log, _STREAMS[0]):
        os.close(log)
        return True
    mark = b"" if rank is None else RANK_MARK.format(rank).encode()
    for stream in _STREAMS:
        own = os.dup(stream)
        reader, writer = os.pipe()
        os.dup2(writer, stream)
        os.close(writer)
        threading.Thread(target=_copy, args=(reader, own, log, mark), name=f"output-{stream}", daemon=True).start()
    return True


def _copy(reader: int, own: int, log: int, mark: bytes) -> None:
    with os.fdopen(reader, "rb") as lines:
        for line in lines:
            _write(own, line)
            _write(log, mark + line)  # one write: lines of several processes do not mix


def _write(target: int, line: bytes) -> None:
    with contextlib.suppress(OSError):  # a full disk or a reader that left must not end the training
        os.write(target, line)
