"""Names what a machine runs out of while it trains: disk, memory, shared memory; and how much of it there is."""

from __future__ import annotations

import errno
import resource
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from finetune_api.errors import FinetuneError, HostMemoryFull, SharedMemoryFull, StorageError

SHARED: Final = Path("/dev/shm")
_FULL: Final = (errno.ENOSPC, errno.EDQUOT)
# What torch's CPU allocator, C++ and the kernel say; no type of its own stands for it.
_NO_MEMORY: Final = ("can't allocate memory", "cannot allocate memory", "bad_alloc", "unable to mmap")
MORE_MEMORY: Final = (
    "lower training.microBatch or data.sequenceLength, turn deepspeed.offload off, or use workers with more memory"
)


@contextmanager
def named(work: Path) -> Iterator[None]:
    """Turns the library's and the kernel's words for "full" into ours.

    Raises:
        StorageError: a disk is full; the fullest of the work folder's and the temporary files' is named.
        SharedMemoryFull: /dev/shm is.
        HostMemoryFull: the machine or the container has no more memory.
    """
    try:
        yield
    except (OSError, MemoryError, RuntimeError) as error:
        if (found := _name(error, work)) is not None:
            raise found from error
        raise


def _name(error: Exception, work: Path) -> FinetuneError | None:
    words = str(error).lower()
    no_space = getattr(error, "errno", None) in _FULL or "no space left on device" in words
    if no_space and str(SHARED) in words:
        return SharedMemoryFull(
            f"{SHARED} is full: {_room(SHARED)}",
            where=str(SHARED),
            hint="raise the runtime's resources.sharedMemory (docker run: --shm-size)",
        )
    if no_space:
        file = getattr(error, "filename", None)  # a write through an open file does not know its name
        places = [Path(file).parent if isinstance(file, str) else work, work, Path(tempfile.gettempdir())]
        fullest = min((place for place in places if place.exists()), key=lambda place: shutil.disk_usage(place).free)
        return StorageError(
            f"the disk is full: {_room(fullest)}",
            where=file if isinstance(file, str) else str(fullest),
            hint="free some of it, lower checkpoint.keep, or use a larger disk (the runtime's resources.scratch)",
        )
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM or _says(words):
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return HostMemoryFull(
            f"the machine's memory is full; this process used up to {used:,} bytes",
            hint=MORE_MEMORY,
        )
    return None


def _says(words: str) -> bool:
    return any(sign in words for sign in _NO_MEMORY)


def _room(place: Path) -> str:
    usage = shutil.disk_usage(place)
    return f"{usage.free:,} of {usage.total:,} bytes are free"
