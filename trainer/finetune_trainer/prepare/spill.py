"""Arrays that grow on disk: appended in order, read back by range, never mapped, so they take no resident memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Generic, TypeVar

import numpy as np
import numpy.typing as npt

Item = TypeVar("Item", bound=np.generic)
_READ_ITEMS: Final = 1 << 20


class Spill(Generic[Item]):
    """An array of items of `width` numbers each, in one file. Write first, then read."""

    def __init__(self, path: Path, dtype: type[Item], width: int = 1) -> None:
        self._dtype = np.dtype(dtype)
        self._width = width
        self._file = path.open("w+b")
        self._items = 0

    def __len__(self) -> int:
        return self._items

    def append(self, values: npt.NDArray[Item]) -> None:
        """Adds items; values is [n] or, with width above 1, [n, width]."""
        self._file.write(np.ascontiguousarray(values, dtype=self._dtype).data)
        self._items += len(values)

    def read(self, start: int, stop: int) -> npt.NDArray[Item]:
        """Items [start, stop), read-only, in the shape they were added."""
        self._file.flush()
        size = self._dtype.itemsize * self._width
        data = os.pread(self._file.fileno(), (stop - start) * size, start * size)
        values: npt.NDArray[Item] = np.frombuffer(data, dtype=self._dtype)
        return values.reshape(-1, self._width) if self._width > 1 else values

    def blocks(self) -> Iterator[tuple[int, npt.NDArray[Item]]]:
        """All items in order, in blocks, each with the number of its first item."""
        step = max(_READ_ITEMS // self._width, 1)
        for start in range(0, self._items, step):
            yield start, self.read(start, min(start + step, self._items))

    def close(self) -> None:
        self._file.close()
