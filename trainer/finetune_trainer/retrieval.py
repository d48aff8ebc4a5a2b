"""Held-out questions with their passages: finds them in the evaluation shards, and compares answers with and without.

Only questions whose passages hold the answer count: those whose right answer cites one.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from finetune_api.result import RetrievalResult, RetrievalScore
from finetune_trainer.dataset import PackedDataset
from finetune_trainer.prepare.rag import BEFORE_QUESTION, INSTRUCTION

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_QUESTIONS: Final = 32
_SPREAD: Final = 16  # sequences that are looked at for each question that is asked
_CITED: Final = re.compile(r"\[(\d+)\]")


@dataclass(frozen=True)
class HeldOut:
    """A question: the tokens that ask it with its passages, its own words, and the right answer."""

    prompt: tuple[int, ...]
    question: str
    answer: str
    tokens: int


def held_out_questions(prepared: Path, tokenizer: PreTrainedTokenizerBase, longest: int) -> list[HeldOut]:
    """Up to MOST_QUESTIONS questions with answers of at most `longest` tokens, spread over the evaluation split."""
    if tokenizer.chat_template is None:
        return []
    marker = "QUESTION"
    asked: str = tokenizer.apply_chat_template(
        [{"role": "user", "content": marker}], tokenize=False, add_generation_prompt=True
    )
    behind = asked.rpartition(marker)[2]
    data = PackedDataset(prepared, "evaluation")
    found = []
    for index in range(0, len(data), max(1, len(data) // (MOST_QUESTIONS * _SPREAD))):
        sequence = data[index]
        start = 0
        for length in sequence.documents.tolist():
            ids = sequence.input_ids[start : start + length]
            learned = np.flatnonzero(sequence.weights[start : start + length])
            start += length
            if not len(learned):
                continue
            first, last = int(learned[0]), int(learned[-1])
            before = tokenizer.decode(ids[:first].tolist())
            answer = tokenizer.decode(ids[first : last + 1].tolist(), skip_special_tokens=True).strip()
            question = before.removesuffix(behind).rpartition(BEFORE_QUESTION)[2]
            if INSTRUCTION in before and _CITED.search(answer) and last - first < longest:
                found.append(HeldOut(tuple(ids[:first].tolist()), question, answer, last + 1 - first))
    return found[:: max(1, math.ceil(len(found) / MOST_QUESTIONS))]


def measure_retrieval(
    questions: Sequence[HeldOut], given: tuple[Sequence[str], Sequence[str]], alone: tuple[Sequence[str], Sequence[str]]
) -> RetrievalResult:
    """Scores of the base model's and the tuned model's answers, `given` the passages and `alone`, without them."""

    def score(model: int) -> RetrievalScore:
        pairs = list(zip(questions, given[model], alone[model], strict=True))
        return RetrievalScore(
            with_passages=sum(word_f1(q.answer, text) for q, text, _ in pairs) / len(pairs),
            without_passages=sum(word_f1(q.answer, text) for q, _, text in pairs) / len(pairs),
            cited=sum(_cited(q.answer) == _cited(text) for q, text, _ in pairs) / len(pairs),
        )

    return RetrievalResult(questions=len(questions), base=score(0), tuned=score(1))


def word_f1(right: str, text: str) -> float:
    """F1 of the words of two texts without their citations, as in SQuAD (https://arxiv.org/abs/1606.05250)."""
    expected, found = (Counter(re.findall(r"\w+", _CITED.sub(" ", t).casefold())) for t in (right, text))
    common = (expected & found).total()
    return 2 * common / (expected.total() + found.total()) if common else 0.0


def _cited(text: str) -> set[str]:
    return set(_CITED.findall(text))
