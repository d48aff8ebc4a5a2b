"""The loss of a preference: how much likelier a model makes the better answer than its reference does.

    sigmoid            -log σ(β·Δ)             DPO, https://arxiv.org/abs/2305.18290, equation 7
    ipo                (Δ̄ - 1 / 2β)²           https://arxiv.org/abs/2310.12036, equation 17
    length-normalised  -log σ(β·Δ̄)             DPO over means

Δ is log π(chosen)/ref(chosen) - log π(rejected)/ref(rejected), each logarithm summed over the answer's tokens; in Δ̄ it
is their mean, as in the experiments of IPO's authors (TRL's `ipo` and `sigmoid_norm` are the same).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune_api.job import Dpo
from finetune_trainer.batches import MicroBatch
from finetune_trainer.loss import LanguageModelLoss
from finetune_trainer.weights import inner_model

# What a forward pass sums up beside the loss, over pairs; a reward is β·log(π / ref).
FIGURES: Final = (
    "rewardMargin",  # the chosen answer's reward less the rejected one's
    "rewardAccuracy",  # pairs in which it is above 0
    "likelihoodAccuracy",  # pairs whose chosen answer has the larger mean log-probability of a token
)


def pair_losses(dpo: Dpo, ratios: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Each pair's loss [N], and the derivative of their sum with respect to `ratios` [2N].

    Args:
        ratios: log(π / ref) of each answer, [2N]: chosen, rejected, chosen, rejected …
        tokens: each answer's tokens, [2N].
    """
    scale = torch.ones_like(tokens) if dpo.loss == "sigmoid" else 1 / tokens
    delta = (ratios * scale).view(-1, 2) @ ratios.new_tensor([1.0, -1.0])
    if dpo.loss == "ipo":
        distance = delta - 1 / (2 * dpo.beta)
        losses, slopes = distance**2, 2 * distance
    else:
        losses, slopes = -F.logsigmoid(dpo.beta * delta), -dpo.beta * torch.sigmoid(-dpo.beta * delta)
    return losses, torch.stack([slopes, -slopes], dim=1).flatten() * scale


class PreferenceLoss(LanguageModelLoss):
    """Wraps a model so that its forward pass gives, summed over a micro-batch's pairs, the loss and `FIGURES`: [4].

    Only the loss has a gradient. Logits never exist whole: a first pass over the output layer gives the answers'
    log-probabilities, and with them each token's weight in the gradient, which the second pass takes.
    """

    def __init__(self, model: nn.Module, dpo: Dpo, device_type: str | None = None) -> None:
        super().__init__(model, device_type)
        self._dpo = dpo

    def forward(self, batch: MicroBatch, *, logits_error: bool = False, reference: bool = False) -> Tensor:
        """The sums; or, with `reference`, each document's log-probability in the model without adapters, [D]."""
        if logits_error:
            return super().forward(batch, logits_error=True)
        if reference:
            with _without_adapters(self.model):
                return self._sums(batch, -self._both(batch)[0])[: batch.lengths.size]
        pairs = batch.references.numel()
        nll, hidden = self._both(batch)
        tokens = self._sums(batch, torch.ones_like(nll))[:pairs].clamp(min=1)
        logps = self._sums(batch, -nll.detach())[:pairs]
        ratios = logps - batch.references
        losses, slopes = pair_losses(self._dpo, ratios, tokens)
        # Σ weights · nll has the gradient of the loss when each token's weight is minus the loss's derivative.
        every = F.pad(-slopes, (0, batch.boundaries.numel() - pairs))
        weights = every[batch.owners] * batch.weights
        surrogate = (nll * weights).sum() if hidden is None else self.output(hidden, batch.targets, weights)  # type: ignore[misc]
        margins = self._dpo.beta * (ratios[0::2] - ratios[1::2])
        means = logps / tokens
        figures = [margins.sum(), (margins > 0).sum(), (means[0::2] > means[1::2]).sum()]
        return torch.stack([surrogate + (losses.sum() - surrogate).detach(), *figures])

    def _both(self, batch: MicroBatch) -> tuple[Tensor, Tensor | None]:
        """Each prediction's nll, [P]; and, when that has no gradient, what it was computed from."""
        if self.output is None or not self.fused:
            return self.token_nll(batch), None
        hidden = self.hidden(batch)
        return self.output(hidden, batch.targets, None), hidden

    @staticmethod
    def _sums(batch: MicroBatch, values: Tensor) -> Tensor:
        """Weighted sum of each document's values, [D + 1]."""
        return values.new_zeros(batch.boundaries.numel()).index_add(0, batch.owners, values * batch.weights)


def _without_adapters(model: Any) -> AbstractContextManager[None]:
    return model.disable_adapter() if inner_model(model) is not model else nullcontext()
