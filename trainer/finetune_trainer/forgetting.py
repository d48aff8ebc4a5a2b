"""Perplexity on text about everything, before and after: what rises there was forgotten.

The passages are this project's own prose, under its licence: no model can have learned them by heart, and reading them
takes seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from finetune_api.result import ForgettingResult
from finetune_trainer.figures import perplexity
from finetune_trainer.speaking import Passage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FILE: Final = Path(__file__).with_name("general_text.txt")


def general_passages(tokenizer: PreTrainedTokenizerBase) -> list[Passage]:
    """The built-in passages, each by itself; its first token is not predicted."""
    found = []
    for text in _FILE.read_text(encoding="utf-8").strip().split("\n\n"):
        ids = tokenizer(text)["input_ids"]
        found.append(Passage(tuple(ids), (0.0, *[1.0] * (len(ids) - 1))))
    return found


def measure_forgetting(passages: Sequence[Passage], base: Sequence[float], tuned: Sequence[float]) -> ForgettingResult:
    """Perplexities from both models' Σ nll of each passage, in nats."""
    tokens = sum(len(passage.ids) - 1 for passage in passages)
    return ForgettingResult(
        passages=len(passages),
        tokens=tokens,
        perplexity_base=perplexity(sum(base) / tokens),
        perplexity_tuned=perplexity(sum(tuned) / tokens),
    )
