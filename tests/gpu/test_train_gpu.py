"""What is different on a GPU: the kernel for packed attention, and the engine's precision and memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from finetune_trainer.attention import packed_attention

ROOT = Path(__file__).parents[2]
LENGTHS = (9, 3, 64, 52)


@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2)], ids=str)
def test_the_kernel_attends_as_the_cpu_does(window: int | None, heads: tuple[int, int]) -> None:
    """Outputs and gradients, in bf16 against float32 document by document."""
    torch.manual_seed(0)
    boundaries = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)
    inputs = [torch.randn(1, n, sum(LENGTHS), 64) for n in (heads[0], heads[1], heads[1])]
    results = []
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        query, key, value = (x.to(device, dtype).requires_grad_() for x in inputs)
        out, _ = packed_attention(
            torch.nn.Module(),
            query,
            key,
            value,
            None,
            sliding_window=window,
            cu_seq_lens_q=boundaries.to(device),
            max_length_q=max(LENGTHS),
        )
        out.float().square().sum().backward()
        results.append([out.detach(), *(x.grad for x in (query, key, value) if x.grad is not None)])
    assert len(results[0]) == 4
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found.cpu().float(), expected, atol=0.1, rtol=0.05)


def test_the_benchmark_trains_on_this_gpu() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    command = [sys.executable, str(ROOT / "benchmarks" / "train_gpu.py"), "--dry-run"]
    printed = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    assert torch.cuda.get_device_name() in printed
    assert "does not fit" not in printed
