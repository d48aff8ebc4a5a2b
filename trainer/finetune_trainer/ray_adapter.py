"""Runs the training loop on Ray Train: the only module that knows Ray.

The loop (`train.py`) sees an initialised process group, a reporter and a stop flag. Here they come from Ray: the
workers are Ray Train's, rank 0 reports to a `Progress` actor, and the driver reads that actor and asks it to stop.
"""

from __future__ import annotations

import contextlib
import math
import os
import platform
import re
import secrets
import shutil
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

from finetune_api.errors import FinetuneError, Hang, HostMemoryFull, TrainingError
from finetune_api.run import ERROR_LOG, RunConfig
from finetune_trainer import elastic
from finetune_trainer.faults import MORE_MEMORY
from finetune_trainer.pulse import watched
from finetune_trainer.reporter import Event, Progress, Reporter
from finetune_trainer.watch import Beat, Order, Verdict, Watch, collective_timeout, hang_limit

# Ray reads these once, when it is imported. A cluster's head pod has its own mode and token.
if "RAY_ADDRESS" not in os.environ and "RAY_AUTH_MODE" not in os.environ:
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Ray Train would start the workers again by itself, as often as it likes: nodes that go are `elastic`'s.
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
# A worker may have to wait for a node and for an image of many gigabytes.
os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "1800")

import psutil
import ray
from ray.actor import ActorHandle
from ray.exceptions import OutOfMemoryError
from ray.train import RunConfig as RayRunConfig
from ray.train import ScalingConfig, TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from finetune_trainer.ray_nodes import RayNodes

_POLL_SECONDS = 0.3
_EXIT_SECONDS = 10.0
_FIRST_ANSWER_SECONDS = 5.0
_EVENTS_BYTES = 100 << 20  # events and configurations only: tensors never go through the object store


class RayReporter:
    """Rank 0's side of the actor. Sending never waits for the driver."""

    def __init__(self, actor: ActorHandle[Progress]) -> None:
        self._actor = actor
        self._asked: Any = None
        self._stop, self._first = False, True

    def event(self, event: Event) -> None:
        self._actor.event.remote(event)

    def should_stop(self) -> bool:
        """The newest answer that has arrived; asks again without waiting for it. Before the first step it waits."""
        first, self._first = self._first, False
        if self._asked is None:
            self._asked = self._actor.stop_requested.remote()
        if ray.wait([self._asked], timeout=_FIRST_ANSWER_SECONDS if first else 0)[0]:
            self._stop = self._stop or bool(ray.get(self._asked))
            self._asked = None
        return self._stop


class _RayWatcher:
    """A worker's side of the watch's actor."""

    def __init__(self, actor: ActorHandle[Watch]) -> None:
        self._actor = actor

    def beat(self, beat: Beat) -> Order:
        order: Order = ray.get(self._actor.beat.remote(beat))
        return order

    def done(self, rank: int) -> None:
        self._actor.done.remote(rank)


# A rank's work: the run, its rank, where events go, what says that it is asked to stop, and the block in which it is
# watched for hangs.
Work = Callable[[RunConfig, int, Reporter, Callable[[], bool], AbstractContextManager[None]], None]


def _train(
    run: RunConfig, rank: int, reporter: Reporter, should_stop: Callable[[], bool], watch: AbstractContextManager[None]
) -> None:
    from finetune_trainer.train import train

    with watch:
        train(run, reporter, should_stop=should_stop)


def _worker(config: dict[str, Any]) -> None:
    """Runs on every Ray Train worker."""
    reporter, rank = RayReporter(config["progress"]), ray.train.get_context().get_world_rank()
    run = RunConfig.model_validate_json(config["run"])
    if rank == 0:
        node = ray.get_runtime_context().get_node_id()
        reporter.event({"event": "placed", "time": time.time(), "node": node})
    watch = watched(_RayWatcher(config["watch"]), rank, platform.node(), hang_limit(run.spec))
    config["work"](run, rank, reporter, reporter.should_stop, watch)


