"""Trackers take a run's figures offline, never stop it, and are asked for before anything is spent."""

from __future__ import annotations

import struct
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from finetune_api.errors import SpecError
from finetune_api.run import RunConfig
from finetune_trainer.reporter import Event
from finetune_trainer.tracking import TRACKING, Tracker, check_tracking, tracked
from tests.trainer.runs import run_config

EVENTS: list[Event] = [
    {"event": "start", "time": 1.0, "worldSize": 1},
    {"event": "evaluation", "time": 1.0, "step": 0, "loss": 3.0},
    *(
        {"event": "step", "time": 2.0, "step": n, "loss": 2.0 / n, "learningRate": 1e-4, "gradNorm": None, "mfu": None}
        for n in (1, 2, 3)
    ),
    {"event": "end", "time": 3.0, "step": 3, "reason": "complete"},
]


def tracking_run(folder: Path, kind: str) -> RunConfig:
    return run_config(folder, folder / "model", tracking={"kind": kind, "project": "support"})


def track(run: RunConfig) -> Path:
    """Sends EVENTS; the tracker's folder."""
    warnings: list[str] = []
    with tracked(run, warnings.append) as take:
        for event in EVENTS:
            take(event)
    assert warnings == []
    return Path(run.work) / TRACKING / run.spec.tracking.kind


def test_tensorboard_gets_event_files(tmp_path: Path) -> None:
    from tensorboardX.proto.event_pb2 import Event as BoardEvent

    (file,) = track(tracking_run(tmp_path, "tensorboard")).glob("events.out.tfevents.*")
    data, found = file.read_bytes(), []
    while data:  # a record: length, its check sum, the event, its check sum
        (length,) = struct.unpack("<Q", data[:8])
        event = BoardEvent.FromString(data[12 : 12 + length])
        found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
        data = data[16 + length :]
    assert ("eval/loss", 0, 3.0) in found
    assert [value for tag, _, value in found if tag == "train/loss"] == pytest.approx([2.0, 1.0, 2 / 3])
    assert not [tag for tag, _, _ in found if tag == "train/mfu"], "there is none on a CPU"


def test_mlflow_without_a_server_gets_files_and_a_resumed_run_stays_one(tmp_path: Path) -> None:
    run = tracking_run(tmp_path, "mlflow")
    track(run)
    folder = track(run)
    from mlflow.tracking import MlflowClient

    client = MlflowClient(folder.as_uri())
    experiment = client.get_experiment_by_name("support")
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED"
    assert found.data.metrics["train/loss"] == pytest.approx(2 / 3)
    assert found.data.params["objective"] == "sft"
    assert not [name for name, value in found.data.params.items() if "rows.jsonl" in str(value)]


def test_wandb_without_a_server_stays_offline(tmp_path: Path) -> None:
    (file,) = track(tracking_run(tmp_path, "wandb")).glob("wandb/offline-run-*/run-*.wandb")
    kept = file.read_bytes()  # a log of protocol buffers, names in plain text
    assert kept.count(b"train/loss") >= 3
    assert b"eval/loss" in kept
    assert b"rows.jsonl" not in kept


class Broken:
    """A tracker whose server is gone."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        raise ConnectionError("secret-host is gone")

    def close(self, *, complete: bool) -> None:
        raise AssertionError("it is not asked again")


def broken(run: RunConfig) -> Tracker:
    return Broken()


def test_a_tracker_that_fails_is_told_once_and_training_goes_on(tmp_path: Path) -> None:
    warnings: list[str] = []
    with tracked(tracking_run(tmp_path, "mlflow"), warnings.append, connect=broken) as take:
        for event in EVENTS * 3:
            take(event)
    assert warnings == ["mlflow takes no more figures, and training goes on: ConnectionError"]


@pytest.mark.parametrize(("kind", "package"), [("mlflow", "mlflow"), ("wandb", "wandb")])
def test_a_missing_package_is_an_error_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, package: str
) -> None:
    run = tracking_run(tmp_path, kind)
    check_tracking(run.spec)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SpecError, match=f"package {package} is not installed") as raised:
        check_tracking(run.spec)
    assert raised.value.where == "spec.tracking.kind"


def test_without_the_setting_nothing_is_written(tmp_path: Path) -> None:
    run = run_config(tmp_path, tmp_path / "model")
    check_tracking(run.spec)
    with tracked(run, _never) as take:
        take(EVENTS[1])
    assert not (tmp_path / TRACKING).exists()


def test_tensorboard_has_no_server(tmp_path: Path) -> None:
    spec: Any = {"kind": "tensorboard", "uri": "http://board:6006"}
    with pytest.raises(SpecError, match="tensorboard writes files"):
        check_tracking(run_config(tmp_path, tmp_path / "model", tracking=spec).spec)


def _never(message: str) -> None:
    raise AssertionError(message)
