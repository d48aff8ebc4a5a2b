"""What a run does when something is broken: checkpoints, numbers, interrupts. One worker, in this process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune_api.errors import Interrupted, ModelError, SpecError, TrainingError
from finetune_api.run import CHECKPOINTS, METRICS_FILE, RUN_FILE, RunConfig
from finetune_trainer.manifest import read_manifest, write_manifest
from finetune_trainer.reporter import MetricsFile, read_metrics
from finetune_trainer.sampling import order
from finetune_trainer.train import train
from tests.tiny import tiny_llama
from tests.trainer.runs import documents, prepare_sequences, run_config

POISON = 511  # a token whose embedding the poisoned model has as NaN


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model"))


def small_run(work: Path, model: Path, **changes: Any) -> RunConfig:
    """Twelve sequences in batches of 4, a checkpoint every second step."""
    sequences = [[[token % POISON for token in document]] for document in documents(12, seed=2)]
    if not (work / "prepared").exists():
        prepare_sequences(work, sequences)
    changes.setdefault("training", {"maxSteps": 6})
    return run_config(work, model, **({"checkpoint": {"everySteps": 2, "keep": 2}} | changes))


def run_to_end(run: RunConfig) -> None:
    with MetricsFile(Path(run.work) / METRICS_FILE) as metrics:
        train(run, metrics)


def events(run: RunConfig, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_metrics(Path(run.work) / METRICS_FILE) if event["event"] == kind]


def checkpoints(run: RunConfig) -> list[str]:
    return sorted(path.name for path in (Path(run.work) / CHECKPOINTS).iterdir())


def test_the_newest_checkpoints_are_kept(tmp_path: Path, model: Path) -> None:
    run = small_run(tmp_path, model)
    run_to_end(run)
    assert checkpoints(run) == ["step-00000004", "step-00000006"]


def test_a_run_that_was_done_does_no_step_again(tmp_path: Path, model: Path) -> None:
    run = small_run(tmp_path, model)
    run_to_end(run)
    run_to_end(run)
    assert len(events(run, "step")) == 6
    assert [event["reason"] for event in events(run, "end")] == ["complete", "complete"]


def test_a_checkpoint_of_other_data_is_refused(tmp_path: Path, model: Path) -> None:
    run = small_run(tmp_path, model)
    run_to_end(run)
    prepared = tmp_path / "prepared"
    write_manifest(prepared, read_manifest(prepared).model_copy(update={"key": "other"}))
    with pytest.raises(TrainingError, match="data changed since it was written"):
        run_to_end(run)


def test_a_loss_that_is_not_finite_names_its_sequences_and_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    poisoned = tiny_llama(tmp_path / "model")
    weights = load_file(poisoned / "model.safetensors")
    weights["model.embed_tokens.weight"][POISON] = torch.nan
    save_file(weights, poisoned / "model.safetensors", metadata={"format": "pt"})
    run = small_run(tmp_path, poisoned)
    bad = int(order(run.spec.training, 12, 64).positions(2)[1])  # seen first in step 3
    sequences = [[[token % POISON for token in document]] for document in documents(12, seed=2)]
    sequences[bad][0][0] = POISON
    prepare_sequences(tmp_path, sequences)
    with pytest.raises(TrainingError, match="loss of step 3 is not finite") as raised:
        run_to_end(run)
    assert str(bad) in str(raised.value)
    assert checkpoints(run) == ["step-00000002"]


def test_missing_weights_are_an_error_that_names_them(tmp_path: Path) -> None:
    broken = tiny_llama(tmp_path / "model")
    weights = load_file(broken / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"missing from the checkpoint: model\.layers\.1\.mlp\.up_proj\.weight"):
        run_to_end(small_run(tmp_path, broken))


def test_pickled_weights_are_not_loaded(tmp_path: Path) -> None:
    pickled = tiny_llama(tmp_path / "model")
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="does not load"):
        run_to_end(small_run(tmp_path, pickled))


def test_an_unknown_target_module_is_an_error_that_lists_the_known(tmp_path: Path, model: Path) -> None:
    run = small_run(tmp_path, model, method={"tuning": "lora", "lora": {"targetModules": ["q_proj", "query"]}})
    with pytest.raises(SpecError, match="'query' names no linear layer") as raised:
        run_to_end(run)
    assert "down_proj" in raised.value.hint


def test_activation_checkpointing_changes_no_loss(tmp_path: Path, model: Path) -> None:
    losses = []
    for recomputed, every in ((False, 1), (True, 1), (True, 2)):
        training = {"activationCheckpointing": recomputed, "recomputeEvery": every}
        run = small_run(
            tmp_path / f"{recomputed}-{every}", model, training={"maxSteps": 3, "precision": "fp32"} | training
        )
        run_to_end(run)
        losses.append([event["loss"] for event in events(run, "step")])
    assert losses[1:] == [pytest.approx(losses[0], rel=1e-6)] * 2


def test_a_terminated_process_checkpoints_and_the_same_command_goes_on(tmp_path: Path, model: Path) -> None:
    run = small_run(tmp_path, model, training={"maxSteps": 100_000}, checkpoint={"everySteps": 100_000})
    (tmp_path / RUN_FILE).write_text(run.model_dump_json())
    command = [sys.executable, "-m", "finetune_trainer.train", str(tmp_path / RUN_FILE)]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    while not events(run, "step"):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == Interrupted.exit_code
    assert "a checkpoint was written" in said
    stopped = events(run, "end")[-1]["step"]

    run_to_end(small_run(tmp_path, model, training={"maxSteps": stopped + 1}))
    assert events(run, "start")[-1]["resumedFromStep"] == stopped
    assert events(run, "end")[-1]["reason"] == "complete"
