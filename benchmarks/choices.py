"""What each choice of the training loop gains: the same packed rows with one thing changed at a time, on CPUs.

    python benchmarks/choices.py              every choice, some minutes on two cores
    python benchmarks/choices.py packed dense   these alone

Each runs in a process of its own: one worker, ZeRO-2, bf16, the Llama and rows of `train_cpu.py`. Time is the median of
the steps after the first two, of 8 sequences each, on the clock and of the CPU, which says more on a machine that does
other work too; memory is the most that the process had resident above what it had before the first pass.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import click
import torch
from machine import machine
from stdlib_chat import write_rows
from tiny_llama import save_model

from finetune_api.job import FinetuneJobSpec
from finetune_api.run import PREPARED, RUN_FILE, RunConfig
from finetune_trainer.batches import MicroBatch, micro_batches
from finetune_trainer.dataset import PackedDataset
from finetune_trainer.distributed import World, join_world
from finetune_trainer.engine import build_engine, optimizer_step, set_learning_rate
from finetune_trainer.prepare import prepare

SEQUENCES: Final = 8  # in a step
STEPS: Final = 6
WARM_UP: Final = 2


def _whole_logits(engine: Any) -> None:
    engine.module.fused = False


def _dense_mask(engine: Any) -> None:
    engine.module.model.set_attn_implementation("sdpa")


def _compiled(engine: Any) -> None:
    for layer in engine.module.model.model.layers:
        layer.mlp.compile(dynamic=True)


Change = Callable[[Any], None]
# Name, what it is, changes of the spec's training section, a change of the engine, threads.
CHOICES: Final[dict[str, tuple[str, dict[str, Any], Change | None, int]]] = {
    "packed": ("as it is: packed rows, our attention, fused loss, bf16", {}, None, 1),
    "whole": ("the model's own logits, whole", {}, _whole_logits, 1),
    "dense": ("transformers' sdpa over the packed row: a dense mask", {}, _dense_mask, 1),
    "padded": ("a document a row, padded to the longest of eight", {}, None, 1),
    "recomputed": ("activations recomputed", {"activationCheckpointing": True}, None, 1),
    "half": ("… of every second block", {"activationCheckpointing": True, "recomputeEvery": 2}, None, 1),
    "float32": ("fp32", {"precision": "fp32"}, None, 1),
    "two": ("micro-batches of 2 sequences", {"microBatch": 2}, None, 1),
    "eight": ("micro-batches of 8 sequences", {"microBatch": 8}, None, 1),
    "compiled": ("torch.compile of the MLPs", {}, _compiled, 1),
    "threads": ("two threads", {}, None, 2),
}


def _prepare(folder: Path) -> None:
    rows = write_rows(folder / "rows.jsonl")
    save_model(folder / "model", (message["content"] for row in rows for message in row["messages"]))
    spec = {
        "model": {"source": "model"},
        "method": {"tuning": "full"},
        "data": {"train": [{"uri": "rows.jsonl", "format": "chat"}], "sequenceLength": 512, "deduplicate": "none"},
        "training": {"sequencesPerBatch": SEQUENCES, "precision": "bf16"},
        "deepspeed": {"zeroStage": 2},
        "output": {"uri": "output"},
    }
    run = RunConfig(
        name="choices",
        uid="choices",
        spec=FinetuneJobSpec.model_validate(spec),
        base_dir=str(folder),
        model_path=str(folder / "model"),
        work=str(folder),
    )
    (folder / RUN_FILE).write_text(run.model_dump_json())
    prepare(run)


def _padded(engine: Any, batch: MicroBatch) -> Iterator[torch.Tensor]:
    """Losses of the batch's documents, eight at a time as padded rows with a mask."""
    ends = batch.lengths.cumsum()
    counted = torch.zeros(batch.input_ids.shape[1]).index_add(0, batch.predicting + 1, batch.weights) > 0
    documents = [
        (batch.input_ids[0, end - n : end], counted[end - n : end]) for end, n in zip(ends, batch.lengths, strict=True)
    ]
    for start in range(0, len(documents), 8):
        ids, learned = (
            torch.nn.utils.rnn.pad_sequence(each, batch_first=True)
            for each in zip(*documents[start : start + 8], strict=True)
        )
        lengths = torch.tensor([len(document) for document, _ in documents[start : start + 8]])
        mask = torch.arange(ids.shape[1]) < lengths[:, None]
        logits = engine.module.model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits[:, :-1].float()
        nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        yield (nll * learned[:, 1:].flatten()).sum()


