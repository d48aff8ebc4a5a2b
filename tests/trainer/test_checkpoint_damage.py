"""Checkpoints that are not as they were written: refused, named, and the one before is gone on from."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune_api.run import CHECKPOINTS, METRICS_FILE, RunConfig
from finetune_trainer.reporter import MetricsFile, read_metrics
from finetune_trainer.train import train
from tests.tiny import tiny_llama
from tests.trainer.runs import documents, prepare_sequences, run_config

SHARD, MARKER = "shard-00000-of-00001.safetensors", "complete.json"
NEWEST, BEFORE = "step-00000006", "step-00000004"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run of six steps with three checkpoints."""
    folder = tmp_path_factory.mktemp("damage")
    some = documents(12, seed=2)
    prepare_sequences(folder / "work", [[document] for document in some])
    run = run_config(
        folder / "work",
        tiny_llama(folder / "model"),
        training={"maxSteps": 6},
        checkpoint={"everySteps": 2, "keep": 3},
    )
    go_on(run)
    return run


def go_on(run: RunConfig) -> None:
    with MetricsFile(Path(run.work) / METRICS_FILE) as metrics:
        train(run, metrics)


def events(run: RunConfig, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_metrics(Path(run.work) / METRICS_FILE) if event["event"] == kind]


def flip(position: float) -> Callable[[Path], None]:
    """Changes one bit of the byte at this share of the file; its size stays."""

    def damage(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[int(len(content) * position)] ^= 1
        path.write_bytes(content)

    return damage


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "a flipped bit of the weights": (SHARD, flip(0.5), f"{SHARD} is damaged: its SHA-256 is another"),
    "a flipped bit of the header": (SHARD, flip(0.0), f"{SHARD} is damaged: its SHA-256 is another"),
    "a missing shard": (SHARD, Path.unlink, f"{SHARD} is missing"),
    "a truncated shard": (SHARD, truncate, f"{SHARD} has"),
    "an empty shard": (SHARD, lambda path: path.write_bytes(b""), f"{SHARD} has 0 bytes instead of"),
    "a truncated marker": (MARKER, truncate, f"{MARKER} is damaged"),
    "a flipped bit of the marker": (MARKER, flip(0.3), f"{MARKER} is damaged"),
    "a marker that is no text": (MARKER, lambda path: path.write_bytes(b"\xff\x00"), f"{MARKER} is damaged"),
    "another checkpoint's marker": (
        MARKER,
        lambda path: path.write_bytes((path.parent.parent / BEFORE / MARKER).read_bytes()),
        f"{MARKER} belongs to {BEFORE}",
    ),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_taken(
    trained: RunConfig, tmp_path: Path, what: str
) -> None:
    shutil.copytree(trained.work, tmp_path / "work")
    run = trained.model_copy(update={"work": str(tmp_path / "work")})
    file, damage, why = DAMAGES[what]
    damage(tmp_path / "work" / CHECKPOINTS / NEWEST / file)
    go_on(run)
    assert [event["resumedFromStep"] for event in events(run, "start")] == [None, 4]
    (warning,) = events(run, "warning")
    assert warning["message"].startswith(f"{NEWEST} is no checkpoint to go on from: {why}")
    losses = [event["loss"] for event in events(run, "step")]
    assert losses[6:] == losses[4:6]
    assert (tmp_path / "work" / CHECKPOINTS / NEWEST / MARKER).exists(), "written again"


def test_a_checkpoint_without_its_marker_is_none_and_in_nobodys_way(trained: RunConfig, tmp_path: Path) -> None:
    shutil.copytree(trained.work, tmp_path / "work")
    run = trained.model_copy(update={"work": str(tmp_path / "work")})
    (tmp_path / "work" / CHECKPOINTS / NEWEST / MARKER).unlink()
    go_on(run)
    assert events(run, "start")[-1]["resumedFromStep"] == 4
    assert not events(run, "warning"), "a run that was killed leaves such folders"


def test_damage_in_every_checkpoint_begins_anew_and_says_so(trained: RunConfig, tmp_path: Path) -> None:
    shutil.copytree(trained.work, tmp_path / "work")
    run = trained.model_copy(update={"work": str(tmp_path / "work")})
    for shard in (tmp_path / "work" / CHECKPOINTS).glob(f"*/{SHARD}"):
        truncate(shard)
    go_on(run)
    assert events(run, "start")[-1]["resumedFromStep"] is None
    assert len(events(run, "warning")) == 3
    losses = [event["loss"] for event in events(run, "step")]
    assert losses[6:] == losses[:6]
    go_on(run)
    assert events(run, "start")[-1]["resumedFromStep"] == 6, "the damaged ones are in nobody's way"
