"""Sends a run's curves to TensorBoard, MLflow or Weights & Biases: into files unless `uri` names a server.

A tracker never stops or slows training: it works in a thread of its own, and when it fails that is said once.
"""

from __future__ import annotations

import importlib.util
import os
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, Protocol

from finetune_api.errors import SpecError
from finetune_api.job import FinetuneJobSpec
from finetune_api.run import RunConfig
from finetune_api.stage import STORAGE_SECRET_PATH
from finetune_trainer.reporter import Event

TRACKING: Final = "tracking"  # folder in the run folder
_PACKAGES: Final = {"tensorboard": "tensorboardX", "mlflow": "mlflow", "wandb": "wandb"}
_SECRETS: Final = {"mlflow": "MLFLOW_TRACKING_TOKEN", "wandb": "WANDB_API_KEY"}
_WAITING: Final = 10_000  # events that may wait for a slow tracker, before some are left out
_LAST_SECONDS: Final = 30.0  # that the end of a run waits for it
_STEP: Final = {
    "loss": "train/loss",
    "learningRate": "train/learning_rate",
    "gradNorm": "train/grad_norm",
    "tokensPerSecond": "train/tokens_per_second",
    "seconds": "train/step_seconds",
    "mfu": "train/mfu",
    "memoryBytes": "train/memory_bytes",
    "epoch": "train/epoch",
}
_KINDS: Final[Mapping[str, Mapping[str, str]]] = {
    "step": _STEP,
    "evaluation": {"loss": "eval/loss"},
    "checkpoint": {"seconds": "checkpoint/seconds"},
    "spike": {"loss": "train/loss_spike"},
}


class Tracker(Protocol):
    """Where values go; each call may take long and may fail."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self, *, complete: bool) -> None: ...


def check_tracking(spec: FinetuneJobSpec) -> None:
    """Asks whether the tracker's package is there, before anything is spent.

    Raises:
        SpecError: it is not, or the settings contradict each other.
    """
    if spec.tracking.kind == "tensorboard" and spec.tracking.uri:
        raise SpecError("tensorboard writes files and has no server", where="spec.tracking.uri", hint="leave it out")
    package = _PACKAGES.get(spec.tracking.kind)
    if package and importlib.util.find_spec(package) is None:
        raise SpecError(
            f"the package {package} is not installed here",
            where="spec.tracking.kind",
            hint="install finetune[tracking] (in a cluster: an image that has it), or leave spec.tracking out",
        )


def values_of(event: Event) -> dict[str, float]:
    """What of an event is tracked, by the names that the trackers show."""
    names = _KINDS.get(event["event"], {})
    return {name: float(event[field]) for field, name in names.items() if event.get(field) is not None}


@contextmanager
def tracked(
    run: RunConfig, warn: Callable[[str], None], connect: Callable[[RunConfig], Tracker] | None = None
) -> Iterator[Callable[[Event], None]]:
    """Yields what takes the run's events; on leaving, waits a little until they have arrived.

    Args:
        warn: told once, from another thread, when the tracker fails.
    """
    if run.spec.tracking.kind == "none":
        yield lambda event: None
        return
    waiting: queue.Queue[Event | None] = queue.Queue(_WAITING)
    arguments = (run, connect or _connect, waiting, warn)
    thread = threading.Thread(target=_track, args=arguments, name="tracking", daemon=True)
    thread.start()

    def take(event: Event) -> None:
        if values_of(event) or event["event"] == "end":
            with suppress(queue.Full):
                waiting.put_nowait(event)

    try:
        yield take
    finally:
        with suppress(queue.Full):
            waiting.put(None, timeout=_LAST_SECONDS)
        thread.join(_LAST_SECONDS)


def _track(
    run: RunConfig,
    connect: Callable[[RunConfig], Tracker],
    waiting: queue.Queue[Event | None],
    warn: Callable[[str], None],
) -> None:
    try:
        tracker, complete = connect(run), False
        while (event := waiting.get()) is not None:
            complete = event.get("reason") == "complete"
            if values := values_of(event):
                tracker.log(event["step"], values)
        tracker.close(complete=complete)
    except Exception as error:  # the thread's border: whatever a tracker does, training goes on
        warn(f"{run.spec.tracking.kind} takes no more figures, and training goes on: {type(error).__name__}")


def _connect(run: RunConfig) -> Tracker:
    kind = run.spec.tracking.kind
    folder = Path(run.work) / TRACKING / kind
    folder.mkdir(parents=True, exist_ok=True)
    if (name := _SECRETS.get(kind)) and (file := Path(STORAGE_SECRET_PATH) / name).is_file():
        os.environ[name] = file.read_text(encoding="utf-8").strip()
    kinds: dict[str, Callable[[RunConfig, Path], Tracker]]
    kinds = {"tensorboard": _TensorBoard, "mlflow": _Mlflow, "wandb": _Wandb}
    return kinds[kind](run, folder)


def _settings(run: RunConfig) -> dict[str, Any]:
    """What the run is made of, for the tracker's table of runs: no addresses, no prompts."""
    spec = run.spec
    method = {"objective": spec.method.objective, "tuning": spec.method.tuning, "rank": spec.method.lora.rank}
    return method | spec.training.model_dump(by_alias=True, mode="json", exclude_none=True)


class _TensorBoard:
    """Event files in the run folder."""

    def __init__(self, run: RunConfig, folder: Path) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self, *, complete: bool) -> None:
        self._writer.close()


class _Mlflow:
    """A tracking server, or files in the run folder."""

    def __init__(self, run: RunConfig, folder: Path) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # files are what there is without a server
        from mlflow.tracking import MlflowClient

        tracking = run.spec.tracking
        self._client = MlflowClient(tracking.uri or folder.as_uri())
        found = self._client.get_experiment_by_name(tracking.project)
        experiment = found.experiment_id if found else self._client.create_experiment(tracking.project)
        earlier = self._client.search_runs([experiment], f"tags.finetune = '{run.uid}'", max_results=1)
        self._run = earlier[0] if earlier else self._client.create_run(experiment, run_name=run.name)
        self._id = self._run.info.run_id
        self._client.set_tag(self._id, "finetune", run.uid)
        for name, value in _settings(run).items():
            self._client.log_param(self._id, name, value)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._client.log_metric(self._id, name, value, step=step)

    def close(self, *, complete: bool) -> None:
        self._client.set_terminated(self._id, "FINISHED" if complete else "KILLED")


class _Wandb:
    """A server of one's own, or files in the run folder that `wandb sync` sends later."""

    def __init__(self, run: RunConfig, folder: Path) -> None:
        import wandb

        tracking = run.spec.tracking
        settings: dict[str, Any] = {
            "console": "off",
            "silent": True,
            "disable_git": True,
            "disable_code": True,
            "x_disable_stats": True,
            "x_disable_meta": True,
        }
        if tracking.uri:
            settings["base_url"] = tracking.uri
        self._end = wandb.teardown
        self._run = wandb.init(
            project=tracking.project,
            name=run.name,
            id=run.uid,
            dir=str(folder),
            mode="online" if tracking.uri else "offline",
            resume="allow" if tracking.uri else None,
            config=_settings(run),
            settings=wandb.Settings(**settings),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self, *, complete: bool) -> None:
        self._run.finish(exit_code=0 if complete else 1)
        self._end()  # waits until its process has written everything
