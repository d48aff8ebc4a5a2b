"""Everything that can go wrong, as one tree.

    FinetuneError            exit 1   (a bug in finetune itself, or something nobody foresaw)
    ├── SpecError            exit 2   the job file: unknown field, value out of bounds, fields that contradict
    ├── DataError            exit 3   the user's rows: not JSON, wrong encoding, missing field, nothing to learn
    ├── ModelError           exit 4   the base model: missing file, no tokenizer, no chat template, pickle weights
    ├── StorageError         exit 5   the bucket or disk: unreachable, refused, full, changed under us
    ├── TrainingError        exit 6   the run itself: NaN loss, out of memory, a worker that died
    │   ├── Hang             exit 6   a worker stood still, and the others waited for it
    │   ├── GpuMemoryFull    exit 6   a GPU's memory did not hold the step
    │   ├── HostMemoryFull   exit 6   a machine's or container's memory did not hold the step
    │   ├── SharedMemoryFull exit 6   /dev/shm did not hold what workers share
    │   ├── NotFinite        exit 6   the loss or a gradient is not a number
    │   └── Preempted        exit 6   a node is taken away; a checkpoint was written
    ├── ExportError          exit 7   the written weights do not load or do not give the same logits
    ├── GateFailed           exit 8   the run finished and an evaluation gate was missed
    ├── TooManyRows          exit 9   more rows than one pod prepares; the operator gives it a Ray cluster
    └── Interrupted          exit 130 Ctrl-C or SIGTERM; a checkpoint was written, the same command goes on

Users see ``where: what`` and a line that says what to do, never a traceback.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import ClassVar


class FinetuneError(Exception):
    """A problem said in one sentence: what is wrong, where (file, line, field), and what to do."""

    exit_code: ClassVar[int] = 1

    def __init__(self, what: str, *, where: str = "", hint: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        head = f"{self.where}: {self.what}" if self.where else self.what
        return f"{head}\n  → {self.hint}" if self.hint else head

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions cross process borders (Ray, process pools): keep where and hint.
        return (_rebuild, (type(self), self.what, self.where, self.hint))


def _rebuild(kind: type[FinetuneError], what: str, where: str, hint: str) -> FinetuneError:
    return kind(what, where=where, hint=hint)


class SpecError(FinetuneError):
    exit_code = 2


class DataError(FinetuneError):
    exit_code = 3


class ModelError(FinetuneError):
    exit_code = 4


class StorageError(FinetuneError):
    exit_code = 5


class TrainingError(FinetuneError):
    exit_code = 6


class HostMemoryFull(TrainingError):
    pass


class SharedMemoryFull(TrainingError):
    pass


class Hang(TrainingError):
    def __init__(
        self, what: str, *, where: str = "", hint: str = "", rank: int | None = None, node: str | None = None
    ) -> None:
        super().__init__(what, where=where, hint=hint)
        self.rank = rank
        self.node = node

    def __reduce__(self) -> tuple[object, ...]:
        again = partial(Hang, where=self.where, hint=self.hint, rank=self.rank, node=self.node)
        return (again, (self.what,))


class GpuMemoryFull(TrainingError):
    pass


class NotFinite(TrainingError):
    pass


class Preempted(TrainingError):
    pass


class ExportError(FinetuneError):
    exit_code = 7


class GateFailed(FinetuneError):
    exit_code = 8


class TooManyRows(FinetuneError):
    exit_code = 9


class Interrupted(FinetuneError):
    exit_code = 130


def join(errors: Sequence[FinetuneError]) -> str:
    """All errors as one text, one after the other, in the order they were found."""
    return "\n".join(str(e) for e in errors)
