"""The server on the head pod that answers for a run, before, while and after its driver lives."""

from __future__ import annotations

import time
from contextlib import ExitStack

from finetune_api.stage import StageFailure
from finetune_api.status import Result
from finetune_trainer.endpoints import served
from finetune_trainer.reporter import Event
from finetune_trainer.telemetry import Telemetry


class Head:
    """Made an actor by `ray_cluster`. Models come as JSON."""

    def __init__(self, work: str, attempt: int, port: int) -> None:
        self._telemetry = Telemetry(work, attempt, time.monotonic())
        self._serving = ExitStack()  # for as long as the actor lives
        self._serving.enter_context(served(self._telemetry, port, host=""))

    def ready(self) -> bool:
        """It serves."""
        return True

    def event(self, event: Event) -> None:
        self._telemetry.event(event, time.monotonic())

    def finish(self, result: str) -> None:
        self._telemetry.finish(Result.model_validate_json(result), time.monotonic())

    def fail(self, failure: str, result: str | None) -> None:
        found = None if result is None else Result.model_validate_json(result)
        self._telemetry.fail(StageFailure.model_validate_json(failure), time.monotonic(), found)

    def stop(self) -> None:
        self._telemetry.stop(time.monotonic())
