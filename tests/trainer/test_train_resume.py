"""Stopping and going on: on two workers the result is, bit for bit, that of a run without a stop."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from finetune_api.run import CHECKPOINTS, EXPORT, METRICS_FILE, RunConfig
from finetune_trainer.reporter import MetricsFile, read_metrics
from tests.tiny import tiny_llama
from tests.trainer.runs import documents, prepare_sequences, run_config
from tests.trainer.workers import NoReporter, in_workers

STEPS, STOP_AFTER = 12, 6
STAGES = (0, 1, 2, 3)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], RunConfig]:
    """Each stage twice: `straight`, and `stopped` after half its steps and gone on with by new processes."""
    folder = tmp_path_factory.mktemp("resume")
    model = tiny_llama(folder / "model")
    some = documents(60, seed=3)
    made = {}
    for stage, kind in itertools.product(STAGES, ("straight", "stopped")):
        work = folder / f"{stage}-{kind}"
        # 25 sequences in batches of 4: the stop falls into the first epoch, its end into the second.
        prepare_sequences(work, [some[i : i + 2] for i in range(0, 50, 2)], [some[50:55], some[55:]])
        adapters = stage in (2, 3)
        made[stage, kind] = run_config(
            work,
            model,
            method={"tuning": "lora" if adapters else "full", "lora": {"rank": 4, "dropout": 0.2 if adapters else 0.0}},
            training={"maxSteps": STEPS, "precision": "fp32" if stage == 2 else "bf16", "schedule": "cosine"},
            deepspeed={
                "zeroStage": stage,
                "config": {"zero_optimization": {"stage3_param_persistence_threshold": 0}} if stage == 3 else {},
            },
        )
    in_workers(train_first, 2, folder / "first", list(made.values()))
    in_workers(train_on, 2, folder / "second", [run for (_, kind), run in made.items() if kind == "stopped"])
    return made


def train_first(rank: int, runs: list[RunConfig]) -> None:
    for run in runs:
        stopped = Path(run.work).name.endswith("stopped")
        expected = ("interrupted", STOP_AFTER) if stopped else ("complete", STEPS)
        assert outcome(rank, run, stop_after=STOP_AFTER if stopped else None) == expected


def train_on(rank: int, runs: list[RunConfig]) -> None:
    for run in runs:
        assert outcome(rank, run, stop_after=None) == ("complete", STEPS)


def outcome(rank: int, run: RunConfig, stop_after: int | None) -> tuple[str, int]:
    from finetune_trainer.train import train

    asked = itertools.count(0)  # once before the first step
    with MetricsFile(Path(run.work) / METRICS_FILE) as metrics:
        ended = train(run, NoReporter() if rank else metrics, should_stop=lambda: next(asked) == stop_after)
    return ended.reason, ended.step


def events(run: RunConfig, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_metrics(Path(run.work) / METRICS_FILE) if event["event"] == kind]


@pytest.mark.parametrize("stage", STAGES)
def test_a_stopped_run_has_the_losses_of_one_that_was_not(runs: Any, stage: int) -> None:
    keys = ("step", "loss", "gradNorm", "learningRate")
    straight, stopped = (
        [[event[key] for key in keys] for event in events(runs[stage, kind], "step")]
        for kind in ("straight", "stopped")
    )
    assert len(straight) == STEPS
    assert stopped == straight


@pytest.mark.parametrize("stage", STAGES)
def test_a_stopped_run_ends_with_the_bytes_of_one_that_was_not(runs: Any, stage: int) -> None:
    straight, stopped = (
        {path.name: path.read_bytes() for path in (Path(runs[stage, kind].work) / EXPORT).rglob("*.safetensors")}
        for kind in ("straight", "stopped")
    )
    assert straight
    assert stopped == straight


@pytest.mark.parametrize("stage", STAGES)
def test_the_evaluation_at_the_end_is_the_same(runs: Any, stage: int) -> None:
    straight, stopped = (
        [(event["step"], event["loss"]) for event in events(runs[stage, kind], "evaluation")]
        for kind in ("straight", "stopped")
    )
    assert [step for step, _ in straight] == [0, STEPS]
    assert stopped == straight


def test_a_checkpoint_of_adapters_holds_no_frozen_weights(runs: Any) -> None:
    full, adapters = (events(runs[stage, "straight"], "checkpoint-complete")[-1]["bytes"] for stage in (1, 3))
    assert adapters < full / 2


def test_the_events_tell_of_the_stop_and_where_the_run_went_on(runs: Any) -> None:
    assert [(e["reason"], e["step"]) for e in events(runs[2, "stopped"], "end")] == [
        ("interrupted", STOP_AFTER),
        ("complete", STEPS),
    ]
    assert [e["resumedFromStep"] for e in events(runs[2, "stopped"], "start")] == [None, STOP_AFTER]
    assert (Path(runs[2, "stopped"].work) / CHECKPOINTS / f"step-{STEPS:08d}" / "complete.json").exists()
