from __future__ import annotations

from typing import Any

import pytest

from finetune_api.job import FinetuneJobSpec
from finetune_trainer.deepspeed_config import deepspeed_config, zero_stage


def spec(**parts: Any) -> FinetuneJobSpec:
    base = {"model": {"source": "m"}, "data": {"train": [{"uri": "d.jsonl"}]}, "output": {"uri": "o"}}
    return FinetuneJobSpec.model_validate(base | parts)


def config(world_size: int = 2, **parts: Any) -> dict[str, Any]:
    return deepspeed_config(spec(**parts), world_size=world_size, accumulation=3, cuda=False)


def test_the_batch_is_given_by_micro_batch_and_accumulation_alone() -> None:
    made = config(training={"microBatch": 4})
    assert (made["train_micro_batch_size_per_gpu"], made["gradient_accumulation_steps"]) == (4, 3)
    assert "train_batch_size" not in made


@pytest.mark.parametrize(
    ("workers", "precision", "stage"), [(1, "fp32", 0), (1, "bf16", 2), (2, "fp32", 2), (2, "bf16", 2)]
)
def test_auto_shards_unless_one_worker_has_nothing_to_gain(workers: int, precision: str, stage: int) -> None:
    assert zero_stage(spec(training={"precision": precision}), workers) == stage


def test_gradients_add_up_in_float32_wherever_deepspeed_can() -> None:
    assert config(deepspeed={"zeroStage": 2})["data_types"] == {"grad_accum_dtype": "fp32"}
    assert "data_types" not in config(deepspeed={"zeroStage": 0})


def test_raw_keys_are_merged_last_and_leave_their_neighbours() -> None:
    zero = config(deepspeed={"zeroStage": 3, "config": {"zero_optimization": {"stage3_max_live_parameters": 7}}})
    assert zero["zero_optimization"]["stage3_max_live_parameters"] == 7
    assert zero["zero_optimization"]["stage"] == 3


def test_parameters_are_offloaded_only_where_they_are_sharded() -> None:
    offload = {"optimizer": "cpu", "parameters": "cpu"}
    zero = {stage: config(deepspeed={"zeroStage": stage, "offload": offload})["zero_optimization"] for stage in (2, 3)}
    assert "offload_param" not in zero[2]
    assert zero[3]["offload_param"]["device"] == "cpu"


@pytest.mark.parametrize(("trained", "bucket"), [(20_000_000, 20_000_000), (8 * 10**9, 500_000_000)])
def test_buckets_are_no_larger_than_what_is_trained(trained: int, bucket: int) -> None:
    made = deepspeed_config(spec(), world_size=2, accumulation=1, cuda=True, trained=trained)
    assert made["zero_optimization"]["reduce_bucket_size"] == bucket


def test_a_bucket_of_the_job_stays_as_it_is() -> None:
    raw = {"config": {"zero_optimization": {"reduce_bucket_size": 7}}}
    made = deepspeed_config(spec(deepspeed=raw), world_size=2, accumulation=1, cuda=True, trained=100)
    assert made["zero_optimization"]["reduce_bucket_size"] == 7
