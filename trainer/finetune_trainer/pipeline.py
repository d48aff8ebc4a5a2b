"""The main job on one machine: prepare, train, finish, in one run folder that the same command goes on from."""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from finetune_api.errors import Interrupted, ModelError, SpecError, StorageError
from finetune_api.files import load_job
from finetune_api.job import FinetuneJobSpec
from finetune_api.result import Result
from finetune_api.run import CHECKPOINTS, METRICS_FILE, PREPARED, RUN_FILE, Device, RunConfig
from finetune_trainer import base_model
from finetune_trainer.finish import Price, finish
from finetune_trainer.manifest import Manifest, write_json
from finetune_trainer.origin import ORIGIN_FILE
from finetune_trainer.planning import PLAN_FILE, JobPlan, plan
from finetune_trainer.prepare import Opener, prepare
from finetune_trainer.progress import Display, TrainingStatus, count
from finetune_trainer.ray_adapter import train_with_ray
from finetune_trainer.reporter import Event, MetricsFile
from finetune_trainer.tracking import check_tracking, tracked

# A checkpoint made under other values of these could not be gone on from.
_FIXED = ("model", "method", "data", "training", "deepspeed")


@contextmanager
def open_run(file: Path, work: Path | None, *, fresh: bool) -> Iterator[RunConfig]:
    """The run of the job in `file`, begun or gone on with; no other process gets it meanwhile.

    Args:
        file: holds one FinetuneJob. Relative paths in it start from its folder and may not leave it.
        work: the run folder; by default `runs/<name>` below the current folder.
        fresh: forget what the run folder holds.

    Raises:
        SpecError: the file is wrong, or the folder holds checkpoints of a job that differs in what they depend on.
        StorageError: another run works in the folder.
    """
    job = load_job(file)
    work = (work or Path("runs") / job.metadata.name).resolve()
    base_dir = file.parent.resolve()
    with _locked(work):
        if fresh:
            _empty(work)
        model = _model_folder(job.spec.model.source, base_dir, work)
        run = RunConfig(
            name=job.metadata.name,
            uid=_uid(job.spec, work),
            spec=job.spec,
            base_dir=str(base_dir),
            model_path=str(model),
            work=str(work),
        )
        write_json(work / RUN_FILE, run.model_dump(mode="json"))
        yield run


def prepare_stage(
    run: RunConfig, display: Display, should_stop: Callable[[], bool], opener: Opener | None = None
) -> Manifest:
    """Rows become shards, with a plan of the run beside them.

    Args:
        opener: opens the machine that works, where the run does not say which.

    Raises:
        SpecError: the job does not fit its GPUs.
    """
    check_tracking(run.spec)
    with display.stage("prepare") as stage:

        def progress(done: float, total: float, what: str) -> None:
            if should_stop():
                raise Interrupted("stopped while preparing the rows", hint="The same command begins this stage again.")
            stage.update(what, done, total)

        stage.update("plan the run")
        planned = _plan(run)
        manifest = prepare(run, progress, opener=opener)
        if planned:
            write_json(Path(run.work) / PREPARED / PLAN_FILE, replace(planned, manifest=manifest).as_json())
        train = manifest.splits.train
        stage.summary = (
            f"{count(train.documents)} documents, {count(train.tokens)} tokens in {count(train.sequences)} sequences"
        )
    return manifest


def _plan(run: RunConfig) -> JobPlan | None:
    """The plan before the rows are known; None when what is wrong with the model is better said by `prepare`."""
    try:
        planned = plan(run.spec, Path(run.model_path), run.device or Device())
    except ModelError:
        return None
    if not planned.fits:
        raise planned.refusal()
    return planned


def train_stage(
    run: RunConfig,
    manifest: Manifest,
    display: Display,
    should_stop: Callable[[], bool],
    observe: Callable[[Event], None] = lambda event: None,
) -> None:
    """Shards become weights in `<work>/export`; `observe` is told every event."""
    status = TrainingStatus()
    with (
        display.stage("train") as stage,
        MetricsFile(Path(run.work) / METRICS_FILE) as metrics,
        tracked(run, stage.note) as track,
    ):

        def on_event(event: Event) -> None:
            metrics.event(event)
            observe(event)
            track(event)
            line = status.update(event)
            if event["event"] in ("warning", "retry", "spike"):
                stage.note(line)
            stage.update(line, status.step, status.total or None, now=event["event"] != "step")

        stage.update(f"starting {run.spec.workers.count} workers")
        train_with_ray(run, on_event, should_stop)
        if status.outcome == "interrupted":
            raise Interrupted(
                f"stopped at step {status.step} of {status.total}"
                + ("; a checkpoint was written" if status.step else ", before the first one was done"),
                hint="The same command goes on from there.",
            )
        stage.summary = f"{status.step} steps"


def finish_stage(run: RunConfig, price: Price | None, display: Display, should_stop: Callable[[], bool]) -> Result:
    """Weights are published, base and tuned compared, the report written."""
    with display.stage("finish") as stage:

        def progress(text: str) -> None:
            if should_stop():
                raise Interrupted("stopped after training", hint="The same command goes on from there.")
            stage.update(text)

        result = finish(run, seconds=display.seconds, price=price, progress=progress)
        stage.summary = "weights published, report written"
    return result


def _model_folder(source: str, base_dir: Path, work: Path) -> Path:
    """The base model's folder on this machine: where it is, or a copy in the run folder."""
    if folder := base_model.in_place(source, base_dir):
        return folder
    copy = work / f"model-{hashlib.sha256(source.encode()).hexdigest()[:12]}"  # another source is another model
    if not (copy / ORIGIN_FILE).exists():
        base_model.fetch(base_model.look(source, base_dir), copy, base_dir)
    return copy


def _uid(spec: FinetuneJobSpec, work: Path) -> str:
    """The uid of the run that is there, or of a new one."""
    file = work / RUN_FILE
    if not file.exists():
        return uuid.uuid4().hex
    before = RunConfig.model_validate_json(file.read_bytes())
    old, new = (each.model_dump(include={*_FIXED}, exclude={"data": {"prepare"}}) for each in (before.spec, spec))
    changed = [name for name in _FIXED if old[name] != new[name]]
    if changed and any((work / CHECKPOINTS).glob("*")):
        raise SpecError(
            f"spec.{changed[0]} is not what this run began with, and its checkpoints depend on it",
            where=str(work),
            hint="Begin again with --fresh, or use another --work-dir for the changed job.",
        )
    return before.uid


def _empty(work: Path) -> None:
    """Removes a run's files.

    Raises:
        SpecError: the folder holds other things and no run; they are left as they are.
    """
    entries = [entry for entry in work.iterdir() if entry.name != _LOCK]
    if entries and not (work / RUN_FILE).exists():
        raise SpecError(
            "--fresh empties a run folder, and this folder holds something else",
            where=str(work),
            hint="Name the folder of an earlier run, or one that is empty or not there yet.",
        )
    for entry in entries:
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()


_LOCK = "lock"


@contextmanager
def _locked(work: Path) -> Iterator[None]:
    """Keeps a second run out of the folder for as long as this process lives."""
    work.mkdir(parents=True, exist_ok=True)
    with (work / _LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StorageError(
                "another run works in this folder", where=str(work), hint="Wait for it, or use another --work-dir."
            ) from None
        yield
