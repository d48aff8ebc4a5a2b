"""Writes packed sequences as Arrow IPC files, in the format that docs/design/run-folder.md fixes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from finetune_trainer.manifest import ShardFacts, Split, SplitFacts

SCHEMA: Final = pa.schema(
    [
        pa.field("input_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("weights", pa.list_(pa.float16()), nullable=False),
        pa.field("documents", pa.list_(pa.int32()), nullable=False),
        pa.field("target", pa.float32(), nullable=False),
    ]
)
BATCH_TOKENS: Final = 1 << 20  # one record batch: about 6 MiB in memory
SHARD_TOKENS: Final = 1 << 25  # one file: about 200 MiB


class ShardWriter:
    """Writes one split's sequences in the order they are added; `close` gives the totals.

    Sequences are buffered up to BATCH_TOKENS, so memory does not grow with their number.
    """

    def __init__(self, folder: Path, split: Split, first: int = 0) -> None:
        self._folder = folder
        self._split = split
        self._first = first  # number of the first shard
        self._rows: list[tuple[npt.NDArray[np.int32], npt.NDArray[np.float16], npt.NDArray[np.int32]]] = []
        self._buffered = 0
        self._file: pa.RecordBatchFileWriter | None = None
        self._path = folder
        self._file_tokens = 0
        self._file_sequences = 0
        self._shards: list[ShardFacts] = []
        self._documents = 0
        self._tokens = 0
        self.targets: list[float] = []  # sum of the weights of each record batch

    def add(
        self,
        input_ids: npt.NDArray[np.int32],
        weights: npt.NDArray[np.float16],
        documents: npt.NDArray[np.int32],
    ) -> None:
        """Adds one sequence: ids and weights of T tokens, and the lengths of its documents, which add up to T."""
        self._rows.append((input_ids, weights, documents))
        self._buffered += len(input_ids)
        if self._buffered >= BATCH_TOKENS:
            self._flush()

    def close(self) -> SplitFacts:
        """Writes what is buffered, closes the last file and returns the split's totals."""
        self._flush()
        self._end_file()
        return SplitFacts(
            sequences=sum(shard.sequences for shard in self._shards),
            documents=self._documents,
            tokens=self._tokens,
            target_tokens=added(self.targets),
            shards=self._shards,
        )

    def _flush(self) -> None:
        if not self._rows:
            return
        if self._file is None:
            self._path = self._folder / f"{self._split}-{self._first + len(self._shards):05d}.arrow"
            self._file = pa.ipc.new_file(str(self._path), SCHEMA)
        ids, weights, documents = zip(*self._rows, strict=True)
        targets = np.array([w.sum(dtype=np.float64) for w in weights])
        columns = [
            _list_array(ids, pa.int32()),
            _list_array(weights, pa.float16()),
            _list_array(documents, pa.int32()),
            pa.array(targets.astype(np.float32)),
        ]
        self._file.write_batch(pa.record_batch(columns, schema=SCHEMA))
        self._documents += sum(len(d) for d in documents)
        self._tokens += self._buffered
        self.targets.append(float(targets.sum()))
        self._file_tokens += self._buffered
        self._file_sequences += len(self._rows)
        self._rows, self._buffered = [], 0
        if self._file_tokens >= SHARD_TOKENS:
            self._end_file()

    def _end_file(self) -> None:
        if self._file is None:
            return
        self._file.close()
        with self._path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self._shards.append(
            ShardFacts(
                file=self._path.name,
                sha256=digest,
                bytes=self._path.stat().st_size,
                sequences=self._file_sequences,
            )
        )
        self._file, self._file_tokens, self._file_sequences = None, 0, 0


def added(numbers: Iterable[float]) -> float:
    """One number after the other: a sum that would be exact, such as the built-in one of newer Pythons, is another."""
    total = 0.0
    for number in numbers:
        total += number
    return total


def shard_stops(tokens: npt.NDArray[np.int64]) -> list[int]:
    """Where a ShardWriter that is given sequences of so many tokens ends each shard: one past its last sequence."""
    ends = np.cumsum(tokens)
    stops, batch, shard = list[int](), 0, 0
    while batch < len(tokens):
        before = int(ends[batch - 1]) if batch else 0
        batch = min(int(np.searchsorted(ends, before + BATCH_TOKENS)) + 1, len(tokens))
        if ends[batch - 1] - (int(ends[shard - 1]) if shard else 0) >= SHARD_TOKENS:
            stops.append(batch)
            shard = batch
    return stops if shard == len(tokens) else [*stops, len(tokens)]


def _list_array(parts: Sequence[npt.NDArray[np.generic]], kind: pa.DataType) -> pa.ListArray:
    offsets = np.zeros(len(parts) + 1, dtype=np.int32)
    np.cumsum([len(part) for part in parts], out=offsets[1:])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(parts), type=kind))
