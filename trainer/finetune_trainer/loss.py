"""The loss of a causal language model, without ever holding all its logits.

Only positions that predict a token with a weight go through the output layer, a chunk at a time, and the gradient of
each chunk is computed with it, so that neither logits nor recomputation are left for the backward pass (the method
of https://arxiv.org/abs/2410.10989, section 3.2).
"""

from __future__ import annotations

from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from finetune_trainer.batches import MicroBatch
from finetune_trainer.weights import inner_model

# Of one chunk's float32 logits: small enough for a CPU's cache, large enough to keep a GPU busy. The planner computes
# with tensors of the device "meta", which have shapes only, and says which one it means.
_CHUNK_BYTES: Final = {"cpu": 16 << 20, "cuda": 512 << 20}


class _LinearCrossEntropy(torch.autograd.Function):
    """Σ weights · cross_entropy(hidden @ matrixᵀ + bias, targets), with its gradients computed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        matrix: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        weights: Tensor,
        learn: bool,
        device_type: str | None = None,
    ) -> Tensor:
        rows = max(1, _CHUNK_BYTES[device_type or hidden.device.type] // (4 * matrix.shape[0]))
        needs = [learn and t is not None and t.requires_grad for t in (hidden, matrix, bias)]
        d_hidden = torch.empty_like(hidden) if needs[0] else None
        d_matrix = torch.zeros_like(matrix, dtype=torch.float32) if needs[1] else None
        d_bias = torch.zeros_like(matrix[:, 0], dtype=torch.float32) if needs[2] else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, hidden.shape[0], rows):
            part = slice(start, start + rows)
            h, target, weight = hidden[part], targets[part, None], weights[part]
            logits = F.linear(h, matrix, bias).float()
            chosen, highest = logits.gather(1, target), logits.amax(1, keepdim=True)
            powers = logits.sub_(highest).exp_()
            sums = powers.sum(1, keepdim=True)
            total += ((sums.log() + highest - chosen).squeeze(1) * weight).sum()
            if not any(needs):
                continue
            # weight · (softmax - one-hot of the target), in place: each pass over the logits counts on a CPU.
            d_logits = powers.mul_(weight[:, None] / sums).scatter_add_(1, target, -weight[:, None]).to(h.dtype)
            if d_hidden is not None:
                torch.mm(d_logits, matrix, out=d_hidden[part])
            if d_matrix is not None:
                d_matrix += d_logits.T @ h
            if d_bias is not None:
                d_bias += d_logits.sum(0, dtype=torch.float32)
        ctx.gradients = [g if g is None else g.to(hidden.dtype) for g in (d_hidden, d_matrix, d_bias)]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [g if g is None else g.mul_(scale) for g in ctx.gradients]
        ctx.gradients = None
        return (*scaled, None, None, None, None)


@torch.no_grad()
def _token_nll(
    hidden: Tensor, matrix: Tensor, bias: Tensor | None, targets: Tensor, device_type: str | None = None
) -> Tensor:
    """cross_entropy(hidden @ matrixᵀ + bias, targets) of each position, in float32 and without a gradient."""
    rows = max(1, _CHUNK_BYTES[device_type or hidden.device.type] // (4 * matrix.shape[0]))
    parts = zip(hidden.split(rows), targets.split(rows), strict=True)
    return torch.cat([F.cross_entropy(F.linear(h, matrix, bias).float(), t, reduction="none") for h, t in parts])


class _OutputLayer(nn.Module):
    """Applies a model's output layer and the loss in one.

    The linear layer belongs to the model, not to this module: it is kept out of `named_parameters` here, and ZeRO-3 is
    told to gather its weight around this module's forward and backward too.
    """

    def __init__(self, linear: nn.Linear, device_type: str | None) -> None:
        super().__init__()
        self._linear = (linear,)
        self._device_type = device_type

    @property
    def linear(self) -> nn.Linear:
        return self._linear[0]

    def forward(self, hidden: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
        """Σ weights · nll, or without weights each position's nll, which has no gradient."""
        if weights is None:
            return _token_nll(hidden, self.linear.weight, self.linear.bias, targets, self._device_type)
        total: Tensor = _LinearCrossEntropy.apply(
            hidden, self.linear.weight, self.linear.bias, targets, weights, torch.is_grad_enabled(), self._device_type
        )
        return total


class LanguageModelLoss(nn.Module):
    """Wraps a causal language model so that its forward pass gives Σ weights · nll of a micro-batch, in float32.

    `fused` says whether the output layer is taken apart from the model. That is right only when the model's logits are
    its output layer's, and nothing scales or bounds them afterwards: `logits_error` measures it.

    Args:
        model: from transformers, or a PEFT model around one.
        device_type: the device that it is made for; by default the one that it is on.
    """

    def __init__(self, model: nn.Module, device_type: str | None = None) -> None:
        super().__init__()
        self.model = model
        head = inner_model(model).get_output_embeddings()
        self.output = _OutputLayer(head, device_type) if type(head) is nn.Linear else None
        self.fused = self.output is not None

    def forward(self, batch: MicroBatch, *, logits_error: bool = False) -> Tensor:
        """The loss; or, with `logits_error`, the largest relative difference of the output layer's logits and the
        model's own."""
        if logits_error:
            return self._logits_error(batch)
        if self.output is not None and self.fused:
            total: Tensor = self.output(self.hidden(batch), batch.targets, batch.weights)
            return total
        return (self.token_nll(batch) * batch.weights).sum()

    def hidden(self, batch: MicroBatch) -> Tensor:
        """What goes into the output layer where something is predicted, [P, width]."""
        states: Tensor = inner_model(self.model).get_decoder()(**_inputs(batch)).last_hidden_state
        return states[0, batch.predicting]

    def token_nll(self, batch: MicroBatch) -> Tensor:
        """Each prediction's nll, [P] in float32, from the model's own logits."""
        return F.cross_entropy(self._logits(batch), batch.targets, reduction="none")

    def _logits(self, batch: MicroBatch) -> Tensor:
        logits: Tensor = self.model(**_inputs(batch), logits_to_keep=batch.predicting).logits
        return logits[0].float()

    def _logits_error(self, batch: MicroBatch) -> Tensor:
        assert self.output is not None
        hidden, logits = self.hidden(batch), self._logits(batch)
        error: Tensor = (logits - self.output.linear(hidden).float()).abs().max() / logits.abs().max()
        return error


def _inputs(batch: MicroBatch) -> dict[str, Any]:
    inputs: dict[str, Any] = {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "use_cache": False,
        "cu_seq_lens_q": batch.boundaries,
        "cu_seq_lens_k": batch.boundaries,
        "max_length_q": batch.longest,
        "max_length_k": batch.longest,
    }
    if batch.sequence is not None:
        inputs["sequence"] = batch.sequence
    return inputs
