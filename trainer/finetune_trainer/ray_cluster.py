"""What a driver in a RayCluster's head pod asks of Ray beside the training: the head's server, and work on a node."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from finetune_api.errors import FinetuneError, TrainingError
from finetune_api.run import RunConfig
from finetune_api.stage import StageFailure
from finetune_api.status import Result
from finetune_trainer.pods.head import Head
from finetune_trainer.ray_adapter import RayReporter, beside_driver, followed, killed_for_memory
from finetune_trainer.ray_nodes import draining
from finetune_trainer.reporter import Event, Progress, Reporter

# Work on one node: the run, where events go, and what says that it is asked to stop.
NodeWork = Callable[[RunConfig, Reporter, Callable[[], bool]], None]

_NAMESPACE: Final = "finetune"
_HEAD: Final = "head"
_COORDINATOR: Final = "AutoscalingCoordinator"  # Ray Train leaves it on the head for later runs
_ANSWER_SECONDS: Final = 30.0
_LOOK_SECONDS: Final = 0.5


@contextlib.contextmanager
def connected(address: str | None = None, node_address: str | None = None) -> Iterator[None]:
    """A connection to a cluster, which goes on afterwards.

    Args:
        address: of the cluster; by default the one that RAY_ADDRESS names.
        node_address: of this machine's node in it, where Ray would take another one.

    Raises:
        TrainingError: there is no such cluster.
    """
    on_terminate = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(
            address=address or os.environ.get("RAY_ADDRESS", "auto"),
            _node_ip_address=node_address,
            namespace=_NAMESPACE,
            log_to_driver=False,
            logging_level="ERROR",
        )
    except (ConnectionError, RayError) as error:
        raise TrainingError(
            f"no Ray cluster answers ({type(error).__name__})", hint="`--run` is for pods of a RayCluster"
        ) from None
    signal.signal(signal.SIGTERM, on_terminate)  # ray.init takes it: the run would end without a checkpoint
    try:
        yield
    finally:
        ray.shutdown()


class HeadServer:
    """The server on this node that answers for the run; it lives on when this process has ended.

    Raises:
        FinetuneError: its port is taken.
    """

    def __init__(self, work: str, attempt: int, port: int) -> None:
        with contextlib.suppress(ValueError):
            ray.kill(ray.get_actor(_HEAD))  # of a driver before this one
        detached = beside_driver(_Leaving).options(name=_HEAD, lifetime="detached")
        self._actor = detached.remote(work, attempt, port)
        try:
            ray.get(self._actor.ready.remote(), timeout=_ANSWER_SECONDS)
        except RayActorError as error:
            raise FinetuneError(f"the head's port {port} cannot be served on", hint="is it taken?") from error

    def event(self, event: Event) -> None:
        """Passes an event on, without waiting."""
        self._actor.event.remote(event)

    def finish(self, result: Result) -> None:
        """The run ended well."""
        self._end("finish", result.model_dump_json())

    def fail(self, failure: StageFailure, result: Result | None) -> None:
        """The run ended badly."""
        self._end("fail", failure.model_dump_json(), None if result is None else result.model_dump_json())

    def stop(self) -> None:
        """The run ended on request."""
        self._end("stop")

    def _end(self, how: str, *arguments: str | None) -> None:
        with contextlib.suppress(RayError):  # the operator then reads storage
            told = getattr(self._actor, how).remote(*arguments)
            ray.get([told, self._actor.leave_when_drained.remote()], timeout=_ANSWER_SECONDS)


class _Leaving(Head):
    """Ends with its pod: Ray waits for actors when a pod is told to end, for as long as a checkpoint may take."""

    def leave_when_drained(self) -> None:
        threading.Thread(target=self._leave, name="leave", daemon=True).start()

    def _leave(self) -> None:
        node = ray.get_runtime_context().get_node_id()
        while node not in draining():
            time.sleep(_LOOK_SECONDS)
        with contextlib.suppress(ValueError, RayError):
            ray.kill(ray.get_actor(_COORDINATOR, namespace=_COORDINATOR))
        os._exit(0)


def work_on(
    node: str,
    work: NodeWork,
    run: RunConfig,
    on_event: Callable[[Event], None],
    should_stop: Callable[[], bool],
) -> None:
    """Does `work` on a node, with the CPUs and GPUs of a worker there.

    Raises:
        FinetuneError: what it raised, or TrainingError when its process or node died.
    """
    progress = beside_driver(Progress).remote()
    workers = run.spec.workers
    task = ray.remote(_call).options(
        num_cpus=workers.cpus_each,
        num_gpus=workers.gpus_each,
        max_retries=0,
        scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
    )
    failure = followed(
        progress, lambda: _outcome(task.remote(work, run.model_dump_json(), progress)), on_event, should_stop
    )
    if failure is not None:
        raise failure


def _call(work: NodeWork, run: str, progress: Any) -> None:
    reporter = RayReporter(progress)
    work(RunConfig.model_validate_json(run), reporter, reporter.should_stop)


def _outcome(reference: Any) -> FinetuneError | None:
    try:
        ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, FinetuneError):
            return error.cause
        kind = type(error.cause).__name__
        return TrainingError(f"the finish failed with {kind}", hint="the log of the pod has its traceback")
    except RayError as error:
        return killed_for_memory(error) or TrainingError(
            f"the process or node that held the weights died ({type(error).__name__})",
            hint="another attempt goes on from the last checkpoint",
        )
    return None
