"""Ulysses sequence parallelism: around attention, workers that share a row swap parts of it for heads.

Elsewhere each worker has its part of the tokens and all heads; in attention, which looks across tokens, it has all
tokens and its part of the heads (https://arxiv.org/abs/2309.14509).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.nn.functional import all_to_all_single

from finetune_trainer.distributed import SequenceGroup


def heads_for_tokens(x: Tensor, sequence: SequenceGroup) -> Tensor:
    """[1, heads, T / N, size] of N workers → [1, heads / N, T, size]. A collective, and again in the backward pass.

    Where there are fewer heads than workers (of keys and values), several workers get the same one.
    """
    if x.shape[1] < sequence.size:
        x = x.repeat_interleave(sequence.size // x.shape[1], 1)
    _, heads, tokens, size = x.shape
    parts = _exchange(x.reshape(sequence.size, heads // sequence.size, tokens, size), sequence)
    return parts.transpose(0, 1).reshape(1, heads // sequence.size, sequence.size * tokens, size)


def tokens_for_heads(x: Tensor, sequence: SequenceGroup) -> Tensor:
    """[1, T, heads / N, size] of N workers → [1, T / N, heads, size]. A collective, and again in the backward pass."""
    _, tokens, heads, size = x.shape
    parts = _exchange(x.reshape(sequence.size, tokens // sequence.size, heads, size), sequence)
    return parts.transpose(0, 1).reshape(1, tokens // sequence.size, sequence.size * heads, size)


def _exchange(x: Tensor, sequence: SequenceGroup) -> Tensor:
    """Sends x[i] to worker i; the result's [i] came from it."""
    x = x.contiguous()
    received: Tensor = all_to_all_single(torch.empty_like(x), x, group=sequence.group)
    return received
