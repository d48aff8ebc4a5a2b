"""Workers that share each sequence train just as one worker with whole sequences does."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finetune_api.errors import SpecError
from finetune_api.job import FinetuneJobSpec
from finetune_api.run import EXPORT, METRICS_FILE, RunConfig
from finetune_trainer.deepspeed_config import merged
from finetune_trainer.distributed import join_world
from finetune_trainer.model import check_shared_sequence
from finetune_trainer.reporter import MetricsFile, read_metrics
from finetune_trainer.train import train
from tests.tiny import tiny_llama
from tests.trainer.runs import documents, prepare_sequences, run_config
from tests.trainer.workers import train_with_workers

STEPS = 4
CASES = list(itertools.product((0, 1, 2, 3), ("full", "lora")))
LORA = {"rank": 4, "alpha": 8}
PARTITION_ALL = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four heads, and two of keys and values."""
    return tiny_llama(tmp_path_factory.mktemp("model"), hidden=128)


def job(folder: Path, model: Path, stage: int, tuning: str, shared: int = 1, **training: Any) -> RunConfig:
    """A run over sequences of one to three documents, which lie across the border between two workers' parts."""
    some = documents(40, seed=3, shortest=10)
    sequences = [some[i : i + 1 + i % 3] for i in range(0, 36, 3)]
    prepare_sequences(folder, sequences, evaluation=[some[36:38], some[38:40]])
    return run_config(
        folder,
        model,
        method={"tuning": tuning, "lora": LORA},
        training={"maxSteps": STEPS, "sequencesPerBatch": 3, "clipping": 0.3, **training},
        deepspeed={
            "zeroStage": stage,
            "sequenceParallel": shared,
            "config": PARTITION_ALL if stage == 3 else {},
        },
    )


def train_alone(run: RunConfig) -> None:
    with MetricsFile(Path(run.work) / METRICS_FILE) as metrics:
        train(run, metrics)


@pytest.fixture(scope="module")
def alone(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunConfig]:
    runs = {}
    for tuning in ("full", "lora"):
        runs[tuning] = job(tmp_path_factory.mktemp("alone"), model, 0, tuning)
        train_alone(runs[tuning])
    return runs


@pytest.fixture(scope="module")
def shared(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Any, RunConfig]:
    """All runs of two workers that share their sequences, trained by one pair."""
    folder = tmp_path_factory.mktemp("shared")
    narrow = tiny_llama(folder / "model", hidden=64)  # two heads, one of keys and values
    half = job(folder / "resumed", model, 2, "full", shared=2, maxSteps=STEPS // 2)
    runs: dict[Any, RunConfig] = {case: job(folder / f"{case[0]}-{case[1]}", model, *case, shared=2) for case in CASES}
    for stage in (2, 3):
        offload = {"optimizer": "cpu", "parameters": "cpu" if stage == 3 else "none"}
        run = job(folder / f"offloaded-{stage}", model, stage, "full", shared=2)
        spec = run.spec.model_dump(mode="json", by_alias=True)
        offloaded = FinetuneJobSpec.model_validate(merged(spec, {"deepspeed": {"offload": offload}}))
        runs["offloaded", stage] = run.model_copy(update={"spec": offloaded})
    runs |= {
        "resumed": half.model_copy(update={"spec": runs[2, "full"].spec}),
        "narrow": job(folder / "narrow", narrow, 2, "full", shared=2),
    }
    train_with_workers([half, *runs.values()], 2, folder / "store")
    return runs


def figures(run: RunConfig, event: str, *keys: str) -> list[list[float]]:
    return [[e[key] for key in keys] for e in read_metrics(Path(run.work) / METRICS_FILE) if e["event"] == event]


def weights(run: RunConfig) -> dict[str, torch.Tensor]:
    file = "model/model.safetensors" if run.spec.method.tuning == "full" else "adapter/adapter_model.safetensors"
    return load_file(Path(run.work) / EXPORT / file)


def assert_same(run: RunConfig, other: RunConfig) -> None:
    steps = [figures(each, "step", "loss", "gradNorm") for each in (run, other)]
    assert len(steps[0]) == STEPS
    for ours, theirs in zip(*steps, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    evaluations = [figures(each, "evaluation", "loss", "tokens") for each in (run, other)]
    assert len(evaluations[0]) == 2
    for ours, theirs in zip(*evaluations, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    expected = weights(other)
    for name, value in weights(run).items():
        torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=0, msg=name)


@pytest.mark.parametrize(("stage", "tuning"), CASES)
def test_two_workers_share_sequences_at_every_stage(shared: Any, alone: Any, stage: int, tuning: str) -> None:
    assert_same(shared[stage, tuning], alone[tuning])


@pytest.mark.parametrize("stage", [2, 3])
def test_offloaded_states_and_parameters_train_as_those_that_are_not(shared: Any, alone: Any, stage: int) -> None:
    assert_same(shared["offloaded", stage], alone["full"])


def test_a_run_of_shared_sequences_goes_on_with_the_same_bytes(shared: Any) -> None:
    assert len(figures(shared["resumed"], "start")) == 2
    resumed, whole = weights(shared["resumed"]), weights(shared[2, "full"])
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


def test_two_pairs_share_in_pairs_and_recompute(model: Path, tmp_path: Path, alone: Any) -> None:
    run = job(tmp_path / "run", model, 2, "full", shared=2, activationCheckpointing=True)
    train_with_workers([run], 4, tmp_path / "store")
    assert_same(run, alone["full"])


def test_more_workers_than_heads_of_keys_share_them(shared: Any, tmp_path: Path) -> None:
    run = job(tmp_path, Path(shared["narrow"].model_path), 2, "full")
    train_alone(run)
    assert_same(shared["narrow"], run)


def test_attention_that_is_not_ours_is_refused() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("gemma2", hidden_size=32, num_hidden_layers=1, vocab_size=64, head_dim=8)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(SpecError, match="Gemma2ForCausalLM"):
        check_shared_sequence(model, 2)


def test_a_world_that_cannot_be_cut_is_refused() -> None:
    with pytest.raises(SpecError, match="1 workers cannot be cut into groups of 2"):
        join_world(2)
