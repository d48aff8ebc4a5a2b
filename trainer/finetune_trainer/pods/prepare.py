"""The stage prepare in a pod: rows become shards under the work prefix, before a GPU is taken."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from finetune_api.errors import StorageError
from finetune_api.run import PREPARED, RunConfig
from finetune_trainer import base_model, pipeline
from finetune_trainer.origin import Origin
from finetune_trainer.planning import PLAN_FILE
from finetune_trainer.pods import exchange
from finetune_trainer.pods.place import Place, read_run
from finetune_trainer.pods.report import reported, status_plan
from finetune_trainer.progress import Display


def prepare(run_file: Path, should_stop: Callable[[], bool]) -> None:
    """Prepares the job's rows; done again, it finds them under the work prefix.

    Raises:
        FinetuneError: what is wrong with job, rows, model or storage; the termination message says it, too.
    """
    place, display = Place.here(), Display()
    with reported(place.termination) as ending:
        run = read_run(run_file)
        local = place.local(run)
        Path(local.work).mkdir(parents=True, exist_ok=True)
        origin = _model(run, local, place)
        try:
            exchange.fetch_prepared(run, local)
        except StorageError as error:
            display.console.print(f"what was prepared before is not used: {error.what}", markup=False)
        pipeline.prepare_stage(local, display, should_stop)
        exchange.publish_prepared(run, local)
        plan = Path(local.work) / PREPARED / PLAN_FILE
        ending.facts = {
            "plan": status_plan(json.loads(plan.read_bytes())) if plan.exists() else None,
            "base_model_sha": origin.commit if origin else None,
            "manifest_sha256": exchange.manifest_sha256(run),
        }


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
