"""Who works on rows and tokens: this machine's processes here, a Ray cluster in `cluster`.

A machine does what takes long: it reads, tokenises, compares signatures and writes shards. What is decided about the
rows is decided in `stage`, once, from what every machine hands back in the same order.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, Protocol

import numpy as np

from finetune_trainer.manifest import Split, SplitFacts, TokenizerFacts
from finetune_trainer.prepare.collect import Collection
from finetune_trainer.prepare.deduplicate import Signatures, SpilledSignatures
from finetune_trainer.prepare.layout import Layout
from finetune_trainer.prepare.pool import Pool
from finetune_trainer.prepare.shards import ShardWriter
from finetune_trainer.prepare.sources import SourceFile, fingerprint
from finetune_trainer.prepare.tasks import tasks
from finetune_trainer.prepare.work import Result

Progress = Callable[[float, float, str], None]  # done, total, what is being done

_BYTES_A_WORKER: Final = 4 << 20  # a smaller share is done before a process has started
_PROGRESS_SEQUENCES: Final = 1024


class Machine(Protocol):
    """The long work, in the order in which it is asked for."""

    def fingerprints(self, files: Sequence[SourceFile], progress: Progress) -> list[str]:
        """Hashes of the files as they are stored."""

    def facts(self) -> TokenizerFacts:
        """The tokenizer's facts, for the manifest."""

    def results(self, files: Sequence[SourceFile], progress: Progress) -> Iterator[Result]:
        """The rows of all files, in order; where a file is damaged, after the results before it, its error is raised.

        A machine that keeps the tokens itself leaves them out.
        """

    def signatures(self, collection: Collection) -> Signatures:
        """Signatures of the rows that were collected."""

    def write_split(
        self, folder: Path, split: Split, collection: Collection, layout: Layout, progress: Progress
    ) -> SplitFacts:
        """Writes the split's shards into the folder."""


class ThisMachine:
    """Processes of this machine."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    def fingerprints(self, files: Sequence[SourceFile], progress: Progress) -> list[str]:
        """See `Machine`."""
        total = sum(file.stored.size for file in files)
        read = 0

        def done(count: int) -> None:
            nonlocal read
            read += count
            progress(read, total, "read")

        return [fingerprint(file, done) for file in files]

    def facts(self) -> TokenizerFacts:
        """See `Machine`."""
        return self._pool.facts()

    def results(self, files: Sequence[SourceFile], progress: Progress) -> Iterator[Result]:
        """See `Machine`."""
        found = self._pool.map(task for index, file in enumerate(files) for task in tasks(index, file))
        yield from reported(found, files, progress)
        self._pool.close()  # its processes hold a tokenizer each

    def signatures(self, collection: Collection) -> Signatures:
        """See `Machine`."""
        return SpilledSignatures(collection.minima, collection.folder)

    def write_split(
        self, folder: Path, split: Split, collection: Collection, layout: Layout, progress: Progress
    ) -> SplitFacts:
        """See `Machine`."""
        writer = ShardWriter(folder, split)
        ends = np.append(0, np.cumsum(layout.groups))
        group = 0
        for number, count in enumerate(layout.sequences.tolist()):
            bounds = ends[group : group + count + 1]
            group += count
            parts = [collection.document(index) for index in layout.documents[bounds[0] : bounds[-1]].tolist()]
            sizes = np.array([len(ids) for ids, _ in parts], dtype=np.int32)
            writer.add(
                np.concatenate([ids for ids, _ in parts]),
                np.concatenate([weights for _, weights in parts]),
                np.add.reduceat(sizes, bounds[:-1] - bounds[0], dtype=np.int32),
            )
            if number % _PROGRESS_SEQUENCES == 0:
                progress(number, len(layout.sequences), f"pack {split}")
        return writer.close()


def reported(results: Iterator[Result], files: Sequence[SourceFile], progress: Progress) -> Iterator[Result]:
    """Passes the results on and reports how much of the files is done."""
    before = np.cumsum([0, *(file.stored.size for file in files)]).tolist()
    for result in results:
        yield result
        progress(before[result.file] + result.read, before[-1], "tokenise")


def processes(files: Sequence[SourceFile]) -> int:
    """One process for each core this process may use, or fewer for little data."""
    share = sum(file.stored.size for file in files) // _BYTES_A_WORKER
    return max(1, min(cores(), share))


def cores() -> int:
    """Cores that this process may use: of a container's limit, too, which the scheduler's affinity does not show."""
    found = len(os.sched_getaffinity(0))
    limit = Path("/sys/fs/cgroup/cpu.max")
    quota, _, period = limit.read_text().partition(" ") if limit.is_file() else ("max", "", "")
    return found if quota == "max" else max(1, min(found, int(quota) // int(period)))
