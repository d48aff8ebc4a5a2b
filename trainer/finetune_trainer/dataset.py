"""Reads prepared shards: packed sequences by number, memory-mapped, so a split of any size costs no memory to open."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from finetune_api.errors import StorageError
from finetune_trainer.manifest import Split, read_manifest


@dataclass(frozen=True)
class PackedSequence:
    """One packed sequence of T tokens and D documents. Arrays may be read-only views of the file.

    input_ids: int32 [T]; weights: float32 [T], the loss weight of predicting this token from those before it;
    documents: int32 [D], the documents' lengths, which add up to T; references: float32 [D], the log-probability of
    each document's answer in the reference model, for preferences, else [0].
    """

    input_ids: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]
    documents: npt.NDArray[np.int32]
    references: npt.NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))


class PackedDataset:
    """The sequences of one split of a prepared folder, in the order they were written.

    targets: float64 [N], sum of weights of each sequence; lengths: int64 [N], tokens; documents: int64 [N], counts.
    references: float32, one for each document of all sequences in turn, or empty; who computes them sets them.

    Raises:
        StorageError: nothing is prepared in the folder, or a shard is missing or of another size than when written.
    """

    def __init__(self, folder: Path, split: Split) -> None:
        self._batches: list[pa.RecordBatch] = []
        for shard in read_manifest(folder).split(split).shards:
            path = folder / shard.file
            if not path.is_file() or path.stat().st_size != shard.bytes:
                raise StorageError(
                    "the shard is missing or was changed since it was written",
                    where=str(path),
                    hint="delete the prepared folder and prepare again",
                )
            reader = pa.ipc.open_file(pa.memory_map(str(path)))
            self._batches += [reader.get_batch(i) for i in range(reader.num_record_batches)]
        self._starts = np.cumsum([0, *(batch.num_rows for batch in self._batches)])
        self.targets = self._column("target").astype(np.float64)
        self.lengths = self._list_lengths("input_ids")
        self.documents = self._list_lengths("documents")
        self.document_starts = np.cumsum(self.documents) - self.documents
        self.references = np.zeros(0, np.float32)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> PackedSequence:
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        batch, row = self._batches[number], index - int(self._starts[number])

        def values(name: str) -> npt.NDArray[np.generic]:
            return _numpy(batch.column(name)[row].values)

        return PackedSequence(
            input_ids=values("input_ids").astype(np.int32, copy=False),
            weights=values("weights").astype(np.float32),
            documents=values("documents").astype(np.int32, copy=False),
            references=self.references[self.document_starts[index] :][: self.documents[index]],
        )

    def _column(self, name: str) -> npt.NDArray[np.float32]:
        parts = [_numpy(batch.column(name)) for batch in self._batches]
        return np.concatenate(parts) if parts else np.zeros(0, np.float32)

    def _list_lengths(self, name: str) -> npt.NDArray[np.int64]:
        parts = [np.diff(_numpy(batch.column(name).offsets)) for batch in self._batches]
        return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)


def _numpy(array: pa.Array) -> npt.NDArray[Any]:
    """A view of the values. (pyarrow's own conversion imports pandas: 38 MiB in each process.)"""
    return np.from_dlpack(array)
