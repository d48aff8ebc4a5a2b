"""What machines hand to each other: named blobs below a folder that all of them see, a bucket's or a shared disk's.

A blob is whole or not there, so a task that is done twice, because its machine was lost, harms nothing.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from contextlib import suppress

import numpy as np
import numpy.typing as npt
import pyarrow.fs as pafs

from finetune_trainer.storage import Location, explained


class Exchange:
    """Blobs below one folder.

    Raises:
        StorageError: from every method, what the disk or bucket says.
    """

    def __init__(self, folder: Location) -> None:
        self._folder = folder
        self._on_disk = isinstance(folder.fs, pafs.LocalFileSystem)

    def write(self, name: str, parts: Iterable[npt.NDArray[np.generic] | memoryview]) -> None:
        """Writes the parts one behind the other."""
        fs, path = self._folder.fs, self._path(name)
        partial = f"{path}.{uuid.uuid4().hex}" if self._on_disk else path  # a bucket shows an object when it is whole
        with explained(self._folder.uri):
            with fs.open_output_stream(partial) as stream:
                for part in parts:
                    stream.write(np.ascontiguousarray(part).data if isinstance(part, np.ndarray) else part)
            if self._on_disk:
                fs.move(partial, path)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> memoryview:
        """Bytes [start, stop) of a blob."""
        with explained(self._folder.uri), self._folder.fs.open_input_file(self._path(name)) as file:
            return memoryview(file.read_at((file.size() if stop is None else stop) - start, start))

    def delete(self, name: str) -> None:
        """Removes a blob, if it is there."""
        with explained(self._folder.uri), suppress(FileNotFoundError):
            self._folder.fs.delete_file(self._path(name))

    def _path(self, name: str) -> str:
        return f"{self._folder.path}/{name}"
