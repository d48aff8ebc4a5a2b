"""Every objective, full and LoRA, at every ZeRO stage, on two workers: trains, resumes, exports, reloads.

The end of docs/objectives.md is what this gives; FINETUNE_WRITE_TABLE=1 writes it anew.
"""

from __future__ import annotations

import gc
import itertools
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from finetune_api.run import CHECKPOINTS, EXPORT, METRICS_FILE, PREPARED, RunConfig, checkpoint_name
from finetune_trainer.dataset import PackedDataset
from finetune_trainer.prepare import prepare
from finetune_trainer.reporter import MetricsFile, read_metrics
from tests.trainer.jobs import chat, jsonl, run_config
from tests.trainer.test_prepare_code import MIDDLE, PREFIX, SUFFIX, coder, functions
from tests.trainer.test_prepare_rag import ROWS as RAG
from tests.trainer.workers import NoReporter, in_workers

pytestmark = pytest.mark.timeout(3000)

DOCUMENT = Path(__file__).parents[2] / "docs" / "objectives.md"
STEPS, STOPPED = 4, 2
BETA = 0.5
ROWS: dict[str, list[dict[str, Any]]] = {
    "chat": [
        {"messages": [*chat(f"What is {i}?", f"It is {i * 7}.")["messages"], *chat("And?", f"{i * i}.")["messages"]]}
        for i in range(24)
    ],
    "completion": [{"prompt": f"Number {i} and {i * 3}:", "completion": f" {i * 11} of it"} for i in range(24)],
    "code": [{"text": text} for text in functions(24)],
    "text": [{"text": f"The number {i} is {i * 7}, and {i * i} is another one."} for i in range(24)],
    "retrieval": RAG[:16],
    "refusals": [chat(f"What is {i} plus {i * 2}?", f"It is {i * 3}.") for i in range(24)],
    "preference": [
        {"prompt": f"What is {i} times 7?", "chosen": f"It is {i * 7}.", "rejected": f"No idea {i * 3}."}
        for i in range(24)
    ],
}
SPECS: dict[str, tuple[str, dict[str, Any]]] = {  # the objective, and settings of the data
    "chat": ("sft", {}),
    "completion": ("sft", {}),
    "code": ("pretrain", {"train": [{"uri": "rows.jsonl", "format": "code"}], "fim": {"rate": 0.5}}),
    "text": ("pretrain", {}),
    "retrieval": ("sft", {"sequenceLength": 512}),
    "refusals": ("sft", {"refusals": {"mix": 0.2}}),
    "preference": ("dpo", {}),
}
TITLES = {
    "chat": "chat (`sft`)",
    "completion": "completion (`sft`)",
    "code": "code, fill in the middle (`pretrain`)",
    "text": "raw text (`pretrain`)",
    "retrieval": "retrieval (`sft`)",
    "refusals": "chat with built-in refusals (`sft`)",
    "preference": "preference (`dpo`)",
}
TUNINGS, STAGES = ("full", "lora"), (0, 1, 2, 3)
Cell = tuple[str, str, int]
CELLS: list[Cell] = list(itertools.product(ROWS, TUNINGS, STAGES))
INTRODUCTION = """## Tested

Each cell is a run of a tiny Llama on two workers, in float32. It

1. **trains**: every step's loss is finite, and the evaluation loss ends elsewhere than the base model's;
2. **resumes**: gone on with from the checkpoint after 2 of 4 steps, it ends with the bytes of a run without a stop;
3. **exports**: the written folders, loaded again, give the logits of the model in memory;
4. **reloads**: in `transformers` (adapters in PEFT) the written weights give the run's last evaluation loss, computed
   one document at a time.

✓ is all four. `make test ARGS=tests/trainer/test_objectives_table.py` checks it, and that this page says what it found.

"""


def job(folder: Path, model: Path, cell: Cell) -> RunConfig:
    """A run in a folder of its own over the prepared rows of its objective."""
    name, tuning, stage = cell
    objective, data = SPECS[name]
    zero = {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
    return run_config(
        folder / name,
        model,
        {"sequenceLength": 256, "evaluationFraction": 0.2, "deduplicate": "none"} | data,
        work=f"{tuning}-{stage}",
        method={"objective": objective, "tuning": tuning, "lora": {"rank": 4}, "dpo": {"beta": BETA}},
        training={"maxSteps": STEPS, "sequencesPerBatch": 3, "learningRate": 5e-3, "precision": "fp32", "seed": 1},
        deepspeed={"zeroStage": stage, "config": {"zero_optimization": zero}},
        checkpoint={"keep": 9, "everySteps": STOPPED},
        workers={"count": 2},
    )


def straight(run: RunConfig) -> RunConfig:
    return run.model_copy(update={"work": f"{run.work}-straight"})


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[Cell, RunConfig]:
    """All cells, each once without a stop, and once from its checkpoint by an engine made anew."""
    folder = tmp_path_factory.mktemp("objectives")
    model = coder(folder / "model", PREFIX, SUFFIX, MIDDLE)
    made = {cell: job(folder, model, cell) for cell in sorted(CELLS, key=lambda cell: cell[2])}
    for name, rows in ROWS.items():
        (folder / name).mkdir()
        (folder / name / "rows.jsonl").write_bytes(jsonl(rows))
        prepare(made[name, "full", 0], workers=0)
    for (name, _, _), run in made.items():
        source = Path(made[name, "full", 0].work) / PREPARED
        for each in (run, straight(run)):
            if not (Path(each.work) / PREPARED).exists():
                shutil.copytree(source, Path(each.work) / PREPARED)
    in_workers(train_all, 2, folder / "store", list(made.values()))
    return made


def train_all(rank: int, runs: list[RunConfig]) -> None:
    import torch.distributed as dist

    for run in runs:
        train_once(rank, straight(run))
        if rank == 0:  # what a worker leaves that is killed after its checkpoint
            shutil.copytree(Path(straight(run).work) / CHECKPOINTS, Path(run.work) / CHECKPOINTS)
            shutil.rmtree(Path(run.work) / CHECKPOINTS / checkpoint_name(STEPS))
        dist.barrier()
        train_once(rank, run)


def train_once(rank: int, run: RunConfig) -> None:
    from finetune_trainer.train import train

    with MetricsFile(Path(run.work) / METRICS_FILE) as metrics:
        train(run, NoReporter() if rank else metrics)
    gc.collect()


def failures(run: RunConfig) -> list[str]:
    """What a cell does not do."""
    found = []
    checks = {"trains": trains, "resumes": resumes, "exports": exports, "reloads": reloads}
    for name, check in checks.items():
        try:
            check(run)
        except (AssertionError, OSError, KeyError) as error:
            found.append(f"{name}: {error}")
    return found


def events(run: RunConfig, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_metrics(Path(run.work) / METRICS_FILE) if event["event"] == kind]


def weights(run: RunConfig) -> dict[str, bytes]:
    folder = Path(run.work) / EXPORT
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))}


