"""A FinetuneJob as the views need it, also when the operator that wrote it is newer than this plugin."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from pydantic import ValidationError

from finetune_api.status import FinetuneJobStatus
from finetune_operator.observe import parse_time

ENDED: Final = ("Complete", "Failed")
_CONTROL: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # would drive the terminal


@dataclass(frozen=True)
class Shown:
    """One job.

    Attributes:
        created: Unix seconds, by the API server's clock, as all times.
        generation: of the spec; the status is about `status.observed_generation`.
        spec: as it is stored, with the API server's defaults.
        unread: fields of the status that only a newer plugin understands.
    """

    name: str
    namespace: str
    uid: str
    created: float
    generation: int
    deleting: bool
    spec: Mapping[str, Any]
    status: FinetuneJobStatus
    unread: tuple[str, ...] = ()

    @property
    def phase(self) -> str:
        """The phase; Pending until the operator has seen the job."""
        return self.status.phase or "Pending"

    @property
    def ended(self) -> bool:
        return self.status.phase in ENDED

    @property
    def stale(self) -> bool:
        """The operator has not looked at the newest spec yet."""
        return (self.status.observed_generation or 0) < self.generation


def read(manifest: Mapping[str, Any]) -> Shown:
    """A job as the API server has it."""
    metadata = manifest["metadata"]
    status, unread = _status(_clean(manifest.get("status") or {}))
    return Shown(
        name=metadata["name"],
        namespace=metadata["namespace"],
        uid=metadata["uid"],
        created=parse_time(metadata["creationTimestamp"]) or 0.0,
        generation=metadata.get("generation", 0),
        deleting="deletionTimestamp" in metadata,
        spec=_clean(manifest.get("spec") or {}),
        status=status,
        unread=unread,
    )


def _status(found: dict[str, Any]) -> tuple[FinetuneJobStatus, tuple[str, ...]]:
    """What can be read of a status, and the fields that cannot."""
    try:
        return FinetuneJobStatus.model_validate(found, extra="ignore", by_alias=True, by_name=False), ()
    except ValidationError as error:
        unread = {str(problem["loc"][0]) for problem in error.errors()}
        rest = {name: value for name, value in found.items() if name not in unread}
        return FinetuneJobStatus.model_validate(rest, extra="ignore", by_alias=True, by_name=False), (*sorted(unread),)


def _clean(value: Any) -> Any:
    """The same with control characters gone from every text."""
    if isinstance(value, str):
        return _CONTROL.sub("", value)
    if isinstance(value, Mapping):
        return {key: _clean(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_clean(item) for item in value]
    return value
