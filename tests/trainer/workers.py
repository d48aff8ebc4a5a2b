"""Two training workers on this machine's CPU, without Ray: one process group for any number of runs."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from finetune_api.run import METRICS_FILE, RunConfig
from finetune_trainer.reporter import Event, MetricsFile


class NoReporter:
    def event(self, event: Event) -> None:
        pass


def train_with_workers(runs: Sequence[RunConfig], world_size: int, store: Path) -> None:
    """Trains each run in turn with `world_size` processes that share one process group.

    Args:
        store: a new file through which the workers find each other.
    """
    in_workers(_train_all, world_size, store, list(runs))


def in_workers(work: Callable[..., None], world_size: int, store: Path, *args: object) -> None:
    """Calls `work(rank, *args)` in `world_size` processes that share a process group; fails when one of them fails."""
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=_worker, args=(work, rank, world_size, store, args)) for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * world_size


def _worker(work: Callable[..., None], rank: int, world_size: int, store: Path, args: tuple[object, ...]) -> None:
    import torch
    import torch.distributed as dist

    from finetune_trainer.distributed import leave

    os.environ["LOCAL_RANK"] = str(rank)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    try:
        work(rank, *args)
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # the others wait in a collective: no clean end is to be had
    dist.destroy_process_group()
    leave(0)


def _train_all(rank: int, runs: list[RunConfig]) -> None:
    from finetune_trainer.train import train

    for run in runs:
        if rank:
            train(run, NoReporter())
        else:
            with MetricsFile(Path(run.work) / METRICS_FILE) as metrics:
                train(run, metrics)
