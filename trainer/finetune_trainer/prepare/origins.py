"""Finds the rows that prepared sequences are made of: file and line, never what they say.

The shards keep no origins. The job's files are read once more, as `prepare` reads them, and their documents compared
with those of the sequences by hash: a pass over the rows, for the rare case that somebody asks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from finetune_api.errors import SpecError
from finetune_api.run import PREPARED, RunConfig
from finetune_trainer.dataset import PackedDataset
from finetune_trainer.prepare.pool import Pool
from finetune_trainer.prepare.sources import find_files
from finetune_trainer.prepare.stage import worker_settings
from finetune_trainer.prepare.tasks import tasks


def origins(run: RunConfig, sequences: Sequence[int], workers: int = 0) -> list[list[str]]:
    """For each training sequence the places, file:line, of the rows in it, in its order.

    A row that stands in the files several times has several places. Built-in rows, and files of code that were joined
    to a repository, have none.

    Args:
        workers: processes that tokenise; 0 tokenises in this one.

    Raises:
        SpecError: there is no such sequence.
        StorageError: nothing is prepared, or the rows cannot be read.
    """
    data = PackedDataset(Path(run.work) / PREPARED, "train")
    for sequence in sequences:
        if not 0 <= sequence < len(data):
            raise SpecError(f"there is no sequence {sequence}", where=run.work, hint=f"they are 0 to {len(data) - 1}")
    wanted = [list(_hashes(data[n].input_ids, data[n].documents)) for n in sequences]
    places: dict[bytes, list[str]] = {digest: [] for digests in wanted for digest in digests}
    files = find_files(run)
    with Pool(replace(worker_settings(run), near_duplicates=False), workers) as pool:
        for result in pool.map(task for index, file in enumerate(files) for task in tasks(index, file)):
            for row, digest in zip(result.rows, _hashes(result.ids, result.sizes), strict=True):
                if digest in places:
                    places[digest].append(files[result.file].position(int(result.numbers[row])))
    return [[place for digest in digests for place in places[digest]] for digests in wanted]


def _hashes(ids: npt.NDArray[np.int32], sizes: npt.NDArray[np.int32]) -> Iterator[bytes]:
    """One for each document."""
    ends = np.cumsum(sizes)
    for start, end in zip(ends - sizes, ends, strict=True):
        yield hashlib.blake2b(np.ascontiguousarray(ids[start:end], dtype=np.int32).tobytes(), digest_size=16).digest()
