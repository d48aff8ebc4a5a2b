"""The stage prepare in a pod: rows become shards under the work prefix, before a GPU is taken."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

from finetune_api.errors import Interrupted, StorageError, TooManyRows
from finetune_api.run import PREPARED, RunConfig
from finetune_trainer import base_model, pipeline
from finetune_trainer.origin import Origin
from finetune_trainer.planning import PLAN_FILE
from finetune_trainer.pods import exchange
from finetune_trainer.pods.place import Place, read_run
from finetune_trainer.pods.report import reported, status_plan
from finetune_trainer.prepare import Opener
from finetune_trainer.prepare.cluster.opening import joining
from finetune_trainer.prepare.sources import find_files
from finetune_trainer.progress import Display

_UNPACKED: Final = 4  # times the size of compressed rows, about
_MOST_WORKERS: Final = 1024


def prepare(run_file: Path, should_stop: Callable[[], bool]) -> None:
    """Prepares the job's rows; done again, one pod finds them under the work prefix. Several are a Ray cluster.

    Raises:
        TooManyRows: they are more than one pod is to prepare; the termination message says how many are wanted.
        FinetuneError: what is wrong with job, rows, model or storage; the termination message says it, too.
    """
    place, display = Place.here(), Display()
    with reported(place.termination) as ending:
        run = read_run(run_file)
        if (workers := _wanted(run)) > 1:
            ending.facts = {"workers": workers}
            raise TooManyRows(
                f"the rows are for {workers} workers: one pod prepares {run.prepare_bytes:,} bytes",
                where="spec.data",
                hint="the operator starts them; spec.data.prepare.workers would say how many at once",
            )
        local = place.local(run)
        Path(local.work).mkdir(parents=True, exist_ok=True)
        origin = _model(run, local, place)
        if head := os.environ.get("FINETUNE_PREPARE_HEAD"):
            opener = _cluster(run, head, place, should_stop)
        else:
            opener = None
            _fetch(run, local, display)
        pipeline.prepare_stage(local, display, should_stop, opener)
        exchange.publish_prepared(run, local)
        plan = Path(local.work) / PREPARED / PLAN_FILE
        ending.facts = {
            "plan": status_plan(json.loads(plan.read_bytes())) if plan.exists() else None,
            "base_model_sha": origin.commit if origin else None,
            "manifest_sha256": exchange.manifest_sha256(run),
        }


def _wanted(run: RunConfig) -> int:
    """How many workers the rows are for, where nobody has said so."""
    if run.prepare_bytes is None:
        return 1
    files = find_files(run)
    size = sum(file.stored.size * (_UNPACKED if file.codec or file.kind == ".parquet" else 1) for file in files)
    return min(math.ceil(size / max(run.prepare_bytes, 1)), _MOST_WORKERS)


def _cluster(run: RunConfig, head: str, place: Place, should_stop: Callable[[], bool]) -> Opener:
    def tick() -> None:
        if should_stop():
            raise Interrupted("stopped before the workers were there", hint="The stage begins again.")

    workers = int(os.environ.get("FINETUNE_PREPARE_WORKERS", "1"))
    return joining(exchange.prefix(run), head, workers, place.address, tick)


def _fetch(run: RunConfig, local: RunConfig, display: Display) -> None:
    try:
        exchange.fetch_prepared(run, local)
    except StorageError as error:
        display.console.print(f"what was prepared before is not used: {error.what}", markup=False)


def _model(run: RunConfig, local: RunConfig, place: Place) -> Origin | None:
    """Brings here what of the model the rows and the plan need; None: every pod sees the model as a folder."""
    if base_model.in_place(run.spec.model.source, run.base_dir, place.claim):
        return None
    origin = exchange.origin(run)
    if origin is None or origin.source != run.spec.model.source:
        origin = base_model.look(run.spec.model.source, run.base_dir)
        exchange.keep_origin(run, origin, place.scratch)
    base_model.fetch(origin, Path(local.model_path), run.base_dir, weights=False)
    return origin
