"""The plan's memory against the live tensors of real runs, and its counts against real models."""

from __future__ import annotations

import gc
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from finetune_api.job import Lora
from finetune_api.run import RunConfig
from finetune_trainer.model import add_adapters
from finetune_trainer.planning.choose import Planner
from finetune_trainer.planning.model import build, sizes
from tests.tiny import tiny_llama
from tests.trainer.runs import run_config
from tests.trainer.workers import in_workers

TOKENS = 512
STEPS = 5  # of which the lowest counts: what gloo's own threads take back is not recorded, and looks as if it stayed
LORA = {"rank": 8, "alpha": 16}
CASES = [
    (stage, tuning, precision, recomputed, 1, "sft")
    for stage, tuning, precision in itertools.product((0, 1, 2, 3), ("full", "lora"), ("fp32", "bf16"))
    for recomputed in ((0, 1) if stage == 2 and precision == "bf16" else (0,))
]
CASES += [(2, "full", "bf16", 0, 2, "sft"), (3, "lora", "bf16", 1, 2, "sft"), (2, "full", "bf16", 2, 1, "sft")]
CASES += [(2, "full", "bf16", 0, 1, "dpo"), (2, "lora", "fp32", 0, 1, "dpo")]
# ZeRO stage, tuning, precision, n if each n-th block recomputes activations or 0, workers of a sequence,
# objective
Case = tuple[int, str, str, int, int, str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("plan") / "model", hidden=256)


def job(model: Path, case: Case) -> RunConfig:
    stage, tuning, precision, recomputed, shared, objective = case
    zero = {"reduce_bucket_size": 200_000, "allgather_bucket_size": 200_000}
    if stage == 3:
        # As small beside the model as the default is beside a large one: what is gathered ahead may lie there twice.
        zero |= {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 50_000}
    return run_config(
        model.parent,
        model,
        method={"tuning": tuning, "lora": LORA, "objective": objective},
        data={"sequenceLength": TOKENS},
        training={
            "precision": precision,
            "activationCheckpointing": recomputed > 0,
            "recomputeEvery": max(1, recomputed),
        },
        deepspeed={"zeroStage": stage, "sequenceParallel": shared, "config": {"zero_optimization": zero}},
    )


@pytest.fixture(scope="module", params=[1, 2])
def measured(
    request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[int, dict[Case, int]]:
    """The number of workers, and the peak that rank 0 measured in each case."""
    folder = tmp_path_factory.mktemp("measured")
    # Alone there is nothing to share: the stages differ in how gradients are kept.
    cases = [case for case in CASES if request.param == 2 or (case[0] in (0, 2) and case[4] == 1)]
    in_workers(measure, request.param, folder / "store", [job(model, case) for case in cases], folder)
    return request.param, dict(zip(cases, json.loads((folder / "peaks.json").read_text()), strict=True))


def measure(rank: int, runs: list[RunConfig], folder: Path) -> None:
    """Most bytes in tensors during a step of two micro-batches, after a first one made every state."""
    from finetune_trainer.batches import MicroBatch, collate
    from finetune_trainer.dataset import PackedSequence
    from finetune_trainer.distributed import join_world
    from finetune_trainer.engine import build_engine, optimizer_step

    ids = np.arange(TOKENS, dtype=np.int32) % 500
    weights = np.append(0, np.ones(TOKENS - 1)).astype(np.float32)
    one = PackedSequence(ids, weights, np.array([TOKENS], np.int32))
    two = replace(one, documents=np.array([TOKENS // 2] * 2, np.int32), references=np.full(2, -900, np.float32))
    peaks = []
    for run in runs:
        world = join_world(run.spec.deepspeed.sequence_parallel)
        batch = collate([two if run.spec.method.objective == "dpo" else one], world.sequence)
        before = live()  # kept, so that nothing of it is freed meanwhile
        engine = build_engine(run.model_path, run.spec, world, 2)

        def step(engine: Any = engine, batch: MicroBatch = batch) -> None:
            for number in range(2):
                engine.backward(engine(batch).reshape(-1)[0], scale_wrt_gas=False)
                if number == 0:
                    engine.step()
            optimizer_step(engine)

        engine.train()
        step()
        held = sum(t.untyped_storage().nbytes() for key, t in live().items() if key not in before)
        peaks.append(held + min(highest(step) for _ in range(STEPS)))
        del engine, step
    if rank == 0:
        (folder / "peaks.json").write_text(json.dumps(peaks))


def live() -> dict[int, torch.Tensor]:
    """A tensor of every storage that there is."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor) and not each.is_meta]
    tensors += [each.grad for each in tensors if each.is_leaf and each.grad is not None]
    return {each.untyped_storage()._cdata: each for each in tensors}


def highest(step: Callable[[], None]) -> int:
    """The highest sum of what the allocator gave out and took back, over a step's time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    return int(np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]).max())


def test_the_planned_peak_is_within_a_tenth_of_the_measured_one(
    measured: tuple[int, dict[Case, int]], model: Path
) -> None:
    workers, peaks = measured
    planner = Planner(model, "cpu", None)
    planned = {case: planner.fit(job(model, case).spec, workers).memory.peak for case in peaks}
    ratios = {case: planned[case] / peaks[case] for case in peaks}
    assert {case: round(ratio, 3) for case, ratio in ratios.items() if abs(ratio - 1) > 0.1} == {}


def configs() -> dict[str, Any]:
    """Small models of many architectures: tied and untied, fused and split projections, experts, biases."""
    import transformers as t

    common = {
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
    }
    return {
        "llama": t.LlamaConfig(**common, tie_word_embeddings=False),
        "llama tied": t.LlamaConfig(**common, tie_word_embeddings=True),
        "qwen2": t.Qwen2Config(**common),
        "qwen3": t.Qwen3Config(**common, head_dim=32),
        "mistral": t.MistralConfig(**common, sliding_window=64),
        "phi3": t.Phi3Config(**common),
        "mixtral": t.MixtralConfig(**common, num_local_experts=4),
        "gpt2": t.GPT2Config(vocab_size=300, n_embd=64, n_layer=2, n_head=4),
    }


@pytest.mark.parametrize("name", configs())
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_parameters_are_counted_as_in_the_real_model(tmp_path: Path, name: str, tuning: str) -> None:
    from transformers import AutoModelForCausalLM

    config = configs()[name]
    config.save_pretrained(tmp_path)
    real = AutoModelForCausalLM.from_config(config)
    if tuning == "lora":
        real = add_adapters(real, Lora.model_validate(LORA))
    counted = sizes(build(tmp_path, run_config(tmp_path, tmp_path, method={"tuning": tuning, "lora": LORA}).spec))
    assert counted.total == sum(p.numel() for p in real.parameters())
    assert counted.trained == sum(p.numel() for p in real.parameters() if p.requires_grad)
