"""The commands that work on rows, models and weights: `finetune run`, `prepare`, `train` and `report`."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import click

from finetune_api.errors import StorageError
from finetune_api.result import Result
from finetune_api.run import EXPORT, METRICS_FILE, PREPARED, RESULT_FILE
from finetune_trainer.endpoints import served
from finetune_trainer.progress import Display
from finetune_trainer.reporter import read_metrics
from finetune_trainer.telemetry import Telemetry

_FILE = click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
_FILE_OR_RUN = click.argument("file", required=False, type=click.Path(exists=True, dir_okay=False, path_type=Path))
_RUN = click.option(
    "--run",
    "run_file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Instead of FILE, in a pod: the run.json that the operator mounted.",
)
_WORK = click.option(
    "--work-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Run folder: prepared rows, checkpoints, report.  [default: runs/NAME]",
)
_FRESH = click.option("--fresh", is_flag=True, help="Forget what the run folder holds and begin again.")


@click.command()
@_FILE
@_WORK
@_FRESH
@click.option(
    "--price-per-hour", type=click.FloatRange(min=0), help="What an hour of all workers costs, for the report."
)
@click.option("--currency", default="USD", show_default=True, help="Currency of the price.")
@click.option(
    "--metrics-port",
    type=click.IntRange(0, 65535),
    help="Serve /metrics and /progress on 127.0.0.1 at this port while it runs; 0 takes a free one.",
)
def run(
    file: Path,
    work_dir: Path | None,
    fresh: bool,
    price_per_hour: float | None,
    currency: str,
    metrics_port: int | None,
) -> None:
    """Finetune on this machine and show what changed.

    FILE holds one FinetuneJob. Its rows are prepared, the model is trained, weights and a report are written. Ctrl-C
    writes a checkpoint and leaves nothing running; the same command goes on from there.
    """
    from finetune_trainer import pipeline
    from finetune_trainer.finish import Price, check_gates
    from finetune_trainer.report import summary

    display = Display()
    price = None if price_per_hour is None else Price(per_hour=price_per_hour, currency=currency)
    with ExitStack() as stack:
        opened = stack.enter_context(pipeline.open_run(file, work_dir, fresh=fresh))
        stop = stack.enter_context(_stop_on_signals())
        telemetry = Telemetry(opened.work, attempt=1, now=time.monotonic())
        if metrics_port is not None:
            port = stack.enter_context(served(telemetry, metrics_port))
            display.console.print(f"metrics: http://127.0.0.1:{port}/metrics", highlight=False)
        manifest = pipeline.prepare_stage(opened, display, stop.is_set)
        pipeline.train_stage(
            opened, manifest, display, stop.is_set, lambda event: telemetry.event(event, time.monotonic())
        )
        result = pipeline.finish_stage(opened, price, display, stop.is_set)
    display.console.print(summary(result, Path(opened.work) / "report.html"))
    check_gates(result)


@click.command()
@_FILE_OR_RUN
@_RUN
@_WORK
def prepare(file: Path | None, run_file: Path | None, work_dir: Path | None) -> None:
    """Check the rows and turn them into token sequences; no GPU is needed.

    Bad rows are reported with file, line and field. `finetune run` and `finetune train` reuse what was prepared.
    """
    with _stop_on_signals() as stop:
        if file := _chosen(file, run_file, work_dir):
            from finetune_trainer import pipeline

            with pipeline.open_run(file, work_dir, fresh=False) as opened:
                pipeline.prepare_stage(opened, Display(), stop.is_set)
                click.echo(f"{opened.work}/{PREPARED}")
        elif run_file:
            from finetune_trainer.pods.prepare import prepare

            prepare(run_file, stop.is_set)


@click.command()
@_FILE_OR_RUN
@_RUN
@_WORK
def train(file: Path | None, run_file: Path | None, work_dir: Path | None) -> None:
    """Train on prepared rows (preparing them first if need be); weights end in the run folder.

    This is `finetune run` without the comparison, the publishing and the report. With --run, in a RayCluster's head
    pod, it does those too, and goes on answering on port 8090 when it has ended.
    """
    with _stop_on_signals() as stop:
        if file := _chosen(file, run_file, work_dir):
            from finetune_trainer import pipeline

            display = Display()
            with pipeline.open_run(file, work_dir, fresh=False) as opened:
                manifest = pipeline.prepare_stage(opened, display, stop.is_set)
                pipeline.train_stage(opened, manifest, display, stop.is_set)
                click.echo(f"{opened.work}/{EXPORT}")
        elif run_file:
            from finetune_trainer.pods.train import train

            train(run_file, stop.is_set)


@click.command()
@click.option(
    "--run",
    "run_file",
    required=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="The run.json that the operator mounted.",
)
def result(run_file: Path) -> None:
    """Say what came out of a run, in a pod: the operator reads it from the termination message."""
    from finetune_trainer.pods.result import result

    result(run_file)


@click.command()
@click.argument("model")
@click.argument("target")
def mirror(model: str, target: str) -> None:
    """Copy MODEL, hf://ORG/NAME@REVISION, to a folder in a bucket that stands in for the hub: TARGET, s3://BUCKET/KEY.

    Pods find it by hub.mirrorUri of their FinetuneRuntime, `finetune run` by FINETUNE_HF_MIRROR.
    """
    from finetune_trainer.mirror import mirror

    click.echo(mirror(model, target))


def _chosen(file: Path | None, run_file: Path | None, work_dir: Path | None) -> Path | None:
    """FILE, or None when --run is meant.

    Raises:
        UsageError: both or neither, or --work-dir with --run.
    """
    if (file is None) == (run_file is None):
        raise click.UsageError("give FILE, or --run in a pod, and not both")
    if run_file and work_dir:
        raise click.UsageError("--work-dir goes with FILE; a run.json names its work folder")
    return file


@click.command()
@click.argument("work_dir", type=click.Path(exists=True, file_okay=False, path_type=Path))
def report(work_dir: Path) -> None:
    """Write report.html, report.md and report.json of a finished run again, from its result.json and metrics.jsonl.

    WORK_DIR is the run folder, such as runs/NAME.
    """
    from finetune_trainer.report import summary, write_report

    file = work_dir / RESULT_FILE
    if not file.exists():
        raise StorageError("there is no finished run here", where=str(file), hint="Finish it with `finetune run`.")
    result = Result.model_validate_json(file.read_bytes())
    write_report(result, read_metrics(work_dir / METRICS_FILE), work_dir)
    Display().console.print(summary(result, work_dir / "report.html"))


@contextmanager
def _stop_on_signals() -> Iterator[threading.Event]:
    """An event that the first SIGINT or SIGTERM sets; a second one ends the process as it would by default."""
    stop = threading.Event()

    def handle(number: int, _frame: object) -> None:
        stop.set()
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        click.echo(" stopping: writing a checkpoint (again to end at once)", err=True)

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
