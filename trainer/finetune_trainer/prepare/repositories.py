"""Puts documents side by side that belong together: the files of a repository, and the two answers of a pair.

Files go in the order of their paths, into documents as long as a sequence. The files of one document see those before
them, as in an editor with the repository open. No file is cut for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from finetune_trainer.prepare.collect import Collection

Numbers = npt.NDArray[np.int64]


def join_repositories(collection: Collection, documents: Numbers, capacity: int) -> tuple[Numbers, Numbers]:
    """Gathers the documents of each repository.

    Args:
        documents: numbers of a split's documents, those that are seen several times side by side.
        capacity: most tokens that go together.

    Returns:
        The same numbers in another order, and how many of them in turn make one document: 1 for all but code.
    """
    ones = np.ones(len(documents), dtype=np.int64)
    if not collection.has_repositories:
        return documents, ones
    rows = collection.rows[documents]
    repositories = collection.repositories.read(0, len(collection.repositories))[rows]
    alone = repositories == 0
    starts = np.flatnonzero(np.append(True, documents[1:] != documents[:-1]))
    time = np.arange(len(documents)) - np.repeat(starts, np.diff(np.append(starts, len(documents))))
    members = np.flatnonzero(~alone)
    # In the order in which they first come: their hashes depend on where the files lie, the shards must not.
    _, first, which = np.unique(repositories[members], return_index=True, return_inverse=True)
    members = members[np.lexsort((time[members], first[which]))]
    changes = np.flatnonzero(np.diff(repositories[members]) | (np.diff(time[members]) != 0)) + 1
    found, counts = [documents[alone]], [ones[alone]]
    for group in np.split(members, changes):
        ordered = sorted(documents[group].tolist(), key=lambda document: (collection.path_of(document), document))
        found.append(np.array(ordered, dtype=np.int64))
        counts.append(_fill(collection.sizes[found[-1]].tolist(), capacity))
    return np.concatenate(found), np.concatenate(counts)


def join_pairs(documents: Numbers) -> tuple[Numbers, Numbers]:
    """The same for pairs, of which a split has the even number and the odd one behind it: counts are 2."""
    chosen = documents[documents % 2 == 0]
    return np.stack([chosen, chosen + 1], axis=1).ravel(), np.full(len(chosen), 2)


def _fill(sizes: list[int], capacity: int) -> Numbers:
    """How many of these in turn fit together."""
    counts: list[int] = []
    room = 0
    for size in sizes:
        if size > room or not counts:
            counts.append(0)
            room = capacity
        counts[-1] += 1
        room -= size
    return np.array(counts, dtype=np.int64)
