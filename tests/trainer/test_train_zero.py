"""Every ZeRO stage, full and LoRA, on two workers, against one plain PyTorch loop over unpacked documents."""

from __future__ import annotations

import itertools
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from finetune_api.run import EXPORT, METRICS_FILE, PREPARED, RunConfig
from finetune_trainer.dataset import PackedDataset, PackedSequence
from finetune_trainer.reporter import MetricsFile, read_metrics
from finetune_trainer.sampling import order
from finetune_trainer.train import train
from tests.tiny import tiny_llama
from tests.trainer.runs import documents, prepare_sequences, run_config
from tests.trainer.workers import train_with_workers

STEPS = 10
CASES = list(itertools.product((0, 1, 2, 3), ("full", "lora"), ("fp32", "bf16")))
LORA = {"rank": 4, "alpha": 8, "targetModules": ["q_proj", "v_proj", "down_proj"]}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str, str], RunConfig]:
    """All cases, trained by one pair of workers."""
    folder = tmp_path_factory.mktemp("zero")
    model = tiny_llama(folder / "model")
    some = documents(45, seed=1)
    sequences = [some[i : i + 1 + i % 3] for i in range(0, 42, 2)]  # one to three documents each
    made = {}
    for stage, tuning, precision in CASES:
        work = folder / f"{stage}-{tuning}-{precision}"
        prepare_sequences(work, sequences)
        made[stage, tuning, precision] = run_config(
            work,
            model,
            method={"tuning": tuning, "lora": LORA},
            # 5 sequences: an odd share for two workers, with an empty micro-batch for one of them.
            training={
                "maxSteps": STEPS,
                "sequencesPerBatch": 5,
                "microBatch": 2 if stage == 2 else 1,
                "precision": precision,
                "schedule": "cosine",
                "warmup": 3,
                "weightDecay": 0.1,
                "clipping": 0.3,
            },
            # Without a threshold of 0 ZeRO-3 would keep all of so small a model on every worker.
            deepspeed={
                "zeroStage": stage,
                "config": {"zero_optimization": {"stage3_param_persistence_threshold": 0}} if stage == 3 else {},
            },
        )
    train_with_workers(list(made.values()), 2, folder / "store")
    return made


@pytest.fixture(scope="module")
def plain(runs: dict[tuple[int, str, str], RunConfig]) -> dict[tuple[str, str], Any]:
    return {
        (tuning, precision): plain_loop(runs[0, tuning, precision])
        for tuning, precision in itertools.product(("full", "lora"), ("fp32", "bf16"))
    }


def plain_loop(run: RunConfig) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and trained parameters of one process that takes each document on its own.

    In bf16 the model computes in bf16 and AdamW updates float32 masters of it.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    training = run.spec.training
    model: Any = AutoModelForCausalLM.from_pretrained(
        run.model_path, dtype=torch.bfloat16 if training.precision == "bf16" else torch.float32
    )
    if run.spec.method.tuning == "lora":
        lora = run.spec.method.lora
        torch.manual_seed(training.seed)
        config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.target_modules))
        model = get_peft_model(model, config, autocast_adapter_dtype=False)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    masters = {name: p.detach().float().clone() for name, p in trained.items()}
    for master in masters.values():
        master.requires_grad_()
    groups = [
        {"params": [m for m in masters.values() if m.ndim > 1], "weight_decay": training.weight_decay},
        {"params": [m for m in masters.values() if m.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], eps=training.epsilon)
    data = PackedDataset(Path(run.work) / PREPARED, "train")
    plan = order(training, len(data), run.spec.data.sequence_length)
    rates = [event["learningRate"] for event in steps(run)]
    losses = []
    for step in range(STEPS):
        sequences = [data[int(p)] for p in plan.positions(step)]
        weights = sum(float(s.weights.sum()) for s in sequences)
        nll = 0.0
        for ids, weight in itertools.chain.from_iterable(map(split_documents, sequences)):
            logits = model(input_ids=ids[None], use_cache=False).logits[0].float()
            loss = (F.cross_entropy(logits[:-1], ids[1:], reduction="none") * weight[1:]).sum()
            (loss / weights).backward()
            nll += loss.item()
            for name, p in trained.items():  # float32 accumulation
                gradient = masters[name].grad
                masters[name].grad = p.grad.float() if gradient is None else gradient + p.grad.float()
                p.grad = None
        torch.nn.utils.clip_grad_norm_(masters.values(), training.clipping)
        for group in optimizer.param_groups:
            group["lr"] = rates[step]
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for name, p in trained.items():
                p.copy_(masters[name])
        losses.append(nll / weights)
    return losses, masters


def split_documents(sequence: PackedSequence) -> list[tuple[torch.Tensor, torch.Tensor]]:
    lengths = sequence.documents.tolist()
    ids = torch.from_numpy(sequence.input_ids.copy()).long()
    return list(zip(ids.split(lengths), torch.from_numpy(sequence.weights).split(lengths), strict=True))


def steps(run: RunConfig) -> list[dict[str, Any]]:
    return [event for event in read_metrics(Path(run.work) / METRICS_FILE) if event["event"] == "step"]


@pytest.mark.parametrize(("stage", "tuning", "precision"), CASES)
def test_losses_are_those_of_a_plain_loop(runs: Any, plain: Any, stage: int, tuning: str, precision: str) -> None:
    ours = [event["loss"] for event in steps(runs[stage, tuning, precision])]
    theirs, _ = plain[tuning, precision]
    assert ours == pytest.approx(theirs, rel=1e-5 if precision == "fp32" else 2**-8)


def test_one_worker_takes_the_same_samples_as_two(runs: Any, tmp_path: Path) -> None:
    two = runs[2, "full", "fp32"]
    shutil.copytree(Path(two.work) / PREPARED, tmp_path / PREPARED)
    one = two.model_copy(update={"work": str(tmp_path)})
    with MetricsFile(tmp_path / METRICS_FILE) as metrics:
        train(one, metrics)
    keys = ("loss", "tokens", "targetTokens", "gradNorm")
    alone, together = ([[event[key] for key in keys] for event in steps(run)] for run in (one, two))
    assert np.array(alone) == pytest.approx(np.array(together), rel=1e-4)


@pytest.mark.parametrize(("stage", "tuning"), sorted({case[:2] for case in CASES}))
def test_parameters_after_ten_steps_are_those_of_a_plain_loop(runs: Any, plain: Any, stage: int, tuning: str) -> None:
    _, theirs = plain[tuning, "fp32"]
    folder = Path(runs[stage, tuning, "fp32"].work) / EXPORT
    if tuning == "full":
        ours = load_file(folder / "model" / "model.safetensors")
    else:
        adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
        ours = {re.sub("(lora_[AB])", r"\1.default", name): value for name, value in adapter.items()}
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value.detach(), atol=1e-5, rtol=0, msg=name)