def trains(run: RunConfig) -> None:
    losses = [event["loss"] for event in events(straight(run), "step")]
    assert len(losses) == STEPS
    assert all(math.isfinite(loss) for loss in losses)
    first, last = events(straight(run), "evaluation")
    assert abs(last["loss"] - first["loss"]) > 1e-3


def resumes(run: RunConfig) -> None:
    assert [e["resumedFromStep"] for e in events(run, "start")] == [STOPPED]
    assert [e["step"] for e in events(run, "step")] == [*range(STOPPED + 1, STEPS + 1)]
    assert weights(run)
    assert weights(run) == weights(straight(run)), "other bytes"


def exports(run: RunConfig) -> None:
    result = json.loads((Path(run.work) / EXPORT / "export.json").read_text())
    folders = ["model"] if run.spec.method.tuning == "full" else ["adapter", "merged"]
    assert [check["folder"] for check in result["checks"]] == folders
    assert all(check["difference"] <= check["bound"] for check in result["checks"])


def reloads(run: RunConfig) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def base() -> Any:
        return AutoModelForCausalLM.from_pretrained(run.model_path, dtype=torch.float32)

    export = Path(run.work) / EXPORT
    models = {
        name: AutoModelForCausalLM.from_pretrained(export / name, dtype=torch.float32)
        for name in ("model", "merged")
        if (export / name).is_dir()
    }
    if (export / "adapter").is_dir():
        models["adapter"] = PeftModel.from_pretrained(base(), export / "adapter")
    wanted = events(run, "evaluation")[-1]["loss"]
    for name, model in models.items():
        reference = base() if run.spec.method.objective == "dpo" else None
        assert evaluation_loss(run, model, reference) == pytest.approx(wanted, rel=1e-3, abs=1e-4), name


@torch.no_grad()
def evaluation_loss(run: RunConfig, model: Any, reference: Any | None) -> float:
    """The evaluation loss by plain transformers, one document at a time; against a reference that of pairs."""
    data = PackedDataset(Path(run.work) / PREPARED, "evaluation")
    documents = [part for index in range(len(data)) for part in parts(data, index)]
    if reference is None:
        return sum(nll(model, *part) for part in documents) / sum(float(w.sum()) for _, w in documents)
    ratios = [nll(reference, *part) - nll(model, *part) for part in documents]
    margins = [BETA * (chosen - rejected) for chosen, rejected in zip(ratios[::2], ratios[1::2], strict=True)]
    return float(np.mean([math.log1p(math.exp(-margin)) for margin in margins]))


def parts(data: PackedDataset, index: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    sequence = data[index]
    lengths = sequence.documents.tolist()
    ids = torch.tensor(sequence.input_ids, dtype=torch.long).split(lengths)
    return list(zip(ids, torch.from_numpy(sequence.weights).split(lengths), strict=True))


def nll(model: Any, ids: torch.Tensor, weights: torch.Tensor) -> float:
    logits = model.eval()(input_ids=ids[None]).logits[0, :-1].float()
    return float((F.cross_entropy(logits, ids[1:], reduction="none") * weights[1:]).sum())


@pytest.fixture(scope="module")
def results(runs: dict[Cell, RunConfig]) -> dict[Cell, list[str]]:
    return {cell: failures(run) for cell, run in runs.items()}


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: "-".join(map(str, cell)))
def test_it_trains_resumes_exports_and_reloads(results: dict[Cell, list[str]], cell: Cell) -> None:
    assert results[cell] == []


def table(results: dict[Cell, list[str]]) -> str:
    lines = ["| objective | tuning | ZeRO 0 | ZeRO 1 | ZeRO 2 | ZeRO 3 |", "|---|---|---|---|---|---|"]
    for name, tuning in itertools.product(ROWS, TUNINGS):
        failed = (results[name, tuning, stage] for stage in STAGES)
        marks = ["✗ " + ", ".join(text.split(":")[0] for text in f) if f else "✓" for f in failed]
        lines.append(f"| {TITLES[name]} | {tuning} | {' | '.join(marks)} |")
    return INTRODUCTION + "\n".join(lines) + "\n"


def test_the_page_says_what_was_found(results: dict[Cell, list[str]]) -> None:
    written, heading, found = DOCUMENT.read_text().partition("## Tested\n")
    if os.environ.get("FINETUNE_WRITE_TABLE"):
        DOCUMENT.write_text(written + table(results))
        return
    assert heading + found == table(results)
