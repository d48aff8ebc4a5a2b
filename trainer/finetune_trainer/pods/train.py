"""The stage train in a pod: the driver on the head, which starts ranks on the workers and tells what becomes of them.

It trains nothing itself. Model, rows, checkpoints and weights are on the workers' disks and under the work prefix; here
are the events, which the head's server shows and `metrics.jsonl` keeps.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from finetune_api.errors import FinetuneError, Interrupted, StorageError, TrainingError
from finetune_api.run import ERROR_LOG, METRICS_FILE, RunConfig
from finetune_api.status import Result
from finetune_trainer import storage
from finetune_trainer.pods import exchange
from finetune_trainer.pods.output import copy_output
from finetune_trainer.pods.place import Place, read_run
from finetune_trainer.pods.report import failure_of
from finetune_trainer.pods.result import as_status, read_result
from finetune_trainer.pods.worker import finish_run, train_rank
from finetune_trainer.progress import Display, Stage, TrainingStatus
from finetune_trainer.reporter import Event, MetricsFile
from finetune_trainer.tracking import tracked
from finetune_trainer.unfinished import end_unfinished


def train(run_file: Path, should_stop: Callable[[], bool]) -> None:
    """Trains the job's rows, publishes weights and report; the head's server says how it ended.

    Raises:
        Interrupted: it was asked to stop; there is a checkpoint.
        FinetuneError: why it failed.
    """
    from finetune_trainer.ray_cluster import HeadServer, connected

    place = Place.here()
    copy_output(place.output)
    run = read_run(run_file)
    with connected():
        server = HeadServer(run.work, place.attempt, place.port)
        try:
            _Driver(run, place, server.event, should_stop).run()
            result = as_status(run, read_result(run))
        except Interrupted:
            server.stop()
            raise
        except BaseException as error:
            server.fail(failure_of(error), _kept_aside(run))
            raise
        server.finish(result)


def _kept_aside(run: RunConfig) -> Result | None:
    """The result of a run that ended badly: of a missed gate there is one."""
    with contextlib.suppress(FinetuneError):
        return as_status(run, read_result(run))
    return None


class _Driver:
    """One attempt."""

    def __init__(
        self, run: RunConfig, place: Place, tell: Callable[[Event], None], should_stop: Callable[[], bool]
    ) -> None:
        self._run, self._local = run, place.local(run)
        self._tell, self._should_stop = tell, should_stop
        self._status, self._display = TrainingStatus(), Display()
        self._node = ""
        self._uploading = threading.Lock()

    def run(self) -> None:
        from finetune_trainer.ray_adapter import train_with_ray
        from finetune_trainer.ray_cluster import work_on

        Path(self._local.work).mkdir(parents=True, exist_ok=True)
        self._tidy()
        exchange.fetch_metrics(self._run, self._local)
        started = time.monotonic()
        log = Path(self._local.work) / ERROR_LOG
        with self._taking("train") as take, self._kept(log), self._curves(take) as follow:
            # Another attempt is the operator's to make: it numbers them and has the budget.
            train_with_ray(self._run, follow, self._should_stop, train_rank, log, retries=0)
            if self._status.outcome == "interrupted":
                raise Interrupted(
                    f"stopped at step {self._status.step} of {self._status.total}; a checkpoint was written",
                    hint="the job goes on from there",
                )
        with self._uploading:  # one that was under way must not end after this one
            exchange.publish_metrics(self._run, self._local)
        if not self._node:
            raise TrainingError("no worker said where the weights are", hint="see the workers' logs")
        finish = partial(finish_run, {"train": time.monotonic() - started})
        with self._taking("finish") as take:
            work_on(self._node, finish, self._run, take, self._should_stop)

    def _tidy(self) -> None:
        """Ends uploads of earlier attempts, of which none runs any more. That it fails is no reason to fail."""
        for folder in (exchange.prefix(self._run), storage.resolve(self._run.spec.output.uri, self._run.base_dir)):
            try:
                if ended := end_unfinished(folder):
                    print(f"{ended} unfinished uploads of earlier attempts are gone", flush=True)
            except StorageError as error:
                print(f"unfinished uploads of earlier attempts may be left: {error.what}", flush=True)

    @contextlib.contextmanager
    def _kept(self, log: Path) -> Iterator[None]:
        """Keeps the tracebacks of an unexpected failure beside the rows, since they may quote one."""
        log.unlink(missing_ok=True)
        try:
            yield
        except TrainingError as error:
            if log.exists():
                target = exchange.prefix(self._run).inside(ERROR_LOG)
                with contextlib.suppress(StorageError):
                    storage.upload(log, target)
                    error.where = target.uri
            raise

    @contextlib.contextmanager
    def _curves(self, take: Callable[[Event], None]) -> Iterator[Callable[[Event], None]]:
        """What takes the events, and sends them to the job's tracker; its files are kept beside the rows."""

        def follow(event: Event) -> None:
            take(event)
            track(event)

        try:
            with tracked(self._local, self._say) as track:
                yield follow
        finally:
            try:
                exchange.publish_curves(self._run, self._local)
            except StorageError as error:
                self._say(f"the tracker's files are not uploaded: {error.what}")

    def _say(self, message: str) -> None:
        self._display.console.print(message, markup=False)

    @contextlib.contextmanager
    def _taking(self, name: str) -> Iterator[Callable[[Event], None]]:
        """What takes the events of a stage: the file, the head's server and the log."""
        with self._display.stage(name) as stage, MetricsFile(Path(self._local.work) / METRICS_FILE) as metrics:
            yield lambda event: self._take(event, stage, metrics)

    def _take(self, event: Event, stage: Stage, metrics: MetricsFile) -> None:
        self._tell(event)
        if event["event"] == "working":
            stage.update(event["message"])
            return
        metrics.event(event)
        line = self._status.update(event)
        if event["event"] in ("warning", "spike"):
            stage.note(line)
        stage.update(line, self._status.step, self._status.total or None, now=event["event"] != "step")
        if event["event"] == "placed":
            self._node = event["node"]
        if event["event"] in ("checkpoint-complete", "end"):
            threading.Thread(target=self._upload, name="metrics", daemon=True).start()

    def _upload(self) -> None:
        """Uploads the events so far: with a checkpoint, so that none before it is lost. One upload at a time."""
        if self._uploading.acquire(blocking=False):
            try:
                exchange.publish_metrics(self._run, self._local)
            except StorageError as error:
                self._say(f"metrics.jsonl is not uploaded: {error.what}")
            finally:
                self._uploading.release()
