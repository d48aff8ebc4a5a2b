"""Going on with another number of workers: 2 → 1 → 2, under every ZeRO stage, full and LoRA."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from finetune_api.run import METRICS_FILE, RunConfig
from finetune_trainer.reporter import MetricsFile, read_metrics
from tests.tiny import tiny_llama
from tests.trainer.runs import documents, prepare_sequences, run_config
from tests.trainer.workers import NoReporter, in_workers

STEPS = 12
CASES = list(itertools.product((0, 1, 2, 3), ("full", "lora")))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str, str], RunConfig]:
    """Each case twice: with two workers all the way, and with two, one and two for a third of the steps each."""
    folder = tmp_path_factory.mktemp("world")
    model = tiny_llama(folder / "model")
    some = documents(50, seed=7)
    made = {}
    for (stage, tuning), kind in itertools.product(CASES, ("straight", "changed")):
        work = folder / f"{stage}-{tuning}-{kind}"
        prepare_sequences(work, [some[i : i + 2] for i in range(0, 50, 2)])
        made[stage, tuning, kind] = run_config(
            work,
            model,
            method={"tuning": tuning, "lora": {"rank": 4}},
            training={
                "maxSteps": STEPS,
                "precision": "bf16" if (tuning == "lora") == (stage > 1) else "fp32",
                "sequencesPerBatch": 5,
                "weightDecay": 0.1,
                "learningRate": 5e-3,
            },
            deepspeed={
                "zeroStage": stage,
                "config": {"zero_optimization": {"stage3_param_persistence_threshold": 0}} if stage == 3 else {},
            },
        )
    straight, changed = ([run for (*_, k), run in made.items() if k == kind] for kind in ("straight", "changed"))
    in_workers(part, 2, folder / "a", straight, STEPS, changed, 4)
    in_workers(part, 1, folder / "b", [], 0, changed, 8)
    in_workers(part, 2, folder / "c", [], 0, changed, STEPS)
    return made


def part(rank: int, straight: list[RunConfig], steps: int, changed: list[RunConfig], until: int) -> None:
    """Trains these to the end, and those until a step."""
    for run, stop in [*((run, steps) for run in straight), *((run, until) for run in changed)]:
        outcome(rank, run, stop)


def outcome(rank: int, run: RunConfig, stop: int) -> None:
    from finetune_trainer.train import train

    with MetricsFile(Path(run.work) / METRICS_FILE) as metrics:

        def reached() -> bool:  # asked within the step that ends with this number
            done = [e["step"] for e in read_metrics(Path(run.work) / METRICS_FILE) if e["event"] == "step"]
            return stop < STEPS and not rank and bool(done) and done[-1] + 1 == stop

        train(run, NoReporter() if rank else metrics, should_stop=reached)


def steps(run: RunConfig, *keys: str) -> list[list[Any]]:
    found = [event for event in read_metrics(Path(run.work) / METRICS_FILE) if event["event"] == "step"]
    return [[event[key] for key in keys] for event in found]


@pytest.mark.parametrize(("stage", "tuning"), CASES)
def test_the_steps_are_those_of_a_run_whose_workers_stayed(runs: Any, stage: int, tuning: str) -> None:
    straight, changed = (runs[stage, tuning, kind] for kind in ("straight", "changed"))
    sizes = [e["worldSize"] for e in read_metrics(Path(changed.work) / METRICS_FILE) if e["event"] == "start"]
    assert sizes == [2, 1, 2]
    keys = ("step", "tokens", "targetTokens")
    assert steps(changed, *keys) == steps(straight, *keys), "the same samples"
    exact = straight.spec.training.precision == "fp32"
    for ours, theirs in zip(steps(changed, "loss"), steps(straight, "loss"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5 if exact else 2**-8)
