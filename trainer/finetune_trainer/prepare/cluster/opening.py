"""Whether a job's rows are prepared on a Ray cluster, and the way to that cluster."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pyarrow.fs as pafs

from finetune_trainer.prepare.cluster.exchange import Exchange
from finetune_trainer.prepare.machine import Machine
from finetune_trainer.prepare.work import Settings
from finetune_trainer.storage import Location

_STORE_BYTES: Final = 1 << 30  # memory for bundles on their way to the tokenizers


@contextmanager
def ray_machine(settings: Settings, partial: Path, spill: Path, workers: int) -> Iterator[Machine]:
    """The cluster that RAY_ADDRESS names, which has to see the folders, or one of this machine's cores."""
    from finetune_trainer.ray_adapter import local_cluster  # first: it gives Ray its settings
    from finetune_trainer.ray_cluster import connected

    from finetune_trainer.prepare.cluster.machine import Grain, RayMachine  # isort: skip

    there = os.environ.get("RAY_ADDRESS")
    with connected() if there else local_cluster(workers, 0, _STORE_BYTES):
        yield RayMachine(settings, folder(spill), folder(partial), Grain())


def folder(path: Path) -> Exchange:
    """A folder on a disk that all machines see."""
    return Exchange(Location(pafs.LocalFileSystem(), str(path), str(path)))