def measure(name: str, folder: Path) -> dict[str, float]:
    """Tokens of one choice per second and CPU second, its data's share of a step, and bytes above the start."""
    _, training, change, threads = CHOICES[name]
    torch.set_num_threads(threads)
    run = RunConfig.model_validate_json((folder / RUN_FILE).read_text())
    spec = run.spec.model_copy(
        update={
            "training": run.spec.training.model_validate({**run.spec.training.model_dump(by_alias=True), **training})
        }
    )
    world = join_world()
    size = spec.training.micro_batch
    engine = build_engine(run.model_path, spec, world, SEQUENCES // size)
    if change:
        change(engine)
    if name == "padded":
        _dense_mask(engine)
    data = PackedDataset(folder / PREPARED, "train")
    engine.train()
    set_learning_rate(engine, 1e-4)
    before = _peak()
    results = [_step(engine, data, step, world, size, padded=name == "padded") for step in range(STEPS)]
    seconds, waited, cpu = (statistics.median(values) for values in zip(*results[WARM_UP:], strict=True))
    tokens = statistics.median(int(data.lengths[s * SEQUENCES :][:SEQUENCES].sum()) for s in range(WARM_UP, STEPS))
    return {
        "tokensPerSecond": tokens / seconds,
        "tokensPerCpuSecond": tokens / cpu,
        "data": waited / seconds,
        "bytes": _peak() - before,
        "first": results[0][0],
    }


def _step(engine: Any, data: PackedDataset, step: int, world: World, size: int, *, padded: bool) -> tuple[float, ...]:
    """Seconds of an optimizer step, of its data, and of the CPU."""
    import numpy as np

    started, cpu, waited = time.perf_counter(), time.process_time(), 0.0
    positions = np.arange(step * SEQUENCES, (step + 1) * SEQUENCES)
    count = SEQUENCES // size
    batches = micro_batches(data, positions, world, size=size, count=count)
    for number in range(count):
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        losses = list(_padded(engine, batch)) if padded else [engine(batch)]
        engine.backward(torch.stack(losses).sum() * 1e-3, scale_wrt_gas=False)
        if number < count - 1:
            engine.step()
    optimizer_step(engine)
    return time.perf_counter() - started, waited, time.process_time() - cpu


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(list(CHOICES)))
@click.option("--one", hidden=True, type=click.Path(path_type=Path), help="Measure in this process, over this folder.")
def main(names: tuple[str, ...], one: Path | None) -> None:
    """Measures choices and prints a table."""
    if one:
        click.echo(json.dumps(measure(names[0], one)))
        return
    rows = [
        "| choice | tokens/s | against `packed` | per CPU second | against `packed` | memory of passes | first step |",
        "|---|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        _prepare(folder)
        found: dict[str, dict[str, float]] = {}
        for name in dict.fromkeys(("packed", *(names or CHOICES))):
            environment = os.environ | {"OMP_NUM_THREADS": str(CHOICES[name][3]), "DS_ACCELERATOR": "cpu"}
            command = [sys.executable, __file__, name, "--one", str(folder)]
            output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
            found[name] = figures = json.loads(output.splitlines()[-1])
            rows.append(
                f"| {CHOICES[name][0]} "
                + "".join(
                    f"| {figures[rate]:,.0f} | {figures[rate] / found['packed'][rate]:.2f}× "
                    for rate in ("tokensPerSecond", "tokensPerCpuSecond")
                )
                + f"| {figures['bytes'] / 2**20:,.0f} MiB | {figures['first']:.1f} s |"
            )
            click.echo(rows[-1], err=True)
    click.echo(f"{machine('torch', 'deepspeed', 'transformers')}\n")
    click.echo("\n".join(rows))
    click.echo(f"\nOf a step as it is, data take {found['packed']['data']:.1%}.")


if __name__ == "__main__":
    main()
