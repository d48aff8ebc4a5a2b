"""Fill in the middle: a piece of code becomes prefix, suffix and middle, cut at characters (arXiv 2207.14255).

Two orders, of which the second is the paper's variant that shares its beginning with the first (its appendix D):

    PSM   <prefix> PREFIX <suffix> SUFFIX <middle> MIDDLE
    SPM   <prefix> <suffix> SUFFIX <middle> PREFIX MIDDLE

Pure: what is drawn follows from the seed, the row's hash and the number of its piece.
"""

from __future__ import annotations

import hashlib
from collections.abc import Container
from dataclasses import dataclass
from typing import Final

from finetune_api.job import Fim

# What model families call their tokens, in the order prefix, suffix, middle.
_NAMES: Final = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen2.5-Coder, CodeGemma
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder, Granite Code
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek-Coder
    ("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>"),  # GLM
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),  # Code Llama
    ("<PRE>", "<SUF>", "<MID>"),
)
_FILE_SEPARATORS: Final = ("<|file_sep|>", "<file_sep>", "<|file_separator|>")


@dataclass(frozen=True)
class FimTokens:
    """The tokenizer's own tokens for the three parts."""

    prefix: str
    suffix: str
    middle: str


def find_tokens(vocabulary: Container[str]) -> FimTokens | None:
    """The tokens for fill in the middle among a tokenizer's entries, if it has all three."""
    return next((FimTokens(*names) for names in _NAMES if all(name in vocabulary for name in names)), None)


def find_file_separator(vocabulary: Container[str]) -> str | None:
    """The token that stands before a file's path where several files make one document."""
    return next((name for name in _FILE_SEPARATORS if name in vocabulary), None)


def transform(text: str, tokens: FimTokens, fim: Fim, seed: int, row: int, piece: int) -> list[tuple[str, bool]]:
    """The text with its middle behind it, or as it is, in the shares that `fim` asks for.

    Returns the written text in parts, each with whether it is learned: tokens are the asking editor's to give.

    Args:
        row: hash of the row, in 64 bits.
        piece: number of the text among the row's pieces, from 0.
    """
    turned, order, first, second = _draws(seed, row, piece)
    if turned >= fim.rate:
        return [(text, True)]
    # The len + 1 places between characters are equally likely, for both cuts.
    start, end = sorted((int(first * (len(text) + 1)), int(second * (len(text) + 1))))
    prefix, middle, suffix = text[:start], text[start:end], text[end:]
    if order < fim.spm_rate:
        return [
            (tokens.prefix + tokens.suffix, False),
            (suffix, True),
            (tokens.middle, False),
            (prefix + middle, True),
        ]
    return [
        (tokens.prefix, False),
        (prefix, True),
        (tokens.suffix, False),
        (suffix, True),
        (tokens.middle, False),
        (middle, True),
    ]


def _draws(seed: int, row: int, piece: int) -> tuple[float, float, float, float]:
    """Four numbers in [0, 1)."""
    digest = hashlib.blake2b(f"fim {seed} {row} {piece}".encode(), digest_size=32).digest()
    a, b, c, d = (int.from_bytes(digest[i : i + 8], "little") >> 11 for i in range(0, 32, 8))
    return a / 2**53, b / 2**53, c / 2**53, d / 2**53
