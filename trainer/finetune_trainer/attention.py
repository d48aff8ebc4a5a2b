"""Causal attention over packed documents that never builds a mask: documents cannot see each other by construction.

Registered with transformers as the attention implementation `packed`; the models pass on the keyword arguments
`cu_seq_lens_q` and `max_length_q` that they are called with.
"""

from __future__ import annotations

import inspect
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

from finetune_trainer import ulysses
from finetune_trainer.distributed import SequenceGroup

NAME: Final = "packed"

# Older torch finds grouped heads by the shapes alone.
_GROUPED: Final[dict[str, Any]] = (
    {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    sequence: SequenceGroup | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Attends within each document.

    Args:
        query: [1, heads, T, size]; key and value may have fewer heads, and divide them.
        cu_seq_lens_q: [documents + 1], int32: where each document starts, and T.
        max_length_q: tokens of the longest document.
        sequence: the workers that share the row; then query, key and value have T / size tokens, this worker's part
            of it, and boundaries stay those of the whole row.

    Returns:
        [1, T, heads, size], and no attention weights.
    """
    if sequence is not None:
        query, key, value = (ulysses.heads_for_tokens(each, sequence) for each in (query, key, value))
    out = _attend(query, key, value, scaling, dropout, sliding_window, cu_seq_lens_q, max_length_q)
    return out if sequence is None else ulysses.tokens_for_heads(out, sequence), None


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    dropout: float,
    sliding_window: int | None,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
) -> Tensor:
    window = sliding_window if sliding_window is not None and sliding_window < max_length_q else None
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and not dropout:
        out = varlen_attn(
            query[0].transpose(0, 1),
            key[0].transpose(0, 1),
            value[0].transpose(0, 1),
            cu_seq_lens_q,
            cu_seq_lens_q,
            max_length_q,
            max_length_q,
            scale=scaling,
            window_size=(-1 if window is None else window - 1, 0),
            **_GROUPED,
        )
        assert isinstance(out, Tensor)
        return out[None]
    dtype = query.dtype
    if query.device.type == "cpu":
        # Its kernels for bfloat16 take 1.6 times as long for short documents, and compile one for every length.
        query, key, value = query.float(), key.float(), value.float()
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    lengths = cu_seq_lens_q.diff().tolist()
    documents = (
        F.scaled_dot_product_attention(
            q, k, v, attn_mask=_window_mask(q, window), is_causal=window is None, dropout_p=dropout, scale=scaling
        )
        for q, k, v in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    )
    return torch.cat(list(documents), 2).transpose(1, 2).to(dtype)


def _window_mask(query: Tensor, window: int | None) -> Tensor | None:
    if window is None:
        return None
    at = torch.arange(query.shape[2], device=query.device)
    distance = at[:, None] - at[None]
    return (distance >= 0) & (distance < window)


def register() -> None:
    """Makes `packed` known to transformers. It has no mask function: the models then build no mask."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, packed_attention)
