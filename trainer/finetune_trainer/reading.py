"""A file read from front to back; what breaks off is opened again where it was."""

from __future__ import annotations

from types import TracebackType

import pyarrow as pa

from finetune_trainer.patience import persistently
from finetune_trainer.storage import Location


class Reading:
    """A file that is being read.

    Attributes:
        position: of the next byte.
    """

    closed = False

    def __init__(self, location: Location, start: int = 0) -> None:
        self._location, self.position = location, start
        self._stream: pa.NativeFile | None = None

    def __enter__(self) -> Reading:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def read(self, size: int) -> bytes:
        """At most so many bytes; none at the end.

        Raises:
            OSError: the file cannot be read, and it does not pass.
        """
        data = persistently(lambda: self._read(size))
        self.position += len(data)
        return data

    def _read(self, size: int) -> bytes:
        try:
            self._stream = self._stream or self._open()
            data: bytes = self._stream.read(size)
        except OSError:
            self._close()
            raise
        return data

    def _open(self) -> pa.NativeFile:
        fs, path = self._location.fs, self._location.path
        if not self.position:
            return fs.open_input_stream(path, compression=None)
        opened = fs.open_input_file(path)
        opened.seek(self.position)
        return opened

    def _close(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()
