"""What runs on the worker pods: a rank's share of the training, then the finish on the pod that has the weights."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final

from finetune_api.errors import Interrupted
from finetune_api.run import RESULT_FILE, RunConfig
from finetune_trainer import egress, storage
from finetune_trainer.finish import Price, check_gates, finish
from finetune_trainer.pods import exchange
from finetune_trainer.pods.output import copy_output
from finetune_trainer.pods.place import Place
from finetune_trainer.report import REPORT_FILES
from finetune_trainer.reporter import Reporter

_SAID_SECONDS: Final = 5.0


def train_rank(
    run: RunConfig, rank: int, reporter: Reporter, should_stop: Callable[[], bool], watch: AbstractContextManager[None]
) -> None:
    """One rank of the training, from fetching to the export. It is watched for hangs when it has all it needs.

    Raises:
        FinetuneError: the same on every rank, but for what only this pod's disk or network does.
    """
    from finetune_trainer.train import train

    place = Place.here()
    copy_output(place.output, rank)
    if os.environ.get("LOCAL_RANK", "0") == "0":  # once a pod
        egress.ask_beside(reporter, egress.destinations(os.environ))
    local = place.local(run)
    waiting = _Waiting(reporter if rank == 0 else None, should_stop)
    print("fetching model and rows", flush=True)
    exchange.fetch(run, local, lambda what, done, total: waiting(f"fetching the {what}: {done:,} of {total:,} bytes"))
    print("training", flush=True)
    with watch:
        outcome = train(local, reporter, should_stop=should_stop, remote=exchange.prefix(run))
    print(f"{outcome.reason} at step {outcome.step}", flush=True)


def finish_run(
    seconds: Mapping[str, float], run: RunConfig, reporter: Reporter, should_stop: Callable[[], bool]
) -> None:
    """Compares, publishes and reports; result.json under the work prefix is written last.

    Args:
        seconds: wall time of the stage `train`.

    Raises:
        GateFailed: a gate was missed; the result is there all the same.
        FinetuneError: a model does not load, the output cannot be written.
    """
    place = Place.here()
    copy_output(place.output, 0)
    local = place.local(run)
    exchange.fetch_metrics(run, local)
    result = finish(local, seconds=seconds, price=_price(run), progress=_Waiting(reporter, should_stop))
    target = exchange.prefix(run)
    for name in [*REPORT_FILES, RESULT_FILE]:
        storage.upload(Path(local.work) / name, target.inside(name))
    check_gates(result)


class _Waiting:
    """Tells the reporter now and then what is going on, so that nobody takes it for a hang; ends it on request."""

    def __init__(self, reporter: Reporter | None, should_stop: Callable[[], bool]) -> None:
        self._reporter, self._should_stop = reporter, should_stop
        self._said = float("-inf")

    def __call__(self, text: str) -> None:
        if self._should_stop():
            raise Interrupted("stopped on request", hint="the job goes on from its last checkpoint")
        if self._reporter and time.monotonic() - self._said >= _SAID_SECONDS:
            self._said = time.monotonic()
            self._reporter.event({"event": "working", "time": time.time(), "message": text})


def _price(run: RunConfig) -> Price | None:
    device, workers = run.device, run.spec.workers
    if device is None or device.price_per_hour is None:
        return None
    return Price(per_hour=device.price_per_hour * workers.count * workers.gpus_each, currency=device.currency)
