"""Where a run's events go: `metrics.jsonl`, and whatever else the caller adds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

Event = Mapping[str, Any]


class Reporter(Protocol):
    """Receives the events of docs/design/run-folder.md; called on rank 0 only."""

    def event(self, event: Event) -> None:
        """Takes one event. Must return quickly: training waits for it."""


class MetricsFile:
    """Appends events to a JSON Lines file. Each line is written whole before `event` returns."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        torn = path.exists() and path.stat().st_size > 0 and not _ends_with_newline(path)
        self._file = path.open("a", encoding="utf-8", buffering=1)
        if torn:  # a run was killed within a write: let its half line stand alone
            self._file.write("\n")

    def event(self, event: Event) -> None:
        self._file.write(json.dumps(event, separators=(",", ":")) + "\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


class Progress:
    """Made an actor by `ray_adapter`: what rank 0 said so far, and whether the run is asked to stop.

    It stands here because an actor imports its class's module, and this one loads nothing heavy.
    """

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._stop = False

    def event(self, event: Event) -> bool:
        """Keeps an event; the answer says whether the run is asked to stop."""
        self._events.append(event)
        return self._stop

    def since(self, index: int) -> list[Event]:
        return self._events[index:]

    def request_stop(self) -> None:
        self._stop = True

    def stop_requested(self) -> bool:
        return self._stop


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All events in a metrics file, in order. A half-written line, from a run that was killed, is left out."""
    events: list[dict[str, Any]] = []
    if not path.exists():
        return events
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(event, dict):
            events.append(event)
    return events


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read(1) == b"\n"
