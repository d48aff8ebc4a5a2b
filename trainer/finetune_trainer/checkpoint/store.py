"""One worker's side of the checkpoints of a run: writes, uploads, agrees, finds and loads them.

    save      each worker writes its shard to its disk: training stands still for this only
    upload    in a thread: to the disk for sure, SHA-256, into the bucket when there is one
    agree     after a later step, when every worker is through: the workers tell each other sizes and hashes
    complete  a thread of rank 0 writes the marker, then deletes what is no longer kept

Without a bucket the shared local folder is the truth. With one, the bucket is, and the local folder a cache.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Final

from finetune_api.errors import FinetuneError, StorageError, TrainingError
from finetune_api.run import checkpoint_name
from finetune_trainer import storage
from finetune_trainer.checkpoint.background import Pace, in_background
from finetune_trainer.checkpoint.catalog import Broken, Catalog, Checkpoint, File, sha256
from finetune_trainer.checkpoint.restore import Restorer
from finetune_trainer.checkpoint.shard import shard_name, write_shard
from finetune_trainer.checkpoint.state import TrainedState
from finetune_trainer.distributed import World
from finetune_trainer.storage import Location
from finetune_trainer.weights import on_rank_0

_FAILURES: Final = 2  # uploads in a row that may fail before the run does
Report = Callable[..., None]  # (event, **fields)


class CheckpointStore:
    """The checkpoints of a run. Every worker has one; what is a collective says so.

    Args:
        local: folder on this worker's disk.
        remote: folder in object storage; None: `local` is one folder for all workers, and the truth.
        identity: what must be the same to go on from a checkpoint.
        keep: complete checkpoints to keep.
        report: takes events; called on rank 0's main thread.
        bytes_per_second: bound of this worker's upload.
    """

    def __init__(
        self,
        engine: Any,
        world: World,
        *,
        local: Path,
        remote: Location | None,
        identity: dict[str, Any],
        keep: int,
        report: Report,
        bytes_per_second: float | None = None,
    ) -> None:
        self._state = state = TrainedState(engine, world.rank, world.size)
        self._world, self._keep, self._report = world, keep, report
        self._local, self._remote = local, remote
        self._catalog = Catalog(remote or storage.resolve(str(local), local))
        self._identity = identity | {"parameters": state.digest}
        self._rate = bytes_per_second
        self._pace = Pace(None)
        self._first_here = int(os.environ.get("LOCAL_RANK", "0")) == 0
        self._step = 0  # of the checkpoint that is being uploaded
        self._started = 0.0
        self._upload: Future[dict[str, File]] | None = None  # of this worker's shard
        self._marker: tuple[Checkpoint, float, Future[None]] | None = None  # of rank 0: when begun, its thread
        self._failures = 0
        self._waiting = 0.0  # since when training waits for the last checkpoint

    @property
    def busy(self) -> bool:
        """On rank 0: whether a checkpoint is on its way to the bucket. Another one would come too soon."""
        return self._remote is not None and (self._upload is not None or self._marker is not None)

    def settled(self) -> bool:
        """Whether this worker's part of the checkpoint that is being uploaded is through, well or badly."""
        return self._upload is not None and self._upload.done()

    def restore(self) -> int | None:
        """Loads the newest good checkpoint; its step, or None when there is none. A collective.

        Raises:
            TrainingError: it is a checkpoint of other data, another seed, global batch or parameters.
            StorageError: the storage does not answer.
        """
        found, broken = on_rank_0(self._world, self._catalog.complete)
        restorer = Restorer(self._state, self._world, self._catalog, self._local)
        loaded = None
        for checkpoint in found:
            self._check(checkpoint)
            why = restorer.load(checkpoint)
            if why is None:
                loaded = checkpoint
                break
            broken.append(Broken(checkpoint.name, why))
        for folder in broken:
            if loaded is None or folder.name > loaded.name:
                self._report("warning", message=f"{folder.name} is no checkpoint to go on from: {folder.why}")
        self._forget_newer(loaded.name if loaded else "")
        return loaded.step if loaded else None

    def save(self, step: int) -> float:
        """Writes this worker's shard and has it uploaded. A collective.

        One that is still on its way to the bucket is given up; one on its way to the disk is waited for.

        Returns:
            Seconds that training stood still.

        Raises:
            StorageError: a worker could not write its shard; the same on every worker.
        """
        started = time.monotonic()
        if self._remote is None:
            self._settle()
        self._step, self._started = step, started
        path = self._local / checkpoint_name(step) / shard_name(self._world.rank, self._world.size)
        self._agree(self._write(path))
        self._pace.end()
        self._pace = pace = Pace(self._rate)
        self._upload = in_background(lambda: {path.name: self._through(path, pace)}, "checkpoint upload")
        return time.monotonic() - started

    def after_step(self, settled: bool) -> None:
        """Takes the checkpoint that is being uploaded as far as it goes without waiting. A collective.

        Args:
            settled: every worker's part is through, by `settled`; the same on every worker.

        Raises:
            StorageError: storing a checkpoint failed for the second time in a row.
        """
        if settled:
            self._agree_on_parts()
        self._poll()

    def _agree_on_parts(self) -> None:
        """After every worker's part is through: has the marker written. A collective."""
        assert self._upload is not None
        error = self._upload.exception()
        if error is not None and not isinstance(error, OSError | FinetuneError):
            raise error
        mine = str(error) if error else self._upload.result()
        told = self._world.gather((mine, self._failures))
        parts, self._failures = [part for part, _ in told], told[0][1]  # rank 0 counts, it writes markers, too
        self._upload = None
        failed = [part for part in parts if isinstance(part, str)]
        if failed:
            self._fail(failed[0])
            return
        files = {name: file for part in parts if not isinstance(part, str) for name, file in part.items()}
        checkpoint = Checkpoint(self._step, self._world.size, self._identity, files)
        if self._remote is not None and self._first_here:
            self._drop_local(keep=checkpoint.name)
        if self._world.rank == 0:
            self._wait_for_marker()
            thread = in_background(lambda: self._complete(checkpoint), "checkpoint marker")
            self._marker = checkpoint, self._started, thread

    def _poll(self) -> None:
        """Reports a checkpoint that has become complete; rank 0 knows."""
        if self._marker is not None and self._marker[-1].done():
            checkpoint, started, marker = self._marker
            self._marker = None
            error = marker.exception()
            if isinstance(error, FinetuneError):
                self._fail(str(error))
                return
            marker.result()
            self._failures = 0
            now = time.monotonic()
            self._report(
                "checkpoint-complete",
                step=checkpoint.step,
                bytes=checkpoint.bytes,
                seconds=now - started,
                waited=now - self._waiting if self._waiting else 0.0,
            )

    def finish(self) -> None:
        """After the last step: waits until the last saved checkpoint is complete. A collective.

        Raises:
            StorageError: it cannot be; the same on every worker.
        """
        self._waiting = time.monotonic()
        self._failures = _FAILURES - 1  # no later one will make up for it
        self._settle()
        on_rank_0(self._world, self._wait_for_marker)

    def _settle(self) -> None:
        """Waits until every worker's part is through. A collective."""
        if self._upload is not None:  # so on every worker
            self._upload.exception()  # waits
            self._agree_on_parts()

    def _wait_for_marker(self) -> None:
        if self._marker is not None:
            self._marker[-1].exception()
        self._poll()

    def _write(self, path: Path) -> str | None:
        """Writes the shard; what went wrong."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_shard(path, self._state)
        except OSError as error:
            free = os.statvfs(self._local if self._local.exists() else "/")
            path.unlink(missing_ok=True)
            return f"{error.strerror or error}; {free.f_bavail * free.f_frsize:,} bytes are free"
        return None

    def _agree(self, problem: str | None) -> None:
        """Raises on every worker what one of them met."""
        if self._world.sums([problem is not None])[0]:
            rank, first = next((r, p) for r, p in enumerate(self._world.gather(problem)) if p is not None)
            raise StorageError(
                f"worker {rank} cannot write a checkpoint: {first}",
                where=str(self._local),
                hint="free some disk space, or lower checkpoint.keep; the same command goes on from the last one",
            )

    def _through(self, path: Path, pace: Pace) -> File:
        """To the disk for sure, and into the bucket; in the upload's thread."""
        with path.open("rb") as file:
            os.fsync(file.fileno())
        described: File = {"bytes": path.stat().st_size, "sha256": sha256(path)}
        if self._remote is not None:
            target = self._catalog.folder(path.parent.name).inside(path.name)
            storage.upload(path, target, pace)
        return described

    def _complete(self, checkpoint: Checkpoint) -> None:
        """In rank 0's second thread."""
        self._catalog.complete_with(checkpoint)
        self._catalog.prune(self._keep)

    def _fail(self, why: str) -> None:
        self._failures += 1
        if self._failures >= _FAILURES:
            raise StorageError(
                f"the checkpoint of step {self._step} could not be stored: {why}",
                where=self._catalog.root.uri,
                hint="the same command goes on from the last complete checkpoint",
            )
        self._report(
            "warning", message=f"the checkpoint of step {self._step} could not be stored and is left out: {why}"
        )

    def _check(self, checkpoint: Checkpoint) -> None:
        changed = [key for key, value in self._identity.items() if checkpoint.identity.get(key) != value]
        if changed:
            raise TrainingError(
                f"the checkpoint cannot be continued: {', '.join(changed)} changed since it was written",
                where=self._catalog.folder(checkpoint.name).uri,
                hint=f"undo the change, or delete {self._catalog.root.uri} to start anew",
            )

    def _forget_newer(self, loaded: str) -> None:
        """Deletes what is newer: unfinished or broken, it would be taken for the newest when its step comes again."""

        def remove() -> None:
            for name in self._catalog.names():
                if name > loaded:
                    self._catalog.remove(name)

        on_rank_0(self._world, remove)
        if self._remote is not None and self._first_here:
            self._drop_local(keep=loaded)
        self._world.barrier()

    def _drop_local(self, keep: str) -> None:
        """Empties the cache on this disk but for one checkpoint."""
        cache = Catalog(storage.resolve(str(self._local), self._local))
        for name in cache.names():
            if name != keep:
                cache.remove(name)
