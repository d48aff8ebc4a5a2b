"""Training throughput on CPUs against TRL: same rows, model, masks, precision, ranks and global batch, same machine.

    python benchmarks/train_cpu.py            the whole table, about a quarter of an hour on two cores
    python benchmarks/train_cpu.py --quick    fewer steps, without the padded variant: about three minutes

Two ranks of one thread each train a Llama of 5.3 M parameters in bf16 under ZeRO-2 on the standard library's
docstrings. The sides take turns (A B C, A B C), so that a slow spell of the machine meets all of them. Throughput is
real tokens, without padding, over the steps after the warm-up; memory is the sum of the ranks' peaks (RSS, and
PSS, in which a library that both use counts once).
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from machine import machine
from ranks import Usage, run_ranks
from stdlib_chat import write_rows
from tiny_llama import save_model

from finetune_api.job import FinetuneJobSpec
from finetune_api.run import METRICS_FILE, RUN_FILE, RunConfig
from finetune_trainer.prepare import prepare

HERE = Path(__file__).parent
RANKS = 2
SEQUENCE_LENGTH = 512
GLOBAL_SEQUENCES = 16  # packed sequences in a global batch: 8,192 tokens
PADDED_ROWS = 88  # rows in a global batch of as many real tokens, unpacked
LEARNING_RATE = 2e-4
SEED = 0


@dataclass(frozen=True)
class Inputs:
    """What every side trains on."""

    rows: Path
    model: Path
    steps: int
    warmup: int


@dataclass(frozen=True)
class Measured:
    """One run of one side: real tokens of all ranks per second after the warm-up, and what the run cost."""

    tokens_per_second: float
    peak_bytes: int
    peak_shared_bytes: int
    mean_loss: float


Side = Callable[[Inputs, Path], Measured]


def _throughput(ends: list[float], tokens: list[int], warmup: int) -> float:
    """Tokens per second of the steps after `warmup`; `ends[i]` is when step i ended, `tokens[i]` what it held."""
    return sum(tokens[warmup:]) / (ends[-1] - ends[warmup - 1])


def finetune_side(inputs: Inputs, folder: Path, micro_batch: int = 1) -> Measured:
    """This project, with as many sequences in a micro-batch as TRL."""
    spec = {
        "model": {"source": inputs.model.name},
        "method": {"tuning": "full"},
        "data": {
            "train": [{"uri": inputs.rows.name, "format": "chat"}],
            "sequenceLength": SEQUENCE_LENGTH,
            "deduplicate": "none",
        },
        "training": {
            "maxSteps": inputs.steps,
            "sequencesPerBatch": GLOBAL_SEQUENCES,
            "microBatch": micro_batch,
            "learningRate": LEARNING_RATE,
            "schedule": "constant",
            "warmup": 0,
            "precision": "bf16",
            "seed": SEED,
        },
        "deepspeed": {"zeroStage": 2},
        "workers": {"count": RANKS},
        "output": {"uri": "output"},
    }
    run = RunConfig(
        name="train-cpu",
        uid="train-cpu",
        spec=FinetuneJobSpec.model_validate(spec),
        base_dir=str(inputs.rows.parent),
        model_path=str(inputs.model),
        work=str(folder),
    )
    (folder / RUN_FILE).write_text(run.model_dump_json())
    prepare(run)
    usage = run_ranks([sys.executable, "-m", "finetune_trainer.train", str(folder / RUN_FILE)], RANKS, folder / "log")
    events = [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]
    steps = [event for event in events if event["event"] == "step"]
    return Measured(
        _throughput([step["time"] for step in steps], [step["tokens"] for step in steps], inputs.warmup),
        usage.peak_bytes,
        usage.peak_shared_bytes,
        statistics.fmean(step["loss"] for step in steps),
    )


def _trl(inputs: Inputs, folder: Path, **settings: Any) -> Measured:
    settings |= {
        "output": str(folder),
        "rows": str(inputs.rows),
        "model": str(inputs.model),
        "sequenceLength": SEQUENCE_LENGTH,
        "steps": inputs.steps,
        "learningRate": LEARNING_RATE,
        "seed": SEED,
    }
    usage: Usage = run_ranks([sys.executable, str(HERE / "trl_rank.py"), json.dumps(settings)], RANKS, folder / "log")
    ranks = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(RANKS)]
    tokens = [sum(step) for step in zip(*(rank["tokens"] for rank in ranks), strict=True)]
    return Measured(
        _throughput(ranks[0]["ends"], tokens, inputs.warmup),
        usage.peak_bytes,
        usage.peak_shared_bytes,
        ranks[0]["loss"],
    )


def trl_packed(inputs: Inputs, folder: Path) -> Measured:
    """TRL with best-fit packing, which makes it padding-free; the fastest micro-batch of 1, 2, 4 and 8 sequences."""
    return _trl(inputs, folder, packing=True, microBatch=1, accumulation=GLOBAL_SEQUENCES // RANKS)


def trl_padded(inputs: Inputs, folder: Path) -> Measured:
    """TRL without packing: every row is padded to the longest of its micro-batch."""
    return _trl(inputs, folder, packing=False, microBatch=11, accumulation=PADDED_ROWS // RANKS // 11)


def finetune_whole(inputs: Inputs, folder: Path) -> Measured:
    """This project, with one flat row of all a rank's sequences in each step."""
    return finetune_side(inputs, folder, GLOBAL_SEQUENCES // RANKS)


SIDES: dict[str, Side] = {
    "finetune": finetune_side,
    "finetune, one row": finetune_whole,
    "TRL packed": trl_packed,
    "TRL padded": trl_padded,
}


def table(results: dict[str, list[Measured]]) -> str:
    """The results as Markdown; ratios compare the means over the rounds."""
    reference = statistics.fmean(run.tokens_per_second for run in results["TRL packed"])
    lines = [
        "| side | tokens/s, each round | mean | against TRL packed | peak RSS | peak PSS | mean loss |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, runs in results.items():
        mean = statistics.fmean(run.tokens_per_second for run in runs)
        each = ", ".join(f"{run.tokens_per_second:,.0f}" for run in runs)
        peak, shared = (
            f"{found / 2**30:.2f} GiB, {found / other:.2f}×"
            for found, other in (
                (max(run.peak_bytes for run in runs), max(run.peak_bytes for run in results["TRL packed"])),
                (
                    max(run.peak_shared_bytes for run in runs),
                    max(run.peak_shared_bytes for run in results["TRL packed"]),
                ),
            )
        )
        lines.append(
            f"| {name} | {each} | {mean:,.0f} | {mean / reference:.2f}× | {peak} | {shared} "
            f"| {runs[-1].mean_loss:.3f} |"
        )
    return "\n".join(lines)


@click.command()
@click.option("--quick", is_flag=True, help="8 steps, without the padded variant.")
@click.option("--steps", default=20, show_default=True, help="Optimizer steps of each run.")
@click.option("--rounds", default=2, show_default=True, help="How often each side runs.")
def main(quick: bool, steps: int, rounds: int) -> None:
    """Measures every side and prints a table."""
    if quick:
        steps, rounds = 8, 2
    sides = {name: side for name, side in SIDES.items() if not (quick and name == "TRL padded")}
    results: dict[str, list[Measured]] = {name: [] for name in sides}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        rows = write_rows(folder / "rows.jsonl")
        parameters = save_model(folder / "model", (m["content"] for row in rows for m in row["messages"]))
        inputs = Inputs(folder / "rows.jsonl", folder / "model", steps, warmup=2)
        for _ in range(rounds):
            for name, side in sides.items():
                work = folder / "run"
                work.mkdir()
                results[name].append(side(inputs, work))
                shutil.rmtree(work)
                click.echo(f"{name}: {results[name][-1].tokens_per_second:,.0f} tokens/s", err=True)
    where = machine("torch", "deepspeed", "transformers", "trl")
    click.echo(f"{where}\n{len(rows):,} rows, {parameters / 1e6:.2f} M parameters, {steps} steps, {RANKS} ranks\n")
    click.echo(table(results))


if __name__ == "__main__":
    main()
