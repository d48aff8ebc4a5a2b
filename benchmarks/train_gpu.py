"""Training throughput on GPUs: a Llama-3-8B-shaped model with random weights, LoRA and full, at 4,096 tokens.

    python benchmarks/train_gpu.py                                    # one GPU: LoRA, full with offload, the longest
    torchrun --nproc-per-node 8 benchmarks/train_gpu.py full          # eight: full at the planned ZeRO stage
    python benchmarks/train_gpu.py --dry-run                          # a tiny model, also on a CPU: does it run?

Every sequence is one document, all of it learned: attention costs the most that it can. Weights are made in a temporary
folder (16 GB) and loaded as any model's. Throughput is that of the steps after the first two; MFU counts as in the
trainer (`flops.py`): recomputed activations do not count.
"""

from __future__ import annotations

import gc
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import click
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from finetune_api.job import FinetuneJobSpec
from finetune_trainer import flops
from finetune_trainer.batches import collate
from finetune_trainer.dataset import PackedSequence
from finetune_trainer.distributed import World, join_world
from finetune_trainer.engine import build_engine, optimizer_step, set_learning_rate
from finetune_trainer.weights import on_rank_0

OTHERS: Final = (
    "| NeMo AutoModel, LoRA of Llama-3-8B, one H100 | 4,096 | 12,473 | 41 % | | their figure |",
    "| LLM Foundry, full MPT-7B, eight H100 | 2,048 | 10,643 | 46 % | | their figure |",
)
WARM_UP: Final = 2
EIGHT_BILLION: Final = LlamaConfig(
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=4_194_304,
    tie_word_embeddings=False,
)
TINY: Final = LlamaConfig(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=192,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=4096,
    tie_word_embeddings=False,
)


@dataclass(frozen=True)
class Case:
    """What is trained."""

    tuning: str
    length: int
    offload: bool = False
    recomputed: bool = True

    def spec(self) -> FinetuneJobSpec:
        return FinetuneJobSpec.model_validate(
            {
                "model": {"source": "model"},
                "method": {"tuning": self.tuning},
                "data": {"train": [{"uri": "rows.jsonl"}], "sequenceLength": self.length},
                "training": {"precision": "bf16", "activationCheckpointing": self.recomputed},
                "deepspeed": {
                    "zeroStage": 2 if self.offload else "auto",
                    "offload": {"optimizer": "cpu" if self.offload else "none"},
                },
                "output": {"uri": "output"},
            }
        )

    def __str__(self) -> str:
        parts = [self.tuning, *(["optimizer offloaded"] if self.offload else []), *(["recomputed"] * self.recomputed)]
        return ", ".join(parts)


@dataclass(frozen=True)
class Measured:
    """Tokens per second of one GPU, its MFU where its peak is known, and the most bytes that its tensors took."""

    tokens_per_second: float
    mfu: float | None
    peak_bytes: int


def measure(case: Case, folder: Path, world: World, steps: int) -> Measured:
    """Trains some steps of one micro-batch each. A collective.

    Raises:
        torch.OutOfMemoryError: the case does not fit.
    """
    cuda = world.device.type == "cuda"
    engine = build_engine(str(folder), case.spec(), world, 1)
    operations = flops.TrainingFlops(engine.module.model).of(np.array([case.length]))
    peak = flops.peak_flops(world.device, "bf16")
    random = np.random.default_rng(world.rank)
    weights = np.append(0, np.ones(case.length - 1)).astype(np.float32)
    engine.train()
    set_learning_rate(engine, 1e-5)
    ends = []
    for _ in range(steps):
        ids = random.integers(0, 512, case.length, dtype=np.int32)
        batch = collate([PackedSequence(ids, weights, np.array([case.length], np.int32))]).to(world.device)
        engine.backward(engine(batch) / case.length, scale_wrt_gas=False)
        optimizer_step(engine)
        if cuda:
            torch.cuda.synchronize()
        ends.append(time.perf_counter())
    seconds = (ends[-1] - ends[WARM_UP - 1]) / (steps - WARM_UP)
    return Measured(
        case.length / seconds,
        operations / seconds / peak if peak else None,
        torch.cuda.max_memory_allocated() if cuda else 0,
    )


def attempt(case: Case, folder: Path, world: World, steps: int) -> Measured | None:
    """The case's figures, or None where it does not fit; memory is free again afterwards."""
    try:
        return measure(case, folder, world, steps)
    except torch.OutOfMemoryError:
        return None
    finally:
        gc.collect()
        if world.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def longest(folder: Path, world: World, start: int, most: int) -> tuple[Case, Measured] | None:
    """The longest sequence, in powers of two, of which LoRA with recomputed activations trains."""
    found = None
    length = start
    while length <= most:
        case = Case("lora", length)
        measured = attempt(case, folder, world, WARM_UP + 1)
        if measured is None:
            break
        found = case, measured
        length *= 2
    return found


def row(case: Case, measured: Measured | None, world: World, note: str = "") -> str:
    """A line of the table."""
    if measured is None:
        return f"| {case} | {case.length:,} | | | | does not fit |"
    mfu = "" if measured.mfu is None else f"{measured.mfu:.0%}"
    return (
        f"| {case} | {case.length:,} | {measured.tokens_per_second:,.0f} | {mfu} "
        f"| {measured.peak_bytes / 2**30:.1f} GiB | {note or f'{world.size} × this device'} |"
    )


def save(config: LlamaConfig, folder: Path) -> None:
    """Random weights in bf16, as a Hugging Face folder."""
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model: Any = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)


@click.command()
@click.argument("what", nargs=-1, type=click.Choice(["lora", "full", "longest"]))
@click.option("--steps", default=12, show_default=True, type=click.IntRange(WARM_UP + 1), help="Steps of each case.")
@click.option("--length", default=4096, show_default=True, help="Tokens of a sequence.")
@click.option("--dry-run", is_flag=True, help="A tiny model and short sequences; also on a CPU.")
def main(what: tuple[str, ...], steps: int, length: int, dry_run: bool) -> None:
    """Measures and prints a table beside the figures of others."""
    if not dry_run and not torch.cuda.is_available():
        raise click.UsageError("there is no GPU: --dry-run tries the script on a CPU")
    if dry_run:
        steps, length = WARM_UP + 1, 64
    world = join_world()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(world.from_first(temporary))
        on_rank_0(world, lambda: save(TINY if dry_run else EIGHT_BILLION, folder))
        alone = world.size == 1
        # Full tuning of eight billion parameters has 128 GB of states: one GPU has to keep them in the host's memory.
        cases = {
            "lora": [Case("lora", length, recomputed=False), Case("lora", length)],
            "full": [Case("full", length, offload=alone)],
        }
        rows = [
            row(c, attempt(c, folder, world, steps), world) for w in what or ("lora", "full") for c in cases.get(w, [])
        ]
        if alone and (not what or "longest" in what):
            found = longest(folder, world, length, 2 * length if dry_run else EIGHT_BILLION.max_position_embeddings)
            rows += [row(*found, world, "longest, in powers of two")] if found else []
    if world.rank == 0:
        name = torch.cuda.get_device_name() if world.device.type == "cuda" else f"{os.cpu_count()} CPU cores"
        click.echo(f"{world.size} × {name}, torch {torch.__version__}\n")
        click.echo("| what | sequence | tokens/s of a GPU | MFU | peak of tensors | |\n|---|---|---|---|---|---|")
        click.echo("\n".join([*rows, *OTHERS]))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
