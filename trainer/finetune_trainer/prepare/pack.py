"""Puts documents into sequences with as little room left as possible: best-fit decreasing over all documents at once.

Pure. The longest documents go first, each into the fullest sequence that still has room for it
(https://arxiv.org/abs/2404.10830 uses it for language models: no document is cut, and almost no room is left).
"""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.int64]


def pack(lengths: npt.NDArray[np.int32], capacity: int) -> Numbers:
    """The sequence, 0 to S - 1, of each document, int64 [N]; no sequence holds more than `capacity` tokens.

    Documents of one length, and sequences with the same room, are alike: they are placed a group at a time, so the work
    is O(N) array operations and one search for each pair of groups, instead of a search for each document.

    Raises:
        ValueError: a document is longer than `capacity`.
    """
    if len(lengths) and int(lengths.max()) > capacity:
        raise ValueError(f"a document of {int(lengths.max())} tokens does not fit into {capacity}")
    sequence = np.zeros(len(lengths), dtype=np.int64)
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    sizes, begins = np.unique(-lengths[order].astype(np.int64), return_index=True)
    rooms = _Rooms(capacity)
    for size, documents in zip((-sizes).tolist(), np.split(order, begins[1:]) if len(order) else [], strict=True):
        while len(documents):
            taken = rooms.place(size, len(documents))
            sequence[documents[: len(taken)]] = taken
            documents = documents[len(taken) :]
    return sequence


class _Rooms:
    """Sequences by the room left in them."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._opened = 0
        self._by_room: dict[int, list[Numbers]] = {}
        self._rooms: list[int] = []  # keys of _by_room, ascending

    def place(self, size: int, count: int) -> Numbers:
        """Sequences for up to `count` documents of `size`, best fit first: one group of equal room."""
        found = bisect_left(self._rooms, size)
        if found < len(self._rooms):
            room = self._rooms.pop(found)
            sequences = np.concatenate(self._by_room.pop(room))
        else:
            room = self._capacity
            needed = -(-count // (room // size))
            sequences = np.arange(self._opened, self._opened + needed)
            self._opened += needed
        # Best fit goes on with the sequence it has just used, as long as that has room for one more.
        each = room // size
        full, rest = divmod(min(count, each * len(sequences)), each)
        self._put(room - each * size, sequences[:full])
        if rest:
            self._put(room - rest * size, sequences[full : full + 1])
        self._put(room, sequences[full + bool(rest) :])
        return np.concatenate([np.repeat(sequences[:full], each), np.repeat(sequences[full : full + 1], rest)])

    def _put(self, room: int, sequences: Numbers) -> None:
        if room == 0 or not len(sequences):
            return
        if room not in self._by_room:
            insort(self._rooms, room)
        self._by_room.setdefault(room, []).append(sequences)
