"""The ways to the Ray cluster that prepares a job's rows."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Final

import pyarrow.fs as pafs

from finetune_api.run import PREPARED
from finetune_trainer.manifest import MANIFEST_FILE
from finetune_trainer.prepare.cluster.exchange import Exchange
from finetune_trainer.prepare.machine import Machine
from finetune_trainer.prepare.work import Settings
from finetune_trainer.storage import Location, remove_file, remove_folder

Opener = Callable[[Settings, Path, Path], AbstractContextManager[Machine]]  # with the partial folder and its spill

EXCHANGE: Final = "prepare.exchange"
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


def joining(work: Location, head: str, workers: int, node_address: str | None, tick: Callable[[], None]) -> Opener:
    """Opens the cluster at `head` for a pod that shares nothing with the others but the prefix `work`.

    Shards are written where they stay, below `work`; what machines exchange lies beside them until the end.

    Args:
        workers: of the cluster.
        node_address: this pod's, where Ray would find another one.
        tick: called while workers are waited for; may raise.
    """

    @contextmanager
    def opened(settings: Settings, partial: Path, spill: Path) -> Iterator[Machine]:
        from finetune_trainer.prepare.cluster.machine import Grain, RayMachine
        from finetune_trainer.ray_joining import joined

        exchange, target = work.inside(EXCHANGE), work.inside(PREPARED)
        remove_folder(exchange)  # of a pod before this one, which was killed
        remove_file(target.inside(MANIFEST_FILE))  # shards are only as good as the manifest behind them
        for location in (exchange, target):
            if location.local:
                location.local.mkdir(parents=True, exist_ok=True)
        try:
            with joined(head, workers, node_address, tick):
                yield RayMachine(settings, Exchange(exchange), Exchange(target), Grain())
        finally:
            remove_folder(exchange)

    return opened


def folder(path: Path) -> Exchange:
    """A folder on a disk that all machines see."""
    return Exchange(Location(pafs.LocalFileSystem(), str(path), str(path)))
