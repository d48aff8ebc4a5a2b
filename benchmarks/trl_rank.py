"""One rank of the TRL side: `train_cpu.py` starts it with torchrun's environment and the settings as JSON."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

for tracker in ("mlflow", "wandb"):  # this project's extras: a plain environment of TRL has neither
    sys.modules[tracker] = None  # type: ignore[assignment]

import torch  # noqa: E402
from datasets import load_dataset  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback  # noqa: E402
from trl import SFTConfig, SFTTrainer  # noqa: E402


class Clock(TrainerCallback):
    """Notes the time at each end of an optimizer step."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.time())


class CountingTrainer(SFTTrainer):
    """Counts this rank's real tokens: those of a padding-free row, or those under the attention mask."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.tokens = [0]

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        mask = inputs.get("attention_mask")
        self.tokens[-1] += inputs["input_ids"].numel() if mask is None else int(mask.sum())
        if self.accelerator.sync_gradients:
            self.tokens.append(0)
        loss: torch.Tensor = super().training_step(model, inputs, *args, **kwargs)
        return loss


def main() -> None:
    settings = json.loads(sys.argv[1])
    zero = {"stage": 2, "overlap_comm": False, "contiguous_gradients": True}
    config = SFTConfig(
        output_dir=settings["output"],
        max_length=settings["sequenceLength"],
        packing=settings["packing"],
        packing_strategy="bfd",
        assistant_only_loss=True,
        per_device_train_batch_size=settings["microBatch"],
        gradient_accumulation_steps=settings["accumulation"],
        max_steps=settings["steps"],
        learning_rate=settings["learningRate"],
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        bf16=True,
        use_cpu=True,
        seed=settings["seed"],
        gradient_checkpointing=False,
        dataloader_num_workers=settings.get("dataloaderWorkers", 0),
        logging_steps=settings["steps"],
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        deepspeed={
            "zero_optimization": zero,
            "bf16": {"enabled": True},
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
        },
        **settings.get("extra", {}),
    )
    trainer = CountingTrainer(
        model=AutoModelForCausalLM.from_pretrained(settings["model"], attn_implementation="sdpa"),
        processing_class=AutoTokenizer.from_pretrained(settings["model"]),
        train_dataset=load_dataset("json", data_files=settings["rows"], split="train"),
        args=config,
    )
    clock = Clock()
    trainer.add_callback(clock)
    loss = trainer.train().training_loss
    result = {"ends": clock.ends, "tokens": trainer.tokens[: len(clock.ends)], "loss": loss}
    (Path(settings["output"]) / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
