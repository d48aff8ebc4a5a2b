from __future__ import annotations

import dataclasses

import pytest

from finetune_api.errors import SpecError
from finetune_api.run import Device, RunConfig
from finetune_operator.children.config import run_config_map, work_uri
from tests.unit.children_cases import JOBS, OWNER, job, runtime


def test_a_pod_reads_the_job_as_it_was_validated() -> None:
    for spec in JOBS.values():
        text = run_config_map(OWNER, spec, runtime(), 2, None)["data"]["run.json"]
        run = RunConfig.model_validate_json(text)
        assert run.spec == spec
        assert (run.name, run.uid, run.base_dir) == (OWNER.name, OWNER.uid, "/")


def test_a_pod_knows_the_gpu_that_workers_get() -> None:
    on = runtime(
        accelerator={"memoryBytes": 80 << 30, "pricePerHour": 3.0, "currency": "EUR"},
        nodeSelector={"nvidia.com/gpu.product": "NVIDIA-H100"},
    )
    gpus, cpus = (
        RunConfig.model_validate_json(run_config_map(OWNER, spec, on, "prepare", None)["data"]["run.json"]).device
        for spec in (job(workers={"count": 1, "gpusEach": 1}), job(workers={"count": 1, "gpusEach": 0}))
    )
    assert gpus == Device(memory_bytes=80 << 30, product="NVIDIA-H100", price_per_hour=3.0, currency="EUR")
    assert cpus is None


def test_each_attempt_has_its_own_run_file() -> None:
    names = [run_config_map(OWNER, job(), runtime(), stage, None)["metadata"]["name"] for stage in ("prepare", 1, 2)]
    assert names == ["support-chat-prepare", "support-chat-a1", "support-chat-a2"]


def test_work_lies_below_the_runtimes_prefix_or_else_below_the_output() -> None:
    spec = job(output__uri="s3://models/support-chat/")
    prefixed = runtime(storage={"workUri": "s3://scratch/finetune/"})
    assert work_uri(OWNER, spec, prefixed) == "s3://scratch/finetune/team-a/support-chat-0b1f6a51"
    assert work_uri(OWNER, spec, runtime()) == "s3://models/support-chat/.finetune/0b1f6a51"


def test_a_job_made_again_does_not_find_the_work_of_the_one_before() -> None:
    again = dataclasses.replace(OWNER, uid="77777777-8f07-4b5b-9f0e-6f4f3f1f0002")
    for on in (runtime(), runtime(storage={"workUri": "s3://scratch/finetune"})):
        assert work_uri(OWNER, job(), on) != work_uri(again, job(), on)


def test_a_job_too_large_for_a_config_map_is_the_users_to_shorten() -> None:
    prompts = [{"prompt": "é" * 8192} for _ in range(80)]
    with pytest.raises(SpecError, match=r"takes 1,\d{3},\d{3} bytes"):
        run_config_map(OWNER, job(evaluation__prompts=prompts), runtime(), "prepare", None)
