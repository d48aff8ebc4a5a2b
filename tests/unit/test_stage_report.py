"""What a stage writes as its termination message: always JSON, never longer than the kubelet keeps."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune_api.errors import DataError, FinetuneError, GateFailed, Hang, NotFinite, StorageError, TrainingError
from finetune_api.stage import StageFailure, StageReport
from finetune_api.status import EgressResult, GateResult, Result
from finetune_trainer.pods.report import as_message, failure_of, reported


def _read(content: bytes) -> StageReport:
    assert len(content) <= 4096
    return StageReport.model_validate_json(content, by_alias=True, by_name=False)


@pytest.mark.parametrize("letter", ["x", "é", "語", "😀", '"', "\n"])
def test_a_message_is_shortened_until_it_fits(letter: str) -> None:
    failure = StageFailure(reason="UserData", message=letter * 1024)
    address = f"s3://b/{'x' * 1000}"
    gates = [GateResult(metric="m" * 256, value=1.0, passed=True)] * 32
    egress = [EgressResult(to="otherNamespace", address="a" * 256, reached=True)] * 4
    result = Result(uri=address, report=address, gates=gates, egress=egress)
    told = _read(as_message(StageReport(failure=failure, result=result))).failure
    assert told
    assert told.message.startswith(letter * 200)


def test_a_short_message_stays_as_it_is() -> None:
    report = StageReport(failure=StageFailure(reason="Storage", message="no"), result=Result(uri="s3://b/k"))
    assert _read(as_message(report)) == report


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (DataError("row"), "UserData"),
        (StorageError("bucket"), "Storage"),
        (NotFinite("loss"), "Numerics"),
        (GateFailed("gate"), "GateMissed"),
        (TrainingError("a worker died"), "Unknown"),
        (FinetuneError("bug"), "Unknown"),
    ],
)
def test_an_error_has_its_class(error: FinetuneError, reason: str) -> None:
    assert failure_of(error).reason == reason


def test_a_hang_names_the_rank() -> None:
    assert failure_of(Hang("rank 3 stood still", rank=3)).rank == 3


def test_the_words_of_an_unforeseen_error_are_not_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a user's row"), reported(tmp_path / "log"):
        raise ValueError("a user's row")
    failure = _read((tmp_path / "log").read_bytes()).failure
    assert failure == StageFailure(reason="Unknown", message="unexpected ValueError")
