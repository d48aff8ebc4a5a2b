"""TRL's SFTTrainer as an oracle: it tokenises, masks and trains the same rows on its own, in the same order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_api.job import FinetuneJobSpec
from finetune_api.run import METRICS_FILE, PREPARED, RunConfig
from finetune_trainer.dataset import PackedDataset
from finetune_trainer.prepare import prepare
from finetune_trainer.reporter import MetricsFile, read_metrics
from finetune_trainer.sampling import order
from finetune_trainer.train import train
from tests.tiny import tiny_llama

STEPS = 6
GLOBAL_BATCH = 4
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOPICS = ("a list", "the capital", "json rows", "a function", "the lazy dog", "an argument", "a comment", "the fox")


def chat_rows() -> list[dict[str, Any]]:
    """Conversations of different lengths, some with two turns and a system message."""
    rows = []
    for i in range(STEPS * GLOBAL_BATCH):
        topic = TOPICS[i % len(TOPICS)]
        messages = [
            {"role": "user", "content": f"Question {i}: what about {topic}?"},
            {"role": "assistant", "content": f"Here is {topic}, " + "and so on " * (i % 5) + f"number {i * i}."},
        ]
        if i % 3 == 0:
            messages += [
                {"role": "user", "content": "And then?"},
                {"role": "assistant", "content": f"I don't know more than {i}."},
            ]
        if i % 4 == 0:
            messages.insert(0, {"role": "system", "content": "You are a helpful assistant."})
        rows.append({"messages": messages})
    return rows


def completion_rows() -> list[dict[str, Any]]:
    """Prompts and completions of different lengths."""
    return [
        {
            "prompt": f"Question {i}: what about {TOPICS[i % len(TOPICS)]}? Answer:",
            "completion": f"{i * i} times " + "yes, " * (i % 6) + "always.",
        }
        for i in range(STEPS * GLOBAL_BATCH)
    ]


def as_trl_reads(row: dict[str, Any]) -> dict[str, Any]:
    """The row as TRL puts it through the chat template: it renders prompt and completion only when they are turns."""
    if "messages" in row:
        return row
    prompt = [{"role": "user", "content": row["prompt"]}]
    return {"prompt": prompt, "completion": [{"role": "assistant", "content": row["completion"]}]}


def our_run(folder: Path, rows: list[dict[str, Any]]) -> RunConfig:
    """An unpacked fp32 run over `rows`, without warm-up, as TRL's schedule starts at 0 with it."""
    model = tiny_llama(folder / "model")
    (model / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = FinetuneJobSpec.model_validate(
        {
            "model": {"source": "model"},
            "method": {"tuning": "full"},
            "data": {
                "train": [{"uri": "rows.jsonl"}],
                "sequenceLength": 256,
                "packing": False,
                "deduplicate": "none",
            },
            "training": {
                "maxSteps": STEPS,
                "sequencesPerBatch": GLOBAL_BATCH,
                "microBatch": 2,
                "learningRate": 1e-3,
                "schedule": "linear",
                "minimumLearningRate": 0.0,
                "warmup": 0.0,
                "weightDecay": 0.01,
                "clipping": 1.0,
                "precision": "fp32",
                "seed": 7,
            },
            "deepspeed": {"zeroStage": 0},
            "output": {"uri": "output"},
        }
    )
    return RunConfig(
        name="against-trl", uid="against-trl", spec=spec, base_dir=str(folder), model_path=str(model), work=str(folder)
    )


def our_order(run: RunConfig) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids and labels (-100 where nothing is learned) of the sequences, in the order they are trained on."""
    dataset = PackedDataset(Path(run.work) / PREPARED, "train")
    plan = order(run.spec.training, len(dataset), run.spec.data.sequence_length)
    sequences = [dataset[int(position)] for step in range(plan.steps) for position in plan.positions(step)]
    assert all(set(sequence.weights.tolist()) <= {0.0, 1.0} for sequence in sequences)
    ids = [sequence.input_ids.tolist() for sequence in sequences]
    labels = [
        [token if weight else -100 for token, weight in zip(s.input_ids.tolist(), s.weights, strict=True)]
        for s in sequences
    ]
    return ids, labels


def trl_log(run: RunConfig, rows: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Trains with TRL on `rows`, which it prepares itself, taken in our order; its log, one entry a step."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    training = run.spec.training
    assert training.sequences_per_batch is not None
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(run.model_path, dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(run.model_path),
        train_dataset=Dataset.from_list([as_trl_reads(row) for row in rows]),
        args=SFTConfig(
            output_dir=str(Path(run.work) / "trl"),
            max_length=run.spec.data.sequence_length,
            assistant_only_loss=True,
            per_device_train_batch_size=training.micro_batch,
            gradient_accumulation_steps=training.sequences_per_batch // training.micro_batch,
            train_sampling_strategy="sequential",
            max_steps=STEPS,
            learning_rate=training.learning_rate,
            lr_scheduler_type="linear",
            weight_decay=training.weight_decay,
            max_grad_norm=training.clipping,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
    )
    ids, labels = our_order(run)
    at = {tuple(row["input_ids"]): number for number, row in enumerate(trainer.train_dataset)}
    trainer.train_dataset = trainer.train_dataset.select([at[tuple(sequence)] for sequence in ids])
    assert trainer.train_dataset["labels"][:] == labels, "TRL masks other tokens"
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("rows", [chat_rows(), completion_rows()], ids=["chat", "completion"])
def test_the_first_losses_equal_those_of_trl(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    run = our_run(tmp_path, rows)
    prepare(run)
    with MetricsFile(tmp_path / METRICS_FILE) as metrics:
        train(run, metrics)
    ours = [event for event in read_metrics(tmp_path / METRICS_FILE) if event["event"] == "step"]

    theirs = trl_log(run, rows)

    assert [event["step"] for event in ours] == list(range(1, STEPS + 1))
    assert [event["loss"] for event in ours] == pytest.approx([entry["loss"] for entry in theirs], abs=1e-3)
    assert [event["gradNorm"] for event in ours] == pytest.approx([entry["grad_norm"] for entry in theirs], rel=1e-2)
    assert [event["learningRate"] for event in ours] == pytest.approx([entry["learning_rate"] for entry in theirs])
