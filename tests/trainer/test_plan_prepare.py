"""The prepare stage plans: what it needs beside the shards, or a refusal before a row is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune_api.errors import SpecError
from finetune_api.run import PREPARED, Device, RunConfig
from finetune_trainer.pipeline import prepare_stage
from finetune_trainer.planning import PLAN_FILE
from finetune_trainer.progress import Display
from tests.tiny import tiny_llama
from tests.trainer.jobs import chats, jsonl, run_config


@pytest.fixture
def run(tmp_path: Path) -> RunConfig:
    model = tiny_llama(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_bytes(jsonl(chats(40)))
    return run_config(tmp_path, model, training={"epochs": 2.0, "sequencesPerBatch": 4})


def prepare(run: RunConfig, **changes: Any) -> dict[str, Any]:
    prepare_stage(run.model_copy(update=changes), Display(), lambda: False)
    plan: dict[str, Any] = json.loads((Path(run.work) / PREPARED / PLAN_FILE).read_text())
    return plan


def test_the_plan_lies_beside_the_manifest_and_counts_its_rows(run: RunConfig) -> None:
    plan = prepare(run)
    train = json.loads((Path(run.work) / PREPARED / "manifest.json").read_text())["splits"]["train"]
    assert (plan["sequences"], plan["tokens"]) == (train["sequences"], train["tokens"])
    assert plan["totalSteps"] == -(-2 * train["sequences"] // 4)
    assert "gpuMemoryBytes" not in plan  # it trains on CPUs


def test_a_changed_job_is_planned_again_on_the_same_shards(run: RunConfig) -> None:
    before = prepare(run)
    training = run.spec.training.model_copy(update={"epochs": 4.0})
    assert prepare(run, spec=run.spec.model_copy(update={"training": training}))["totalSteps"] > before["totalSteps"]


def test_a_job_that_does_not_fit_its_gpus_is_refused_before_a_row_is_read(run: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b"not JSON\n")
    workers = run.spec.workers.model_copy(update={"gpus_each": 1})
    with pytest.raises(SpecError, match="GiB on each GPU"):
        prepare(run, spec=run.spec.model_copy(update={"workers": workers}), device=Device(memory_bytes=2**30))
