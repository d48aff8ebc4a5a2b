"""What `decide` asks for. Each can be done twice without harm: names are deterministic, deletions name a UID."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from finetune_api.status import FinetuneJobStatus


@dataclass(frozen=True)
class MakePrepare:
    """Makes the Job that prepares the rows. `workers`: None while nobody has said how many."""

    workers: int | None = None


@dataclass(frozen=True)
class MakePrepareCluster:
    """Makes the Ray cluster that the prepare Job's pod works with."""

    workers: int


@dataclass(frozen=True)
class MakeAttempt:
    """Makes the RayJob of an attempt."""

    number: int


@dataclass(frozen=True)
class MakeResult:
    """Makes the Job that reads the result from storage, where an attempt has left it."""

    attempt: int


@dataclass(frozen=True)
class Delete:
    """Deletes a child; its own children go with it."""

    kind: Literal["Job", "RayCluster", "RayJob"]
    name: str
    uid: str


@dataclass(frozen=True)
class ForceDelete:
    """Ends an attempt whose RayJob does not go away by itself: its cluster and pods, then KubeRay's finalizer."""

    name: str
    uid: str
    cluster: str
    pods: tuple[str, ...]


@dataclass(frozen=True)
class DeleteSelf:
    """Deletes the FinetuneJob: its time after the end is over."""


Action = MakePrepare | MakePrepareCluster | MakeAttempt | MakeResult | Delete | ForceDelete | DeleteSelf


@dataclass(frozen=True)
class Event:
    """A line for `kubectl describe`."""

    type: Literal["Normal", "Warning"]
    reason: str
    message: str


@dataclass(frozen=True)
class Decision:
    """What becomes of a job now.

    Attributes:
        status: the whole new status. It is written before anything is done.
        actions: then these, in order.
        events: then these.
        wake: seconds until a new decision is due although nothing has changed; None: never.
    """

    status: FinetuneJobStatus
    actions: tuple[Action, ...]
    events: tuple[Event, ...]
    wake: float | None
