from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from finetune_api.errors import SpecError
from finetune_api.job import FinetuneJobSpec
from finetune_api.run import Device
from finetune_api.status import Plan
from finetune_trainer.deepspeed_config import merged
from finetune_trainer.manifest import Manifest, SplitFacts, Splits, TokenizerFacts, write_manifest
from finetune_trainer.planning import JobPlan, plan, planned_stage
from finetune_trainer.planning.choose import usable
from finetune_trainer.planning.command import plan as command
from finetune_trainer.planning.duration import peak_of, speed
from finetune_trainer.planning.model import build
from finetune_trainer.planning.view import view

GIB = 2**30
COUNT = 8_946_589_696  # of `model`: 2·128,256·8,192 + 8·(2·8,192² + 2·8,192·1,024 + 3·8,192·28,672 + 2·8,192) + 8,192
SAMPLES = Path(__file__).parents[2] / "manifests" / "samples"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config.json, and no more, of eight layers of Llama-3-70B: nine billion parameters."""
    return llama(tmp_path_factory.mktemp("wide"), hidden_size=8192, intermediate_size=28672, num_hidden_layers=8)


def llama(folder: Path, **sizes: int) -> Path:
    from transformers import LlamaConfig

    config = LlamaConfig(
        **sizes,
        vocab_size=128256,
        num_attention_heads=sizes["hidden_size"] // 128,
        num_key_value_heads=8,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    return folder


def spec(**changes: Any) -> FinetuneJobSpec:
    base: dict[str, Any] = {
        "model": {"source": "model"},
        "data": {"train": [{"uri": "rows.jsonl"}], "sequenceLength": 4096},
        "training": {"sequencesPerBatch": 64},
        "workers": {"count": 1, "gpusEach": 8},
        "output": {"uri": "output"},
    }
    return FinetuneJobSpec.model_validate(merged(base, changes))


def changed(plan: JobPlan) -> dict[str, str]:
    return {change.field: change.value for change in plan.remedy}


def manifest(sequences: int, tokens: int) -> Manifest:
    empty = SplitFacts(sequences=0, documents=0, tokens=0, target_tokens=0, shards=[])
    train = SplitFacts(sequences=sequences, documents=sequences, tokens=tokens, target_tokens=tokens / 2, shards=[])
    facts = TokenizerFacts(
        vocabulary_size=8, eos_token_id=2, end_of_turn_token_ids=[2], chat_template_sha256=None, sha256="0" * 64
    )
    return Manifest(
        key="k",
        sequence_length=4096,
        packing=True,
        tokenizer=facts,
        sources=[],
        splits=Splits(train=train, evaluation=empty),
    )


def test_counts_come_from_the_config_alone(model: Path) -> None:
    assert [path.name for path in model.iterdir() if path.suffix != ".json"] == []
    assert plan(spec(method={"tuning": "full"}), model, Device()).sizes.total == COUNT


def test_auto_is_the_smallest_stage_that_fits(model: Path) -> None:
    lora, full = spec(), spec(method={"tuning": "full"})
    assert planned_stage(str(model), lora, 8, 140 * GIB) == 1
    assert planned_stage(str(model), full, 8, 140 * GIB) == 1
    assert planned_stage(str(model), full, 8, 80 * GIB) == 2
    assert planned_stage(str(model), full, 8, 50 * GIB) == 3
    assert planned_stage(str(model), full, 8, 8 * GIB) == 3


def test_auto_on_one_worker_does_not_depend_on_its_memory(model: Path) -> None:
    assert planned_stage(str(model), spec(), 1, 140 * GIB) == 2
    assert planned_stage(str(model), spec(training={"precision": "fp32"}), 1, 140 * GIB) == 0


def test_states_are_divided_among_workers_as_the_stage_says(model: Path) -> None:
    def parts(stage: int) -> dict[str, int]:
        fixed = spec(method={"tuning": "full"}, deepspeed={"zeroStage": stage})
        fit = plan(fixed, model, Device()).fit
        assert fit
        return fit.memory.parts()

    assert parts(0)["optimizer"] == 12 * COUNT
    assert parts(1)["optimizer"] == 12 * COUNT // 8
    assert (parts(1)["gradients"], parts(2)["gradients"]) == (6 * COUNT, 4 * COUNT // 8)
    assert parts(2)["parameters"] == 2 * COUNT
    assert parts(3)["parameters"] == pytest.approx(2 * COUNT / 8, rel=1e-3)


def test_offload_moves_states_to_the_host(model: Path) -> None:
    kept = plan(spec(method={"tuning": "full"}, deepspeed={"zeroStage": 2}), model, Device()).fit
    moved = plan(
        spec(method={"tuning": "full"}, deepspeed={"zeroStage": 2, "offload": {"optimizer": "cpu"}}), model, Device()
    ).fit
    assert kept
    assert moved
    assert (kept.memory.host, moved.memory.optimizer) == (0, 0)
    assert moved.memory.host >= kept.memory.optimizer


def test_recomputed_activations_take_less(model: Path) -> None:
    kept = plan(spec(), model, Device()).fit
    again = plan(spec(training={"activationCheckpointing": True}), model, Device()).fit
    assert kept
    assert again
    assert again.memory.activations < kept.memory.activations / 10


def test_activations_of_every_second_block_take_half(model: Path) -> None:
    kept, half, none = (
        plan(spec(training={"activationCheckpointing": again, "recomputeEvery": every}), model, Device()).fit
        for again, every in ((False, 1), (True, 2), (True, 1))
    )
    assert kept
    assert half
    assert none
    assert half.memory.activations == pytest.approx((kept.memory.activations + none.memory.activations) / 2, rel=0.1)


def test_workers_that_share_a_sequence_hold_a_part_of_its_activations(model: Path) -> None:
    alone, shared = (
        plan(spec(method={"tuning": "full"}, deepspeed={"zeroStage": 2, "sequenceParallel": n}), model, Device()).fit
        for n in (1, 4)
    )
    assert alone
    assert shared
    assert shared.memory.activations == pytest.approx(alone.memory.activations / 4, rel=1e-3)
    assert shared.memory.optimizer == alone.memory.optimizer  # states are divided among all workers, as before


def test_a_sequence_that_workers_cannot_share_evenly_is_refused_by_the_plan(model: Path) -> None:
    with pytest.raises(SpecError, match="3 workers cannot share 64 attention heads") as caught:
        plan(spec(deepspeed={"sequenceParallel": 3}), model, Device())
    assert caught.value.where == "spec.deepspeed.sequenceParallel"


def test_a_longer_micro_batch_is_suggested_only_as_far_as_it_fits(model: Path) -> None:
    found = plan(spec(), model, Device(memory_bytes=80 * GIB))
    assert found.larger_micro_batch == 4
    for size, fits in ((4, True), (8, False)):
        assert plan(spec(training={"microBatch": size}), model, Device(memory_bytes=80 * GIB)).fits is fits
    assert plan(spec(training={"sequencesPerBatch": 8}), model, found.device).larger_micro_batch is None


@pytest.mark.parametrize(
    ("asked", "memory", "changes"),
    [
        ({"training": {"microBatch": 8}}, 80, {"training.microBatch": "1"}),
        ({}, 16, {"training.activationCheckpointing": "true"}),
        (  # one sequence is too long for a GPU, however it is recomputed
            {"data": {"sequenceLength": 524288}, "training": {"activationCheckpointing": True}},
            80,
            {"deepspeed.sequenceParallel": "8"},
        ),
        (
            {
                "method": {"tuning": "full"},
                "deepspeed": {"zeroStage": 0},
                "training": {"activationCheckpointing": True},
            },
            80,
            {"deepspeed.zeroStage": "2"},
        ),
    ],
)
def test_a_job_that_does_not_fit_is_told_what_would(
    model: Path, asked: dict[str, Any], memory: int, changes: dict[str, str]
) -> None:
    device = Device(memory_bytes=memory * GIB)
    refused = plan(spec(**asked), model, device)
    assert (refused.fits, changed(refused)) == (False, changes)
    nested: dict[str, Any] = {}
    for field, value in changes.items():
        section, name = field.split(".")
        nested = merged(nested, {section: {name: json.loads(value)}})
    assert plan(spec(**merged(asked, nested)), model, device).fits


def test_nothing_is_promised_where_nothing_helps(model: Path) -> None:
    refused = plan(spec(), model, Device(memory_bytes=3 * GIB))
    assert not refused.fits
    assert refused.remedy == []
    assert "no setting makes it fit" in refused.refusal().hint


def test_time_and_cost_follow_from_tokens_gpus_and_price(model: Path) -> None:
    device = Device(memory_bytes=80 * GIB, product="NVIDIA-H100-80GB-HBM3", price_per_hour=3.0)
    made = plan(spec(training={"epochs": 2.0}), model, device, manifest(1000, 4_000_000))
    assert (made.steps, made.tokens) == (32, 8_000_000)
    assert made.speed
    seconds = 8_000_000 / made.speed.tokens_per_second
    expected = Plan(
        total_steps=32,
        sequences=1000,
        tokens=4_000_000,
        target_tokens=2_000_000,
        zero_stage=1,
        gpu_memory_bytes=made.fit.memory.peak if made.fit else None,
        seconds=seconds,
        cost=seconds / 3600 * 8 * 3.0,
    )
    assert made.status() == expected


def test_llama_3_8b_with_lora_on_an_h100_is_as_fast_as_others_measured(tmp_path: Path) -> None:
    folder = llama(tmp_path, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32)
    peak = peak_of("NVIDIA-H100-80GB-HBM3")
    assert peak
    expected = speed(build(folder, spec()), spec(), world_size=1, peak=peak)
    assert expected
    assert expected.tokens_per_second == pytest.approx(12_473, rel=0.1)  # NeMo AutoModel


def test_what_is_not_known_is_left_open(model: Path) -> None:
    made = plan(spec(), model, Device())
    assert made.fits
    assert (made.steps, made.seconds, made.cost(made.seconds)) == (None, None, None)


def test_an_architecture_that_cannot_be_followed_still_has_its_counts(tmp_path: Path) -> None:
    from transformers import MambaConfig

    MambaConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=1, architectures=["MambaForCausalLM"]
    ).save_pretrained(tmp_path)
    made = plan(spec(method={"tuning": "full"}), tmp_path, Device(memory_bytes=GIB))
    assert made.sizes.total > 0
    assert (made.fit, made.fits) == (None, True)


def test_usable_memory_leaves_room_for_what_is_no_tensor() -> None:
    assert 70 * GIB < usable(80 * GIB) < 78 * GIB


# The command.


def run(*arguments: object) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def test_the_command_reads_the_runtimes_gpu(model: Path) -> None:
    done = run(
        SAMPLES / "support-chat.yaml", "--runtime", SAMPLES / "runtime-h200.yaml", "--model", model, "-o", "json"
    )
    said = json.loads(done.stdout)
    assert (said["fits"], said["zeroStage"], said["processes"], said["currency"]) == (True, 1, 16, "USD")
    assert sum(said["memoryBytes"].values()) == 2 * said["memoryBytes"]["peak"] == 2 * said["gpuMemoryBytes"]
    assert said["usableMemoryBytes"] == usable(150754820096)


def test_the_command_counts_rows_that_are_prepared(model: Path, tmp_path: Path) -> None:
    (tmp_path / "prepared").mkdir()
    write_manifest(tmp_path / "prepared", manifest(1000, 4_000_000))
    done = run(SAMPLES / "support-chat.yaml", "--model", model, "--work-dir", tmp_path, "-o", "json")
    assert json.loads(done.stdout)["totalSteps"] == 32


def test_the_command_refuses_with_the_setting_that_helps(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from finetune_api.cli import run as main

    code = main([str(SAMPLES / "support-chat.yaml"), "--gpu-memory", "16Gi", "--model", str(model)], command)
    said = capfd.readouterr()
    assert code == 2
    assert "it fits with training.activationCheckpointing: true" in said.err
    assert "peak of a GPU" in said.out


def test_the_table_fits_eighty_columns(model: Path) -> None:
    device = Device(memory_bytes=80 * GIB, product="NVIDIA-H100-80GB-HBM3", price_per_hour=3.0)
    made = plan(spec(method={"tuning": "full"}), model, device, manifest(10**7, 4 * 10**10))
    console = Console(file=io.StringIO(), width=80)
    console.print(view(made, "a-name-of-forty-seven-characters-that-is-allowed"))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert max(map(len, lines)) <= 80
    assert [line.split("  ")[0] for line in lines if "GiB" in line] == [
        "parameters",
        "gradients",
        "optimizer states",
        "activations",
        "loss and backward",
        "buffers",
        "peak of a GPU",
    ]