@contextlib.contextmanager
def local_cluster(cpus: float, gpus: int, object_store: int = _EVENTS_BYTES) -> Iterator[Path]:
    """A Ray cluster of this process's own, on loopback and behind a token; gone with its files on leaving.

    Where this process is connected to a cluster already, that one is used and left as it is.
    Yields a scratch folder for Ray Train's own state.
    """
    if ray.is_initialized():
        with tempfile.TemporaryDirectory(prefix="finetune-") as folder:
            yield Path(folder)
        return
    scratch = Path(tempfile.mkdtemp(prefix="finetune-"))
    on_terminate = signal.getsignal(signal.SIGTERM)
    others = set(psutil.Process().children(recursive=True))
    try:
        ray.init(
            num_cpus=max(os.cpu_count() or 1, math.ceil(cpus)),
            num_gpus=gpus or None,
            include_dashboard=False,
            object_store_memory=object_store,
            _node_ip_address="127.0.0.1",
            _temp_dir=str(scratch / "ray"),
            log_to_driver=False,
            logging_level="ERROR",
        )
        signal.signal(signal.SIGTERM, on_terminate)  # ray.init takes it: the run would end without a checkpoint
        yield scratch
    finally:
        processes = set(psutil.Process().children(recursive=True)) - others
        ray.shutdown()
        _, left = psutil.wait_procs(processes, timeout=_EXIT_SECONDS)  # actors notice the end by themselves, but later
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        shutil.rmtree(scratch, ignore_errors=True)


def train_with_ray(
    run: RunConfig,
    on_event: Callable[[Event], None],
    should_stop: Callable[[], bool],
    work: Work = _train,
    log: Path | None = None,
    retries: int | None = None,
    patience: float = elastic.PATIENCE_SECONDS,
) -> None:
    """Trains with `run.spec.workers` on Ray Train; returns when the workers have ended.

    Args:
        run: the run; its data are prepared.
        on_event: called in this thread with every event of `docs/design/run-folder.md`, in order.
        should_stop: polled in this thread; once true, the workers checkpoint and leave.
        work: what each rank does.
        log: where tracebacks of an unexpected failure go; by default error.log in the run's folder.
        retries: new attempts when a worker died and its node did not; by default `limits.retries`.
        patience: seconds that lost nodes may take to be replaced.

    Raises:
        Preempted: a node goes, and the job needs all of its workers.
        FinetuneError: what a worker raised, or TrainingError when one died and no retry is left.
    """
    log = log or Path(run.work) / ERROR_LOG
    workers, bounds = run.spec.workers, elastic.bounds(run.spec)
    with local_cluster(bounds.most * workers.cpus_each, workers.count * workers.gpus_each) as scratch:
        elastic.train(
            partial(_attempt, run, scratch, work, log),
            RayNodes(workers),
            bounds,
            on_event,
            should_stop,
            again=(_WorkerDied, Hang),
            retries=run.spec.limits.retries if retries is None else retries,
            patience=patience,
        )


class _WorkerDied(TrainingError):
    """A worker's process ended without an exception of its own: worth another attempt."""


def _attempt(
    run: RunConfig,
    scratch: Path,
    work: Work,
    log: Path,
    attempt: int,
    processes: int,
    on_event: Callable[[Event], None],
    should_stop: Callable[[], bool],
) -> FinetuneError | None:
    """One start of the worker group; what ended it early, or None when it ended well."""
    spec = run.spec
    limit = hang_limit(spec)
    progress = beside_driver(Progress).remote()
    watch = beside_driver(Watch).remote(range(processes), limit)
    threads = str(max(1, int(spec.workers.cpus_each)))
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"run": run.model_dump_json(), "progress": progress, "watch": watch, "work": work},
        torch_config=TorchConfig(timeout_s=math.ceil(collective_timeout(limit))),
        scaling_config=ScalingConfig(
            num_workers=processes,
            use_gpu=spec.workers.gpus_each > 0,
            resources_per_worker={"CPU": spec.workers.cpus_each},
        ),
        run_config=RayRunConfig(
            name=f"{run.uid}-{attempt}",  # our own checkpoints carry the state: Ray's snapshot must not be restored
            storage_path=str(scratch / "train"),
            worker_runtime_env={"env_vars": {"OMP_NUM_THREADS": threads}},
        ),
    )

    def look_and_ask() -> bool:
        ray.get(watch.verdict.remote(look=True))
        return should_stop()

    failure = followed(progress, lambda: _fit(trainer, log), on_event, look_and_ask)
    return _hang(ray.get(watch.verdict.remote(look=False)), log, on_event) or failure


