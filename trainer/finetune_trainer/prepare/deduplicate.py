"""Finds rows that repeat an earlier one, exactly (equal hash) or nearly (MinHash), without holding all rows in memory.

Near duplicates: a row's set of word 5-grams has a signature of 128 minima
(https://doi.org/10.1109/SEQUEN.1997.666900); the share of equal minima estimates the Jaccard similarity of two rows.
Signatures are cut into bands; rows that agree in a whole band are compared. Bands are sized so that a pair at the
threshold is found with 99 % probability.

Signatures lie on disk. In memory there are 8 bytes a row and one partition of the hashes at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt
from rensa import RMinHash

from finetune_trainer.prepare.spill import Spill

PERMUTATIONS: Final = 128
SHINGLE: Final = 5
_SEED: Final = 1
_PARTITION: Final = 4_000_000  # rows whose hashes are sorted at a time: about 200 MiB
COMPARE: Final = 65_536  # pairs whose signatures are read at a time: about 70 MiB

Hashes = npt.NDArray[np.uint64]


def band_rows(threshold: float) -> int:
    """Minima in one band: the most that still find a pair at `threshold` with 99 % probability.

    A pair of similarity s agrees in a band of r minima with probability s^r, so it is found in one of b bands with
    probability 1 - (1 - s^r)^b.
    """
    fits = [r for r in range(1, PERMUTATIONS + 1) if 1 - (1 - threshold**r) ** (PERMUTATIONS // r) >= 0.99]
    return max(fits)


def signatures(texts: Sequence[str]) -> npt.NDArray[np.uint32]:
    """MinHash signatures, uint32 [len(texts), PERMUTATIONS], of the word 5-grams of each text.

    Two texts shorter than that are alike only when they are equal but for white space and case.
    """
    words = [text.casefold().split() or [""] for text in texts]
    hashed = RMinHash.hash_token_sets(words)
    shingles = [_shingles(np.array(row, dtype=np.uint64)) for row in hashed]
    offsets = np.cumsum([0, *(len(row) for row in shingles)]).astype(np.uint64)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(np.concatenate(shingles), offsets, PERMUTATIONS, _SEED)
    return np.array(matrix.to_rows(), dtype=np.uint32).reshape(len(texts), PERMUTATIONS)


@dataclass(frozen=True)
class Duplicates:
    """Which of N rows repeat an earlier one.

    original: int64 [N], the number of the row it repeats, which is always one that is kept, or -1; exact: bool [N].
    """

    original: npt.NDArray[np.int64]
    exact: npt.NDArray[np.bool_]


Pairs = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]
Progress = Callable[[int, int], None]


class Signatures(Protocol):
    """All rows' signatures, wherever they lie."""

    def pairs(self, size: int, original: npt.NDArray[np.int64], progress: Progress) -> Iterator[Pairs]:
        """Pairs (first row, later row) of rows that agree in a whole band of `size` minima, in blocks.

        Of the rows that agree in a band the first is paired with each other one; exact duplicates, which have an
        `original`, are none of them. `progress` gets how much is done, and of how much.
        """

    def similarity(self, left: npt.NDArray[np.int64], right: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """Estimated Jaccard similarity of each pair that `pairs` gave: the share of equal minima."""


def find_duplicates(
    hashes: Spill[np.uint64],
    signatures: Signatures | None,
    threshold: float,
    progress: Progress = lambda done, total: None,
) -> Duplicates:
    """Duplicates among rows, given a content hash of each; near ones too when there are signatures.

    `progress` follows the search for near ones.
    """
    original = np.full(len(hashes), -1, dtype=np.int64)
    for first, later in _runs(hashes):
        original[later] = first
    exact = original >= 0
    if signatures is not None:
        _near(signatures, threshold, original, progress)
    return Duplicates(original, exact)


def _shingles(words: Hashes) -> Hashes:
    """One hash for every run of SHINGLE words; for fewer words, one for all of them."""
    size = min(SHINGLE, len(words))
    total = np.zeros(len(words) - size + 1, dtype=np.uint64)
    for offset in range(size):
        # A different odd factor for each place, so that the order of words counts.
        total = (total + words[offset : offset + len(total)]) * np.uint64(0x9E3779B97F4A7C15)
    return mixed(total)


def mixed(values: Hashes) -> Hashes:
    """The finaliser of SplitMix64 (https://doi.org/10.1145/2714064.2660195): every bit depends on every bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _runs(hashes: Spill[np.uint64]) -> Iterator[Pairs]:
    """Pairs (first row, later row) of rows with an equal hash, in partitions of the hashes' values."""
    partitions = -(-len(hashes) // _PARTITION)
    for partition in range(partitions):
        values, rows = [], []
        for start, block in hashes.blocks():
            chosen = np.flatnonzero(block % np.uint64(partitions) == partition)
            values.append(block[chosen])
            rows.append(chosen + start)
        yield equal_pairs(np.concatenate(values), np.concatenate(rows))


def equal_pairs(values: Hashes, rows: npt.NDArray[np.int64]) -> Pairs:
    """Pairs (first row, later row) within each group of equal values; `rows` ascends."""
    order = np.argsort(values, kind="stable")
    values, rows = values[order], rows[order]
    begin = np.ones(len(values), dtype=np.bool_)
    begin[1:] = values[1:] != values[:-1]
    begins = np.flatnonzero(begin)
    firsts = np.repeat(rows[begins], np.diff(np.append(begins, len(rows))))
    later = rows != firsts
    return firsts[later], rows[later]


def band_keys(minima: npt.NDArray[np.uint32], size: int) -> Hashes:
    """A hash of each whole band of `size` minima, uint64 [len(minima), bands]."""
    bands = minima.shape[1] // size
    columns = minima[:, : bands * size].reshape(len(minima), bands, size)
    hashed = np.zeros((len(minima), bands), dtype=np.uint64)
    for place in range(size):
        hashed = mixed(hashed ^ columns[:, :, place])
    return hashed


def _near(signatures: Signatures, threshold: float, original: npt.NDArray[np.int64], progress: Progress) -> None:
    """Adds near duplicates to `original`, in which exact ones already stand."""
    none = len(original)
    candidate = np.full(none, none, dtype=np.int64)
    for first, later in signatures.pairs(band_rows(threshold), original, progress):
        alike = signatures.similarity(first, later) >= threshold
        np.minimum.at(candidate, later[alike], first[alike])  # a row may stand in several pairs of a block
    # In order of rows, so that a row is measured against one that stays; likeness is not transitive.
    for row in np.flatnonzero(candidate < none):
        kept = original[candidate[row]]
        if kept < 0:
            original[row] = candidate[row]
        elif signatures.similarity(np.array([kept]), np.array([row]))[0] >= threshold:
            original[row] = kept


class SpilledSignatures:
    """Signatures on this machine's disk.

    Args:
        minima: the rows' signatures.
        folder: for keys, 16 bytes a row, where one partition does not hold all rows.
    """

    def __init__(self, minima: Spill[np.uint32], folder: Path) -> None:
        self._minima = minima
        self._folder = folder

    def pairs(self, size: int, original: npt.NDArray[np.int64], progress: Progress) -> Iterator[Pairs]:
        """See `Signatures`; done are bands."""
        bands = PERMUTATIONS // size
        for band in range(bands):
            progress(band, bands)
            for values, rows in self._partitions(slice(band * size, (band + 1) * size), original):
                first, later = equal_pairs(values, rows)
                for start in range(0, len(first), COMPARE):
                    yield first[start : start + COMPARE], later[start : start + COMPARE]

    def similarity(self, left: npt.NDArray[np.int64], right: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """See `Signatures`."""
        return share_of_equal(self._gather(left), self._gather(right))

    def _gather(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.uint32]:
        return np.array([self._minima.read(row, row + 1)[0] for row in rows.tolist()]).reshape(-1, PERMUTATIONS)

    def _partitions(
        self, band: slice, original: npt.NDArray[np.int64]
    ) -> Iterator[tuple[Hashes, npt.NDArray[np.int64]]]:
        """Keys of the band and their rows, by the keys' values. The signatures are read once for all of them."""
        partitions = -(-len(self._minima) // _PARTITION)
        keys = [Spill(self._folder / f"keys-{number}", np.uint64, 2) for number in range(partitions)]
        try:
            for start, block in self._minima.blocks():
                rows = np.flatnonzero(original[start : start + len(block)] < 0)
                hashed = band_keys(block[rows][:, band], band.stop - band.start)[:, 0]
                partition = (hashed % np.uint64(partitions)).astype(np.int64)
                ends = np.cumsum(np.bincount(partition, minlength=partitions))
                order = np.argsort(partition, kind="stable")  # by row in each partition
                found = np.stack([hashed, (rows + start).astype(np.uint64)], axis=1)[order]
                for spill, some in zip(keys, np.split(found, ends[:-1]), strict=True):
                    spill.append(some)
            for spill in keys:
                found = spill.read(0, len(spill))
                yield found[:, 0], found[:, 1].astype(np.int64)
        finally:
            for spill in keys:
                spill.close()


def share_of_equal(left: npt.NDArray[np.uint32], right: npt.NDArray[np.uint32]) -> npt.NDArray[np.float64]:
    """Of signatures [n, PERMUTATIONS], the share of equal minima of each pair."""
    equal: npt.NDArray[np.float64] = (left == right).mean(axis=1)
    return equal
