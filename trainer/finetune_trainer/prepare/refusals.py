"""Mixes the built-in refusal rows into a job's own: a source of rows that gives way, taken as often as asked for."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow.fs as pafs

from finetune_api.job import DataSource
from finetune_trainer import storage
from finetune_trainer.prepare.sources import BUILT_IN, SourceFile
from finetune_trainer.refusals import ROWS_FILE


def built_in_rows() -> SourceFile:
    """The built-in rows as a source of training rows."""
    location = storage.Location(pafs.LocalFileSystem(), str(ROWS_FILE), BUILT_IN)
    about = ROWS_FILE.stat()
    stored = storage.StoredFile(location, about.st_size, about.st_mtime_ns)
    return SourceFile(stored, ".jsonl", None, "train", DataSource(uri=BUILT_IN, format="completion"))


def times(mix: float, others: int, candidates: int) -> npt.NDArray[np.int64]:
    """How often each of the built-in rows is seen in an epoch, so that they are the share `mix` of all rows.

    Args:
        others: how many rows of the job's own are seen in an epoch.
        candidates: how many of the built-in rows there are to choose from.

    Returns:
        Numbers that differ by at most 1 and add up to others·mix / (1 - mix), rounded, 1 at least. The first are the
        larger: the kinds take turns in the file, so each has its share.
    """
    if not candidates:
        return np.zeros(0, np.int64)
    wanted = max(1, round(others * mix / (1 - mix)))
    return wanted // candidates + (np.arange(candidates) < wanted % candidates)
