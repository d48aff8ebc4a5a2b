"""A worker that hangs is named, with the place, and training goes on without it: real processes that really hang."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from multiprocessing.managers import BaseManager
from pathlib import Path
from typing import Any

import psutil
import torch

from finetune_api.run import ERROR_LOG, RunConfig
from finetune_trainer.dataset import PackedDataset, PackedSequence
from finetune_trainer.pulse import EXIT_CODE, watched
from finetune_trainer.ray_adapter import train_with_ray
from finetune_trainer.reporter import Event
from finetune_trainer.train import train
from finetune_trainer.watch import Watch
from tests.tiny import tiny_llama
from tests.trainer.runs import documents, prepare_sequences, run_config
from tests.trainer.workers import NoReporter


class Manager(BaseManager):
    """Holds the watch for workers in other processes, as an actor does under Ray."""


Manager.register("Watch", Watch)


def two_workers(folder: Path, **changes: Any) -> RunConfig:
    """Two ZeRO-2 workers, a checkpoint every second step."""
    prepare_sequences(folder, [[document] for document in documents(12, seed=2)])
    model = tiny_llama(folder / "model")
    changes = {"workers": {"count": 2}, "deepspeed": {"zeroStage": 2}, "checkpoint": {"everySteps": 2}} | changes
    return run_config(folder, model, **changes)


class StuckData(PackedDataset):
    """Gives three sequences, and then waits for a disk that is gone."""

    given = 0

    def __getitem__(self, index: int) -> PackedSequence:
        if StuckData.given == 3:
            time.sleep(600)
        StuckData.given += 1
        return super().__getitem__(index)


def hang_in_rank_1(rank: int, run: RunConfig, watch: Watch, limit: float) -> None:
    """One worker's process."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{run.work}/store", rank=rank, world_size=2)
    if rank == 1:
        import finetune_trainer.train

        vars(finetune_trainer.train)["PackedDataset"] = StuckData
    with watched(watch, rank, "here", limit):
        train(run, NoReporter())


def test_a_worker_that_waits_for_ever_is_named_with_the_place(tmp_path: Path) -> None:
    limit, run = 10.0, two_workers(tmp_path, training={"maxSteps": 50})
    context = multiprocessing.get_context("spawn")
    with Manager(ctx=context) as manager:
        watch: Watch = manager.Watch(range(2), limit)  # type: ignore[attr-defined]
        workers = [context.Process(target=hang_in_rank_1, args=(rank, run, watch, limit)) for rank in range(2)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        verdict = watch.verdict(look=False)
    codes = [worker.exitcode for worker in workers]  # who goes second may see that the first is gone
    assert EXIT_CODE in codes
    assert 0 not in codes
    assert verdict is not None
    assert verdict.hang.rank == 1
    assert "rank 1 on here stood still for" in verdict.hang.what
    assert "trainer/test_hang.py" in verdict.hang.what
    assert "__getitem__ < finetune_trainer/batches.py" in verdict.hang.what
    assert "1 other waits for it" in verdict.hang.what
    assert "rank 0 on here" in verdict.stacks
    assert "all_reduce" in verdict.stacks, "where the other one waits"


def test_a_stopped_worker_is_named_and_training_resumes_without_it(tmp_path: Path) -> None:
    run = two_workers(tmp_path, training={"maxSteps": 10}, limits={"hangTimeout": "10s", "retries": 1})
    events: list[Event] = []
    stopped: list[tuple[float, int]] = []

    def on_event(event: Event) -> None:
        events.append(event)
        if event["event"] == "step" and event["step"] >= 4 and not stopped:
            processes = psutil.Process().children(recursive=True)
            worker = next(p for p in processes if "RayTrainWorker" in " ".join(p.cmdline()))
            os.kill(worker.pid, signal.SIGSTOP)
            stopped.append((time.time(), worker.pid))

    train_with_ray(run, on_event, lambda: False)
    kinds = [event["event"] for event in events]
    hang, retry = (events[kinds.index(kind)] for kind in ("hang", "retry"))
    assert kinds[-1] == "end"
    assert kinds.count("hang") == 1
    assert retry["reason"].startswith(f"rank {hang['rank']} on ")
    assert "no longer answered" in retry["reason"]
    assert 10 <= hang["time"] - stopped[0][0] < 120
    assert [event["resumedFromStep"] for event in events if event["event"] == "start"][1] >= 4
    assert not psutil.pid_exists(stopped[0][1])
    told = (tmp_path / ERROR_LOG).read_text()
    assert f"rank {1 - hang['rank']} on " in told
    assert "train_step" in told, "the stack of the one that waited"
