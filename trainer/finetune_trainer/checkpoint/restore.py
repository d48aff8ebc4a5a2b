"""Loads a checkpoint: each worker fetches the shards that hold what it needs, and takes them only as they were written.

Workers are as many as those that wrote it, or more, or fewer: spans say which shards those are.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pyarrow.fs as pafs

from finetune_api.errors import StorageError
from finetune_trainer import storage
from finetune_trainer.checkpoint.catalog import Catalog, Checkpoint, sha256
from finetune_trainer.checkpoint.shard import Header, load_shard, missing, overlap, read_header, shard_name
from finetune_trainer.checkpoint.state import TrainedState
from finetune_trainer.distributed import World


class _Damaged(Exception):
    """A file of a checkpoint is not as it was written; says which and how."""


class Restorer:
    """Loads checkpoints of `catalog` into `state`, through the folder `local` on this worker's disk."""

    def __init__(self, state: TrainedState, world: World, catalog: Catalog, local: Path) -> None:
        self._state, self._world, self._catalog, self._local = state, world, catalog, local

    def load(self, checkpoint: Checkpoint) -> str | None:
        """Loads it, or says why it is not as it was written; nothing is loaded then. A collective.

        Raises:
            StorageError: the storage does not answer; the same on every worker.
        """
        shards: list[tuple[Path, Header]] = []
        outcome: str | StorageError | None = None
        try:
            shards = self._shards(checkpoint)
        except _Damaged as error:
            outcome = str(error)
        except StorageError as error:
            outcome = error
        outcomes = [o for o in self._world.gather(outcome) if o is not None]
        for found in outcomes:
            if isinstance(found, StorageError):
                raise found
        if outcomes:
            return str(outcomes[0])
        for path, header in shards:
            load_shard(path, header, self._state)
        self._state.refresh()
        return None

    def _shards(self, checkpoint: Checkpoint) -> list[tuple[Path, Header]]:
        """The shards that hold what this worker needs, on its disk and checked."""
        own = shard_name(self._world.rank, self._world.size)
        if own in checkpoint.files:
            shard = self._fetched(checkpoint, own)
            if not any(missing(self._state.held, [shard[1]])):
                return [shard]
        wanted = [name for name in sorted(checkpoint.files) if self._needed(self._header(checkpoint, name))]
        shards = [self._fetched(checkpoint, name) for name in wanted]
        absent = list(islice(missing(self._state.held, [header for _, header in shards]), 1))
        if absent:
            raise _Damaged(f"its shards do not hold all of {absent[0]}")
        return shards

    def _needed(self, header: Header) -> bool:
        return any(overlap(span, header.spans.get(span.name)) for span in self._state.held)

    def _header(self, checkpoint: Checkpoint, name: str) -> Header:
        location = self._catalog.folder(checkpoint.name).inside(name)
        if not storage.exists(location):
            raise _Damaged(f"{name} is missing")
        try:
            with storage.explained(location.uri):
                return read_header(location.fs, location.path)
        except ValueError:
            raise _Damaged(f"{name} is damaged: its first bytes make no sense") from None

    def _fetched(self, checkpoint: Checkpoint, name: str) -> tuple[Path, Header]:
        """A shard on this worker's disk, as it was written."""
        path = self._local / checkpoint.name / name
        source = self._catalog.folder(checkpoint.name).inside(name)
        why = _wrong(path, checkpoint, name)
        if why is not None and source.local != path:
            if not storage.exists(source):
                raise _Damaged(f"{name} is missing")
            mine = path.with_name(f"{name}.{self._world.rank}")  # another worker may fetch it here, too
            storage.download(source, mine)
            mine.replace(path)
            why = _wrong(path, checkpoint, name)
        if why is not None:
            raise _Damaged(f"{name} {why}")
        with storage.explained(str(path)):
            return path, read_header(pafs.LocalFileSystem(), str(path))


def _wrong(path: Path, checkpoint: Checkpoint, name: str) -> str | None:
    """How the file differs from what was written."""
    file = checkpoint.files[name]
    if not path.exists():
        return "is missing"
    size = path.stat().st_size
    if size != file["bytes"]:
        return f"has {size:,} bytes instead of {file['bytes']:,}"
    return None if sha256(path) == file["sha256"] else "is damaged: its SHA-256 is another"
