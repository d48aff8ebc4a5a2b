"""What a run's loss is a mean over, and what is told beside it: tokens of texts, or pairs of answers. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from finetune_api.job import FinetuneJobSpec
from finetune_trainer.dataset import PackedDataset
from finetune_trainer.preference import FIGURES


class Objective:
    """The objective of a job, as the loop needs it: a forward pass gives sums of the loss and of `figures`."""

    def __init__(self, spec: FinetuneJobSpec) -> None:
        self.pairs = spec.method.objective == "dpo"
        self.figures = FIGURES if self.pairs else ()

    def counts(self, data: PackedDataset) -> npt.NDArray[np.float64]:
        """Of each sequence what the sums of its batch are divided by: its tokens' weights, or its pairs. [N]"""
        return data.documents / 2 if self.pairs else data.targets

    def means(self, sums: Sequence[float], count: float) -> dict[str, float]:
        """The loss and the figures of a batch, from their sums and its count."""
        named = zip(("loss", *self.figures), sums, strict=True)
        return {name: value / count for name, value in named} | ({"pairs": count} if self.pairs else {})
