"""Lives of a distributed run: real worker processes that can be killed at any moment, each on a disk of its own.

The workers are forked from a server that has the libraries in memory, so that a life costs little.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

from finetune_api.run import METRICS_FILE, PREPARED, RunConfig
from finetune_trainer import storage
from finetune_trainer.reporter import Event, MetricsFile
from tests.ports import free_port

_POLL_SECONDS = 0.002
_END_SECONDS = 60.0


class Machines:
    """Disks for the workers of a run: prepared rows on each, and nothing shared but object storage."""

    def __init__(self, folder: Path, run: RunConfig, count: int) -> None:
        self.runs = [run.model_copy(update={"work": str(folder / f"disk-{rank}")}) for rank in range(count)]
        for each in self.runs:
            shutil.copytree(Path(run.work) / PREPARED, Path(each.work) / PREPARED)

    @property
    def metrics(self) -> Path:
        return Path(self.runs[0].work) / METRICS_FILE

    def begin(self, environment: Mapping[str, str], remote: str | None, **spec: object) -> list[BaseProcess]:
        """Starts a worker on each disk. SIGTERM asks one to stop.

        Args:
            environment: of the workers, such as the bucket's credentials.
            remote: URI of the run's folder in object storage.
            spec: fields of the job's spec that are others in this life.
        """
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["finetune_trainer.train", "deepspeed"])
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(len(self.runs))}
        workers: list[BaseProcess] = []
        for rank, run in enumerate(self.runs):
            own = {**environment, **place, "RANK": str(rank), "LOCAL_RANK": "0"}
            run = run.model_copy(update={"spec": run.spec.model_copy(update=spec)})
            workers.append(context.Process(target=_live, args=(run, own, remote)))
            workers[-1].start()
        return workers


def wait_for(condition: Callable[[], bool], workers: Sequence[BaseProcess]) -> bool:
    """Whether the condition was met while all workers lived."""
    while all(worker.is_alive() for worker in workers):
        if condition():
            return True
        time.sleep(_POLL_SECONDS)
    return False


def end(workers: Sequence[BaseProcess]) -> list[int | None]:
    """Waits until all have ended; their exit codes."""
    until = time.monotonic() + _END_SECONDS
    for worker in workers:
        worker.join(max(0.0, until - time.monotonic()))
    codes = [worker.exitcode for worker in workers]
    for worker in workers:
        worker.kill()
        worker.join()
    return codes


class _Nobody:
    def event(self, event: Event) -> None:
        pass


def _live(run: RunConfig, environment: dict[str, str], remote: str | None) -> None:
    os.environ.update(environment)
    import torch

    from finetune_trainer.train import train

    torch.set_num_threads(1)
    told: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: told.append(number))
    location = storage.resolve(remote, run.base_dir) if remote else None
    if environment["RANK"] != "0":
        train(run, _Nobody(), remote=location, should_stop=lambda: bool(told))
        return
    with MetricsFile(Path(run.work) / METRICS_FILE) as metrics:
        train(run, metrics, remote=location, should_stop=lambda: bool(told))
