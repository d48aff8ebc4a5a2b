"""Learning from pairs by the real loop: the same under any split of the batch, and from where it was stopped."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from finetune_api.run import CHECKPOINTS, EXPORT, METRICS_FILE, RunConfig
from finetune_trainer.references import FILE
from finetune_trainer.reporter import MetricsFile, read_metrics
from finetune_trainer.storage import resolve
from finetune_trainer.train import train
from tests.tiny import tiny_llama
from tests.trainer.runs import documents, prepare_sequences, run_config
from tests.trainer.workers import train_with_workers

STEPS, STOP_AFTER = 6, 4
# ZeRO stage, tuning, precision, micro-batch; the first of each tuning and precision runs in one process.
SPLITS = {
    (tuning, precision): [(0, 1, 1), *((stage, 2, 1 + stage % 2) for stage in (0, 1, 2, 3))]
    for tuning, precision in (("full", "fp32"), ("lora", "fp32"), ("lora", "bf16"))
}


def pair_run(folder: Path, model: Path, workers: int = 1, **changes: Any) -> RunConfig:
    """A run over 30 pairs in 20 sequences, and 6 pairs to evaluate on."""
    some = documents(72, seed=4, shortest=8, longest=16)
    train_rows = [some[i : i + 4] for i in range(0, 40, 4)] + [some[i : i + 2] for i in range(40, 60, 2)]
    prepare_sequences(folder, train_rows, [some[60:64], some[64:66], some[66:]])
    training = {"maxSteps": STEPS, "sequencesPerBatch": 5, "learningRate": 2e-3} | changes.pop("training", {})
    method = {"objective": "dpo", "dpo": {"beta": 0.5}, "lora": {"rank": 4}} | changes.pop("method", {})
    return run_config(folder, model, method=method, training=training, workers={"count": workers}, **changes)


def zero(stage: int) -> dict[str, Any]:
    threshold = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    return {"zeroStage": stage, "config": threshold if stage == 3 else {}}


def events(run: RunConfig, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_metrics(Path(run.work) / METRICS_FILE) if event["event"] == kind]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("pairs") / "model")


@pytest.fixture(scope="module")
def runs(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], list[RunConfig]]:
    folder = tmp_path_factory.mktemp("splits")
    made: dict[tuple[str, str], list[RunConfig]] = {}
    for (tuning, precision), splits in SPLITS.items():
        made[tuning, precision] = [
            pair_run(
                folder / f"{tuning}-{precision}-{number}",
                model,
                workers,
                method={"tuning": tuning},
                training={"precision": precision, "microBatch": size},
                deepspeed=zero(stage),
            )
            for number, (stage, workers, size) in enumerate(splits)
        ]
    for world_size in (1, 2):
        wanted = [run for group in made.values() for run in group if run.spec.workers.count == world_size]
        train_with_workers(wanted, world_size, folder / f"store-{world_size}")
    return made


@pytest.mark.parametrize("case", SPLITS, ids="-".join)
def test_no_split_of_the_batch_and_no_stage_changes_the_loss(
    runs: dict[tuple[str, str], list[RunConfig]], case: tuple[str, str]
) -> None:
    absolute, relative = (2e-4, 1e-3) if case[1] == "fp32" else (0.15, 0.1)
    alone, *others = runs[case]
    wanted = events(alone, "step")
    assert len(wanted) == STEPS
    assert wanted[-1]["rewardMargin"] > 0.05 > abs(wanted[0]["rewardMargin"])
    for run in others:
        found = events(run, "step")
        for name in ("loss", "rewardMargin", "pairs", "gradNorm"):
            expected = pytest.approx([e[name] for e in wanted], abs=absolute, rel=relative)
            assert [e[name] for e in found] == expected, (run.work, name)


@pytest.mark.parametrize("case", SPLITS, ids="-".join)
def test_before_the_first_step_the_model_is_its_own_reference(
    runs: dict[tuple[str, str], list[RunConfig]], case: tuple[str, str]
) -> None:
    for run in runs[case]:
        base, tuned = events(run, "evaluation")
        assert (base["step"], base["rewardMargin"], base["rewardAccuracy"], base["pairs"]) == (0, 0, 0, 6)
        assert base["loss"] == pytest.approx(math.log(2))
        assert tuned["rewardMargin"] != 0
        assert 0 <= tuned["likelihoodAccuracy"] <= 1


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_references_are_read_again_and_those_that_were_changed_are_not_used(
    model: Path, tmp_path: Path, tuning: str
) -> None:
    straight, stopped, damaged, lost = (
        pair_run(tmp_path / name, model, method={"tuning": tuning})
        for name in ("straight", "stopped", "damaged", "lost")
    )
    trained(straight)
    with MetricsFile(Path(stopped.work) / METRICS_FILE) as metrics:
        outcome = train(stopped, metrics, should_stop=lambda: len(events(stopped, "step")) == STOP_AFTER - 1)
    assert (outcome.reason, outcome.step) == ("interrupted", STOP_AFTER)
    for run in (damaged, lost):
        shutil.copytree(stopped.work, run.work, dirs_exist_ok=True)
    content = bytearray((Path(damaged.work) / FILE).read_bytes())
    content[-300] ^= 1
    (Path(damaged.work) / FILE).write_bytes(content)
    (Path(lost.work) / FILE).unlink()

    for run in (stopped, damaged, lost):
        trained(run)

    assert [e["done"] for e in events(stopped, "references")] == [0, 23], "computed once, by the first start"
    assert [e["done"] for e in events(lost, "references")] == [0, 23, 0, 23], "the base model's, not the tuned one's"
    assert [e["resumedFromStep"] for e in events(damaged, "start")] == [None, STOP_AFTER]
    assert "references.npz is damaged" in events(damaged, "warning")[0]["message"]
    assert exported(straight)
    for run in (stopped, damaged, lost):
        assert exported(run) == exported(straight)


def test_another_machine_finds_the_references_in_the_bucket(model: Path, tmp_path: Path) -> None:
    first, second = pair_run(tmp_path / "first", model), pair_run(tmp_path / "second", model)
    bucket = resolve(f"file://{tmp_path}/bucket", tmp_path)
    with MetricsFile(Path(first.work) / METRICS_FILE) as metrics:
        train(first, metrics, remote=bucket, should_stop=lambda: len(events(first, "step")) == STOP_AFTER - 1)
    with MetricsFile(Path(second.work) / METRICS_FILE) as metrics:
        train(second, metrics, remote=bucket)
    assert [e["resumedFromStep"] for e in events(second, "start")] == [STOP_AFTER]
    assert not events(second, "references")
    assert len(events(second, "step")) == STEPS - STOP_AFTER


def test_a_stop_while_references_are_computed_leaves_nothing_behind(model: Path, tmp_path: Path) -> None:
    run = pair_run(tmp_path, model)
    with MetricsFile(tmp_path / METRICS_FILE) as metrics:
        outcome = train(run, metrics, should_stop=lambda: True)
    assert (outcome.reason, outcome.step) == ("interrupted", 0)
    assert not (tmp_path / FILE).exists()
    assert not (tmp_path / CHECKPOINTS).exists()


def trained(run: RunConfig) -> None:
    with MetricsFile(Path(run.work) / METRICS_FILE) as metrics:
        assert train(run, metrics).reason == "complete"


def exported(run: RunConfig) -> list[bytes]:
    return [path.read_bytes() for path in sorted((Path(run.work) / EXPORT).rglob("*.safetensors"))]
