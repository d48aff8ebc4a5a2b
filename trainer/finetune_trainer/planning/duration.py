"""How long training takes, and what it costs: the model's operations against what such GPUs reach.

The share of a GPU's peak that training reaches (MFU) is an assumption until we have measured it: NeMo AutoModel's
LoRA of Llama-3-8B reaches 41 % of an H100 (12,473 tokens/s), LLM Foundry's full training of MPT-7B 46 % of eight. We
take the lower one for everything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from finetune_api.job import FinetuneJobSpec
from finetune_trainer.flops import PEAK, TrainingFlops

MFU: Final = 0.41


@dataclass(frozen=True)
class Speed:
    """Expected throughput of all GPUs together."""

    tokens_per_second: float
    mfu: float  # of which the recomputation of activations does not count

    def seconds(self, tokens: float) -> float:
        return tokens / self.tokens_per_second


def peak_of(gpu: str) -> float | None:
    """Peak FLOP/s in bf16 of a GPU by its product name, such as `NVIDIA-H200`; None when it is not known."""
    name = gpu.replace("-", " ")
    return next((peak for part, peak in PEAK.items() if part in name), None)


def speed(model: Any, spec: FinetuneJobSpec, *, world_size: int, peak: float) -> Speed | None:
    """Throughput of `world_size` GPUs that each do `peak` operations a second; None with offload, whose speed depends
    on the host, and in float32.

    Documents are taken to be as long as a sequence, which costs attention the most.
    """
    offload = spec.deepspeed.offload
    if "cpu" in (offload.optimizer, offload.parameters) or spec.training.precision == "fp32":
        return None
    length = spec.data.sequence_length
    operations = TrainingFlops(model).of(np.array([length])) / length
    mfu = MFU
    if spec.training.activation_checkpointing:
        # One more forward pass: 8 operations a weight instead of 6, and 6 instead of 4 where it is frozen.
        once, again = 6 if spec.method.tuning == "full" else 4, 2 / spec.training.recompute_every
        mfu *= once / (once + again)
    return Speed(tokens_per_second=world_size * peak * mfu / operations, mfu=mfu)
