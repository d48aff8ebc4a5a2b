"""Exact and near duplicates."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune_trainer.prepare import deduplicate
from finetune_trainer.prepare.deduplicate import (
    PERMUTATIONS,
    Duplicates,
    Pairs,
    SpilledSignatures,
    band_rows,
    find_duplicates,
    signatures,
)
from finetune_trainer.prepare.spill import Spill


def _text(seed: int, words: int = 200) -> str:
    draw = random.Random(seed)
    return " ".join(f"word{draw.randrange(5000)}" for _ in range(words))


def _changed(text: str, every: int) -> str:
    """Another word at every n-th place."""
    return " ".join(word + "x" if i % every == every - 1 else word for i, word in enumerate(text.split()))


def _find(folder: Path, texts: list[str], *, near: bool = True, threshold: float = 0.9) -> Duplicates:
    hashes = Spill(folder / "hashes", np.uint64)
    numbers = {text: np.uint64(i * 2**40 + 7) for i, text in enumerate(dict.fromkeys(texts))}
    hashes.append(np.array([numbers[text] for text in texts], dtype=np.uint64))
    minima = Spill(folder / "minima", np.uint32, PERMUTATIONS)
    minima.append(signatures(texts))
    found = find_duplicates(hashes, SpilledSignatures(minima, folder) if near else None, threshold)
    hashes.close()
    minima.close()
    return found


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(texts=st.lists(st.sampled_from([_text(seed) for seed in range(8)]), min_size=1, max_size=40))
def test_of_equal_rows_the_first_stays(tmp_path: Path, texts: list[str]) -> None:
    found = _find(tmp_path, texts, near=False)
    expected = [texts.index(text) if texts.index(text) < i else -1 for i, text in enumerate(texts)]
    assert found.original.tolist() == expected
    assert found.exact.tolist() == [first >= 0 for first in expected]


def test_a_row_with_a_few_words_changed_is_a_near_duplicate(tmp_path: Path) -> None:
    original = _text(0, 400)
    texts = [_text(1), original, _text(2), _changed(original, 200), _changed(original, 20)]
    found = _find(tmp_path, texts)
    assert found.original.tolist() == [-1, -1, -1, 1, -1]
    assert not found.exact.any()


def test_a_lower_threshold_finds_rows_that_are_less_alike(tmp_path: Path) -> None:
    original = _text(0, 400)
    assert _find(tmp_path, [original, _changed(original, 50)], threshold=0.5).original.tolist() == [-1, 0]


def test_a_row_that_resembles_only_a_dropped_row_stays(tmp_path: Path) -> None:
    words = _text(0, 1000).split()
    chain = [" ".join(words[start : start + 700]) for start in (0, 33, 66)]  # neighbours share 91 %, ends 83 %
    assert _find(tmp_path, chain).original.tolist() == [-1, 0, -1]


def test_short_rows_are_alike_only_when_equal_but_for_case_and_space(tmp_path: Path) -> None:
    assert _find(tmp_path, ["My name", "my  name", "Your name", "name my"]).original.tolist() == [-1, 0, -1, -1]


def test_partitions_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [_text(seed % 30) if seed % 3 else _changed(_text(seed % 30, 400), 200) for seed in range(100)]
    whole = _find(tmp_path, texts)
    monkeypatch.setattr(deduplicate, "_PARTITION", 7)
    monkeypatch.setattr(deduplicate, "COMPARE", 3)
    assert _find(tmp_path, texts).original.tolist() == whole.original.tolist()


class _Given:
    """Pairs in one block, all of them alike."""

    def __init__(self, pairs: list[tuple[int, int]]) -> None:
        self._pairs = np.array(pairs, dtype=np.int64)

    def pairs(self, *_: object) -> Iterator[Pairs]:
        yield self._pairs[:, 0], self._pairs[:, 1]

    def similarity(self, left: npt.NDArray[np.int64], right: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        return np.ones(len(left))


@pytest.mark.parametrize("pairs", [[(0, 3), (1, 3), (2, 3)], [(2, 3), (0, 3), (1, 3)]])
def test_a_row_repeats_the_first_of_those_that_it_resembles_in_whatever_order_they_come(
    tmp_path: Path, pairs: list[tuple[int, int]]
) -> None:
    hashes = Spill(tmp_path / "hashes", np.uint64)
    hashes.append(np.arange(4, dtype=np.uint64))
    assert find_duplicates(hashes, _Given(pairs), 0.9).original.tolist() == [-1, -1, -1, 0]
    hashes.close()


@given(st.floats(0.5, 1))
def test_bands_find_a_pair_at_the_threshold(threshold: float) -> None:
    size = band_rows(threshold)
    assert 1 - (1 - threshold**size) ** (PERMUTATIONS // size) >= 0.99


def test_the_estimate_is_near_the_true_similarity() -> None:
    original = _text(0, 2000)
    left, right = signatures([original, _changed(original, 40)])
    # Of 1996 runs of 5 words, 50 changed words spoil 250; the union has 1996 + 250.
    assert abs((left == right).mean() - (1996 - 250) / (1996 + 250)) < 0.1