def beside_driver(kind: Any) -> Any:
    """An actor class of this kind, to be made on the driver's node: its actors are lost only together with it."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here)(kind)


def followed(
    progress: ActorHandle[Progress],
    work: Callable[[], FinetuneError | None],
    on_event: Callable[[Event], None],
    should_stop: Callable[[], bool],
) -> FinetuneError | None:
    """What `work` returns; events that `progress` gets meanwhile are passed on, and a request to stop is passed in."""
    outcome: list[FinetuneError | None] = []
    thread = threading.Thread(target=lambda: outcome.append(work()), name="ray-work", daemon=True)
    thread.start()
    seen, asked = 0, False
    while True:
        running = thread.is_alive()
        events = ray.get(progress.since.remote(seen))
        seen += len(events)
        for event in events:
            on_event(event)
        if not running:
            return outcome[0]
        if should_stop() and not asked:
            progress.request_stop.remote()
            asked = True
        thread.join(_POLL_SECONDS)


def _hang(verdict: Verdict | None, log: Path, on_event: Callable[[Event], None]) -> Hang | None:
    """What the watch found: its end of the workers is why Ray Train ended."""
    if verdict is None:
        return None
    hang = verdict.hang
    log.write_text(f"{hang}\n\n{verdict.stacks}")
    on_event({"event": "hang", "time": time.time(), "step": verdict.step, "rank": hang.rank, "node": hang.node})
    return hang


def _fit(trainer: Any, log: Path) -> FinetuneError | None:
    """Runs Ray Train to its end; what went wrong as one sentence, with every traceback in `log`."""
    try:
        trainer.fit()
    except TrainingFailedError as error:
        failures = [failure for _, failure in sorted(getattr(error, "worker_failures", {}).items())]
        for failure in (*failures, error):
            if full := killed_for_memory(failure):  # the others only lost a peer
                log.write_text(str(error))
                return full
        for failure in failures:
            if isinstance(failure, FinetuneError):
                return failure
        log.write_text(str(error))
        if any(isinstance(failure, WorkerHealthCheckFailedError) for failure in failures):
            return _WorkerDied(
                "a training worker's process ended without saying why",
                where=str(log),
                hint="Often the machine ran out of memory: use fewer workers, a smaller sequenceLength or microBatch. "
                "The same command goes on from the last checkpoint.",
            )
        return _unexpected(failures[0] if failures else error, log)
    except Exception as error:  # the thread's border: the driver raises what is returned
        log.write_text(traceback.format_exc())
        return _unexpected(error, log)
    return None


def killed_for_memory(error: BaseException) -> HostMemoryFull | None:
    """What is meant when Ray's memory monitor ended a process, as a task, an actor or a worker of Ray Train."""
    wrapped = (getattr(error, name, None) for name in ("health_check_failure", "controller_failure"))
    words = next((str(each) for each in (error, *wrapped) if isinstance(each, OutOfMemoryError)), None)
    if words is None:
        return None
    figures = re.search(r"([\d.]+ ?[KMGT]?B) used / ([\d.]+ ?[KMGT]?B) limit", words)
    said = f": {figures[1]} of {figures[2]} were used" if figures else ""
    return HostMemoryFull(f"Ray ended a process because the memory of its node or pod was full{said}", hint=MORE_MEMORY)


def _unexpected(error: BaseException, log: Path) -> TrainingError:
    line = (str(error).strip() or "no message").splitlines()[0][:300]
    return TrainingError(
        f"training failed with {type(error).__name__}: {line}",
        where=str(log),
        hint="The file has the traceback of every worker. The same command goes on from the last checkpoint.",
    )
