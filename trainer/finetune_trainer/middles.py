"""Held-out middles of code: finds them in the evaluation shards, and compares what models write there with what stood.

A middle is asked for with everything that stands before it in its document, the files before its own included.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from finetune_api.result import MiddlesResult
from finetune_trainer.dataset import PackedDataset
from finetune_trainer.prepare.fim import find_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_MIDDLES: Final = 64
SLACK_TOKENS: Final = 8  # more than stood there, so that a model that does not end where it should shows
_SPREAD: Final = 16  # documents that are looked at for each middle that is asked for


@dataclass(frozen=True)
class Middle:
    """Tokens up to the one that asks for the middle, and the text that stood there."""

    prompt: tuple[int, ...]
    text: str
    tokens: int


def held_out_middles(prepared: Path, tokenizer: PreTrainedTokenizerBase, longest: int) -> list[Middle]:
    """Up to MOST_MIDDLES middles of 1 to `longest` tokens from the evaluation split, spread over it.

    Only those in the order prefix, suffix, middle: in the other one the middle's begin cannot be seen in the tokens.
    """
    names = find_tokens({token.content for token in tokenizer.added_tokens_decoder.values()})
    if names is None:
        return []
    data = PackedDataset(prepared, "evaluation")
    prefix, suffix, middle = tokenizer.convert_tokens_to_ids([names.prefix, names.suffix, names.middle])
    found: list[Middle] = []
    step = max(1, len(data) // (MOST_MIDDLES * _SPREAD))
    for index in range(0, len(data), step):
        sequence = data[index]
        start = 0
        for length in sequence.documents.tolist():
            ids = sequence.input_ids[start : start + length].tolist()
            start += length
            for at, end in _asked(ids, prefix, suffix, middle, tokenizer.eos_token_id):
                if 0 < end - at <= longest:
                    text = tokenizer.decode(ids[at:end])
                    found.append(Middle(tuple(ids[:at]), text, end - at))
    keep = max(1, math.ceil(len(found) / MOST_MIDDLES))
    return found[::keep]


def measure_middles(middles: Sequence[Middle], base: Sequence[str], tuned: Sequence[str]) -> MiddlesResult:
    """Exact match and edit similarity of both models' texts."""
    count = len(middles)

    def exact(texts: Sequence[str]) -> float:
        return sum(text.strip() == m.text.strip() for m, text in zip(middles, texts, strict=True)) / count

    def similar(texts: Sequence[str]) -> float:
        return sum(similarity(m.text.strip(), text.strip()) for m, text in zip(middles, texts, strict=True)) / count

    return MiddlesResult(
        middles=count,
        exact_base=exact(base),
        exact_tuned=exact(tuned),
        similarity_base=similar(base),
        similarity_tuned=similar(tuned),
    )


def similarity(left: str, right: str) -> float:
    """1 - d / n with the Levenshtein distance d and the length n of the longer text; 1 for two empty ones."""
    if left == right:
        return 1.0
    row = list(range(len(right) + 1))
    for i, a in enumerate(left, 1):
        above = row
        row = [i]
        for j, b in enumerate(right, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (a != b)))
    return 1 - row[-1] / max(len(left), len(right))


def _asked(ids: Sequence[int], prefix: int, suffix: int, middle: int, end: int) -> list[tuple[int, int]]:
    """Where middles begin and end, in tokens: behind prefix, a text, suffix, another text and middle, until `end`."""
    found = []
    before = None  # the last token that was one of the three
    psm = False
    for place, token in enumerate(ids):
        if token == prefix:
            psm, before = True, place
        elif token == suffix:
            psm = psm and before != place - 1  # next to each other in the other order
        elif token == middle and psm:
            stop = next((i for i in range(place + 1, len(ids)) if ids[i] == end), len(ids))
            if stop < len(ids):
                found.append((place + 1, stop))
            psm = False
    return found
