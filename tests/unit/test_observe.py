"""Reading a job as the API server has it."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from finetune_operator.observe import read_job
from tests.unit.operator_world import job_spec


def manifest(status: dict[str, Any]) -> dict[str, Any]:
    metadata = {
        "name": "support", "namespace": "team", "uid": "u", "resourceVersion": "7",
        "creationTimestamp": "2026-11-23T12:00:00Z",
    }  # fmt: skip
    spec = job_spec().model_dump(mode="json", by_alias=True, exclude_none=True)
    return {"metadata": metadata, "spec": spec, "status": status}


def test_a_status_with_fields_of_a_newer_operator_keeps_its_attempts() -> None:
    newer = {"phase": "Training", "attempt": 2, "attempts": {"ended": 1, "fromTheFuture": 3}, "fromTheFuture": {}}
    status = read_job(manifest(newer)).status
    assert (status.phase, status.attempt) == ("Training", 2)
    assert status.attempts is not None
    assert status.attempts.ended == 1


def test_a_status_that_cannot_be_read_is_never_taken_for_an_empty_one() -> None:
    with pytest.raises(ValidationError):
        read_job(manifest({"phase": "FromTheFuture", "attempt": 2}))
