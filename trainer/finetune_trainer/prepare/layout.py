"""Where each document of a split comes to lie. Decided globally, before a shard is written.

A pure function of the documents' sizes and of which belong to one repository, so every way to write the shards writes
the same ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from finetune_trainer.prepare.collect import Collection
from finetune_trainer.prepare.pack import pack
from finetune_trainer.prepare.repositories import join_pairs, join_repositories
from finetune_trainer.sampling import permutation

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Layout:
    """A split's documents in the order in which they are written.

    documents: int64 [M], their numbers in the collection; groups: int64 [D], how many of them in turn make one document
    of the shards (1 but for code); sequences: int64 [S], how many of those in turn make one sequence.
    """

    documents: Numbers
    groups: Numbers
    sequences: Numbers

    def stops(self) -> tuple[Numbers, Numbers]:
        """Of each sequence, one past its last group and one past its last document."""
        groups = np.cumsum(self.sequences)
        return groups, np.append(0, np.cumsum(self.groups))[groups]


def lay_out(collection: Collection, documents: Numbers, capacity: int, packing: bool) -> Layout:
    """The layout of a split.

    Args:
        documents: numbers of the split's documents; one that is seen twice stands there twice.
        capacity: tokens of a sequence.
        packing: whether several documents go into one.
    """
    pairs = collection.report.pairs
    documents, counts = join_pairs(documents) if pairs else join_repositories(collection, documents, capacity)
    starts = np.cumsum(counts) - counts
    if packing:
        # Documents of one length fill a sequence in the order they come: without this they would all be of one source,
        # and what a step learns from would not be the mixture.
        order = permutation(0, 0, len(counts))
        starts, counts = starts[order], counts[order]
    ends = starts + counts
    totals = np.cumsum(np.append(0, collection.sizes[documents]), dtype=np.int64)
    sizes = (totals[ends] - totals[starts]).astype(np.int32)
    sequence = pack(sizes, capacity) if packing else np.arange(len(sizes))
    order = np.argsort(sequence, kind="stable")
    counts, starts = counts[order], starts[order]
    places = np.arange(int(counts.sum())) + np.repeat(starts - (np.cumsum(counts) - counts), counts)
    sequences = np.bincount(sequence) if len(sequence) else np.zeros(0, np.int64)
    if pairs:  # they are packed as one, and are two documents all the same
        return Layout(documents[places], np.ones(len(places), np.int64), 2 * sequences)
    return Layout(documents[places], counts, sequences)
