"""Which tokens a tokenizer has for code, and what a file's name and head tell."""

from __future__ import annotations

import pytest

from finetune_api.job import Fim
from finetune_trainer.prepare.code import language_of, license_of
from finetune_trainer.prepare.fim import FimTokens, find_tokens, transform


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("<|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|>", "<|fim_prefix|> <|fim_suffix|> <|fim_middle|>"),
        ("<fim_prefix> <fim_middle> <fim_suffix>", "<fim_prefix> <fim_suffix> <fim_middle>"),
        ("<｜fim▁hole｜> <｜fim▁begin｜> <｜fim▁end｜>", "<｜fim▁begin｜> <｜fim▁hole｜> <｜fim▁end｜>"),
        ("▁<PRE> ▁<MID> ▁<SUF> ▁<EOT>", "▁<PRE> ▁<SUF> ▁<MID>"),
        ("<fim_prefix> <fim_suffix>", None),
        ("<|im_start|>", None),
    ],
)  # fmt: skip
def test_the_tokens_of_known_model_families_are_found(names: str, expected: str | None) -> None:
    found = find_tokens(set(names.split()))
    assert found == (FimTokens(*expected.split()) if expected else None)


def test_every_place_between_characters_is_cut_about_as_often() -> None:
    tokens = FimTokens("P", "S", "M")
    cuts = [0] * 5
    for row in range(2000):
        prefix, middle = (transform("abcd", tokens, Fim(rate=1, spm_rate=0), 7, row, 0)[i][0] for i in (1, 5))
        cuts[len(prefix)] += 1
        cuts[len(prefix) + len(middle)] += 1
    assert all(abs(count - 800) < 120 for count in cuts), cuts


@pytest.mark.parametrize(
    ("path", "language"),
    [
        ("a/b.py", "python"), ("A.PY", "python"), ("x.test.ts", "typescript"), ("Makefile", "makefile"),
        ("go.mod", None), ("py", None), ("logo.png", None), ("deep/Dockerfile", "dockerfile"),
    ],
)  # fmt: skip
def test_a_language_is_told_by_the_files_name(path: str, language: str | None) -> None:
    assert language_of(path) == language


@pytest.mark.parametrize(
    ("head", "named"),
    [
        ("# SPDX-License-Identifier: MIT\n", "MIT"),
        ("/* SPDX-License-Identifier: GPL-2.0-only OR MIT */", "GPL-2.0-only OR MIT"),
        ("// Licensed under the MIT licence", None),
        ("x" * 5000 + "SPDX-License-Identifier: MIT", None),
    ],
)
def test_a_license_is_what_the_files_head_names(head: str, named: str | None) -> None:
    assert license_of(head) == named
