"""Floating-point operations that training needs, against what the GPU can do: model FLOPs utilisation (MFU).

Per token, after PaLM's appendix B (https://arxiv.org/abs/2204.02311): each weight of a matrix costs 2 operations in
the forward pass, 2 for the gradient of its input and 2 for its own. Causal attention costs 2·2·layers·width operations
per pair of tokens forward and twice that backward, where width is heads·head size. Recomputed activations do not count.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from finetune_trainer.model import full_shape

# Dense bf16 and fp16 tensor-core peak in FLOP/s by a part of the device's name, from the makers' data sheets; the first
# that fits counts.
PEAK: Final = {
    "B200": 2250e12,
    "GH200": 989.4e12,
    "H200": 989.4e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989.4e12,
    "H800": 989.4e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A10": 125e12,
    "A40": 149.7e12,
    "A30": 165e12,
    "RTX 4090": 165.2e12,
}


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Peak FLOP/s of one GPU in bf16 or fp16; None on a CPU, in fp32, and for a GPU that is not in the table."""
    if device.type != "cuda" or precision == "fp32":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK.items() if part in name), None)


def parameters(model: nn.Module) -> tuple[int, int]:
    """Parameters, and those that are trained."""
    sizes = [(full_shape(p).numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, _ in sizes), sum(n for n, trained in sizes if trained)


class TrainingFlops:
    """Operations of forward and backward passes over packed documents."""

    def __init__(self, model: Any) -> None:
        config = model.config.get_text_config()
        embedding = model.get_input_embeddings().weight
        # A look-up costs nothing; where it shares its weight with the output layer, that one does.
        looked_up = 0 if config.tie_word_embeddings else full_shape(embedding).numel()
        total, trained = parameters(model)
        if embedding.requires_grad:
            trained -= looked_up
        # Inputs' gradients flow through frozen weights too, so they cost 4, trained ones 6.
        self._per_token = 4 * (total - looked_up) + 2 * trained
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        # A token sees half of its document on average.
        self._per_token_pair = 12 * config.num_hidden_layers * config.num_attention_heads * head_size / 2

    def of(self, lengths: npt.NDArray[np.int64]) -> float:
        """Operations of a step over documents of these lengths in tokens."""
        return float(self._per_token * lengths.sum() + self._per_token_pair * (lengths.astype(np.float64) ** 2).sum())
