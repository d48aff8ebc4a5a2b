"""What machines hand to each other: named blobs below a folder that all of them see, a bucket's or a shared disk's.

A blob is whole or not there, so a task that is done twice, because its machine was lost, harms nothing.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.fs as pafs

from finetune_trainer.patience import persistently
from finetune_trainer.storage import Location, explained, upload


class Exchange:
    """Blobs below one folder.

    Raises:
        StorageError: from every method, what the disk or bucket says.
    """

    def __init__(self, folder: Location) -> None:
        self._folder = folder
        self._on_disk = isinstance(folder.fs, pafs.LocalFileSystem)

    def write(self, name: str, parts: Sequence[npt.NDArray[np.generic] | memoryview]) -> None:
        """Writes the parts one behind the other."""
        partial = f"{self._path(name)}.{uuid.uuid4().hex}" if self._on_disk else self._path(name)

        def put() -> None:
            with self._folder.fs.open_output_stream(partial) as stream:
                for part in parts:
                    stream.write(np.ascontiguousarray(part).data if isinstance(part, np.ndarray) else part)

        with explained(self._folder.uri):
            persistently(put)  # a bucket shows an object when it is whole
            if self._on_disk:
                self._folder.fs.move(partial, self._path(name))

    def put(self, file: Path) -> None:
        """Makes a file of this machine a blob of its name."""
        if self._on_disk:
            with explained(self._folder.uri):
                partial = f"{self._path(file.name)}.{uuid.uuid4().hex}"
                shutil.copyfile(file, partial)
                self._folder.fs.move(partial, self._path(file.name))
        else:
            upload(file, self._folder.inside(file.name))

    def read(self, name: str, start: int = 0, stop: int | None = None) -> memoryview:
        """Bytes [start, stop) of a blob."""

        def get() -> memoryview:
            with self._folder.fs.open_input_file(self._path(name)) as file:
                end = file.size() if stop is None else stop
                data = memoryview(file.read_at(end - start, start))
            if len(data) != end - start:
                raise OSError(f"{len(data):,} of {end - start:,} bytes came")
            return data

        with explained(self._folder.uri):
            return persistently(get)

    def delete(self, name: str) -> None:
        """Removes a blob, if it is there."""
        with explained(self._folder.uri), suppress(FileNotFoundError):
            self._folder.fs.delete_file(self._path(name))

    def _path(self, name: str) -> str:
        return f"{self._folder.path}/{name}"
