"""TRL's DPOTrainer as an oracle: it tokenises and trains the same pairs on its own, in the same order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_api.run import METRICS_FILE, PREPARED, RunConfig
from finetune_trainer.dataset import PackedDataset
from finetune_trainer.prepare import prepare
from finetune_trainer.reporter import MetricsFile, read_metrics
from finetune_trainer.sampling import order
from finetune_trainer.train import train
from tests.tiny import tiny_llama
from tests.trainer.jobs import run_config

STEPS, GLOBAL_BATCH, BETA = 4, 4, 0.4
TRL_NAMES = {"sigmoid": "sigmoid", "ipo": "ipo", "length-normalised": "sigmoid_norm"}
# TRL counts what a template writes behind the end of the turn as part of the answer; this one writes nothing.
TEMPLATE = (
    "{% for message in messages %}{{ ('' if loop.first else '\n') + '<|im_start|>' + message['role'] + '\n' }}"
    "{{ message['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n<|im_start|>assistant\n' }}{% endif %}"
)


def turn(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def rows() -> list[dict[str, Any]]:
    """Pairs of one and two turns, with answers of different lengths."""
    found = []
    for i in range(STEPS * GLOBAL_BATCH):
        prompt = [turn("user", f"Question {i}: what is {i * 7}?")]
        if i % 3 == 0:
            prompt += [turn("assistant", f"More than {i}."), turn("user", "And then?")]
        chosen = turn("assistant", f"It is {i * 11}, " + "and so on " * (i % 4) + "indeed.")
        rejected = turn("assistant", "No " * (i % 5) + f"idea {i}.")
        found.append({"prompt": prompt, "chosen": [chosen], "rejected": [rejected]})
    return found


def our_run(folder: Path, loss: str) -> RunConfig:
    model = tiny_llama(folder / "model")
    (model / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    return run_config(
        folder,
        model,
        {"packing": False, "deduplicate": "none", "sequenceLength": 256},
        method={"objective": "dpo", "tuning": "full", "dpo": {"loss": loss, "beta": BETA}},
        training={
            "maxSteps": STEPS,
            "sequencesPerBatch": GLOBAL_BATCH,
            "microBatch": 2,
            "learningRate": 1e-3,
            "schedule": "constant",
            "warmup": 0.0,
            "clipping": 1.0,
            "precision": "fp32",
            "seed": 7,
        },
        deepspeed={"zeroStage": 0},
    )


def trl_log(run: RunConfig, loss: str) -> list[dict[str, float]]:
    """Trains with TRL on the rows, which it prepares itself, taken in our order; its log, one entry a step."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    training = run.spec.training
    model, reference = (AutoModelForCausalLM.from_pretrained(run.model_path, dtype=torch.float32) for _ in range(2))
    trainer = DPOTrainer(
        model=model,
        ref_model=reference,
        processing_class=AutoTokenizer.from_pretrained(run.model_path),
        train_dataset=Dataset.from_list(rows()),
        args=DPOConfig(
            output_dir=str(Path(run.work) / "trl"),
            loss_type=[TRL_NAMES[loss]],
            beta=BETA,
            max_length=256,
            per_device_train_batch_size=GLOBAL_BATCH,
            train_sampling_strategy="sequential",
            max_steps=STEPS,
            learning_rate=training.learning_rate,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=training.clipping,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            disable_dropout=True,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
    )
    data = PackedDataset(Path(run.work) / PREPARED, "train")
    plan = order(training, len(data), run.spec.data.sequence_length)
    at = {
        (*row["prompt_ids"], *row["chosen_ids"], *row["prompt_ids"], *row["rejected_ids"]): number
        for number, row in enumerate(trainer.train_dataset)
    }
    taken = [at[tuple(data[int(p)].input_ids.tolist())] for step in range(STEPS) for p in plan.positions(step)]
    trainer.train_dataset = trainer.train_dataset.select(taken)
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("loss", TRL_NAMES)
def test_losses_gradients_and_rewards_equal_those_of_trl(tmp_path: Path, loss: str) -> None:
    run = our_run(tmp_path, loss)
    prepare(run, workers=0)
    with MetricsFile(Path(run.work) / METRICS_FILE) as metrics:
        train(run, metrics)
    ours = [event for event in read_metrics(Path(run.work) / METRICS_FILE) if event["event"] == "step"]

    theirs = trl_log(run, loss)

    assert len(ours) == len(theirs) == STEPS
    assert abs(ours[-1]["rewardMargin"]) > 1e-2, "the models differ from their reference"
    for name, other, bound in (
        ("loss", "loss", 1e-4),
        ("gradNorm", "grad_norm", 1e-3),
        ("rewardMargin", "rewards/margins", 1e-4),
        ("rewardAccuracy", "rewards/accuracies", 1e-6),
    ):
        # The log is rounded to four digits behind the point or to as many significant ones.
        assert [e[name] for e in ours] == pytest.approx([e[other] for e in theirs], rel=bound, abs=1e-4), name
