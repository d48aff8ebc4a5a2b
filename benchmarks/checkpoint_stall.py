"""How long training stands still for a checkpoint: python -m benchmarks.checkpoint_stall [--steps 100]

Two ranks, full finetuning under ZeRO-2 in bf16; one checkpoint in the middle of the steps, whose upload is held to
50 MB/s, both ranks together. Stall is what the loop waits for (writing the shards), plus what steps take longer while
the upload goes on.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

from benchmarks.machine import machine
from benchmarks.ranks import run_ranks

from finetune_api.run import METRICS_FILE, RUN_FILE, RunConfig
from finetune_trainer.reporter import MetricsFile, read_metrics

UPLOAD = 50e6  # bytes a second
RANKS = 2
FIRST = 10  # steps that are not counted: memory is still being taken


def prepare(folder: Path, steps: int) -> None:
    from tests.tiny import tiny_llama
    from tests.trainer.runs import documents, prepare_sequences, run_config

    some = documents(400, seed=1, shortest=200, longest=256)
    prepare_sequences(folder, [[document] for document in some])
    run = run_config(
        folder,
        tiny_llama(folder / "model", hidden=512, layers=6),
        training={"maxSteps": FIRST + steps, "sequencesPerBatch": 8, "microBatch": 4, "precision": "bf16"},
        deepspeed={"zeroStage": 2},
        checkpoint={"everySteps": FIRST + steps // 2},
    )
    (folder / RUN_FILE).write_text(run.model_dump_json())


def rank(folder: Path) -> None:
    import os

    import torch

    from finetune_trainer import storage
    from finetune_trainer.train import train

    torch.set_num_threads(1)
    run = RunConfig.model_validate_json((folder / RUN_FILE).read_bytes())
    name = METRICS_FILE if os.environ["RANK"] == "0" else "other.jsonl"
    with MetricsFile(folder / name) as metrics:
        train(run, metrics, remote=storage.resolve(f"file://{folder}/bucket", folder), upload_rate=UPLOAD / RANKS)


def report(folder: Path, steps: int) -> None:
    events = read_metrics(folder / METRICS_FILE)
    written = next(e for e in events if e["event"] == "checkpoint")
    complete = next(e for e in events if e["event"] == "checkpoint-complete")
    counted = [e for e in events if e["event"] == "step" and e["step"] > FIRST]
    uploading = [e["seconds"] for e in counted if written["time"] < e["time"] <= complete["time"]]
    quiet = [e["seconds"] for e in counted if not written["time"] < e["time"] <= complete["time"]]
    step = statistics.median(quiet)
    slower = len(uploading) * (statistics.median(uploading) - step)
    print(machine("torch", "deepspeed"))
    print(f"checkpoint: {complete['bytes'] / 1e6:.0f} MB, complete after {complete['seconds']:.1f} s")
    print(f"step: median {step:.3f} s; while uploading {statistics.median(uploading):.3f} s ({len(uploading)} steps)")
    for what, seconds in (("writing", written["seconds"]), ("slower steps", slower)):
        print(f"{what}: {seconds:.3f} s = {seconds / (steps * step):.2%} of {steps} steps")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        rank(arguments.rank)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        prepare(folder, arguments.steps)
        command = [sys.executable, "-m", "benchmarks.checkpoint_stall", "--rank", str(folder)]
        run_ranks(command, RANKS, folder / "log")
        report(folder, arguments.steps)


if __name__ == "__main__":
    main()
