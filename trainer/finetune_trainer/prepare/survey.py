"""One look at a file before its rows are: its fingerprint, and where it can be cut into pieces that are read apart.

Lines are counted on the way, so a row of any piece is named by its line in the whole file. Compressed files and CSV
(a quoted cell may hold line breaks) can only be read from their beginning: each is one piece.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import pyarrow as pa
import pyarrow.parquet as pq

from finetune_api.errors import DataError
from finetune_trainer.prepare.read import WHOLE, Piece
from finetune_trainer.prepare.rows import RowFormat
from finetune_trainer.prepare.sources import TREE, SourceFile, fingerprint
from finetune_trainer.prepare.tasks import file_format
from finetune_trainer.storage import explained


@dataclass(frozen=True)
class Survey:
    """What is known of a file: its fingerprint, its pieces in order, and the format of rows behind the first piece."""

    sha256: str
    pieces: list[Piece]
    format: RowFormat | None


def survey(file: SourceFile, piece_bytes: int, done: Callable[[int], None]) -> Survey:
    """Reads the file once, and its first rows again.

    Args:
        piece_bytes: bytes of the stored file in a piece, about; a piece has whole rows.
        done: is given the size of each block that was read.

    Raises:
        StorageError: it cannot be read, or is not of the size that was listed.
    """
    cuts = _Lines(piece_bytes)
    plain = file.kind == ".jsonl" and file.codec is None
    sha256 = fingerprint(file, done, cuts.block if plain else None)
    pieces = [WHOLE]
    if plain:
        pieces = cuts.pieces()
    elif file.kind == TREE:
        pieces = list(_cut([member.size for member in file.members], None, piece_bytes))
    elif file.kind == ".parquet":
        pieces = _row_groups(file, piece_bytes)
    return Survey(sha256, pieces, _format(file) if len(pieces) > 1 else None)


class _Lines:
    """Finds cuts between lines while a file goes by."""

    def __init__(self, piece_bytes: int) -> None:
        self._piece_bytes = piece_bytes
        self._cuts = [(0, 1)]  # first byte and line of each piece
        self._read = 0
        self._line = 1

    def block(self, block: bytes) -> None:
        """Takes the next block of the file."""
        begin = 0  # the newlines before it are counted
        while (wanted := self._cuts[-1][0] + self._piece_bytes - self._read) < len(block):
            found = block.find(b"\n", max(wanted - 1, begin))
            if found < 0:
                break
            self._line += block.count(b"\n", begin, found + 1)
            begin = found + 1
            self._cuts.append((self._read + begin, self._line))
        self._line += block.count(b"\n", begin)
        self._read += len(block)

    def pieces(self) -> list[Piece]:
        """The file's pieces."""
        cuts = [cut for cut in self._cuts if cut[0] < self._read]
        return [Piece(begin, end, line) for (begin, line), (end, _) in pairwise([*cuts, (self._read, 0)])]


def _row_groups(file: SourceFile, piece_bytes: int) -> list[Piece]:
    """Row groups in turn; a file that is no Parquet is one piece, whose reader will say so."""
    location = file.stored.location
    try:
        with explained(file.uri), location.fs.open_input_file(location.path) as opened:
            metadata = pq.ParquetFile(opened).metadata
    except pa.ArrowInvalid:
        return [WHOLE]
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    return list(_cut([group.total_byte_size for group in groups], [group.num_rows for group in groups], piece_bytes))


def _cut(sizes: list[int], rows: list[int] | None, piece_bytes: int) -> Iterator[Piece]:
    """Items in turn until they have `piece_bytes`; `rows` in each item, where that is not one."""
    start, size, first, row = 0, 0, 1, 1
    for index, item in enumerate(sizes):
        size += item
        row += 1 if rows is None else rows[index]
        if size >= piece_bytes or index == len(sizes) - 1:
            yield Piece(start, index + 1, first)
            start, size, first = index + 1, 0, row


def _format(file: SourceFile) -> RowFormat | None:
    """The file's format; None when it is damaged before its rows show one, which its reader will say."""
    try:
        return file_format(file)
    except DataError:
        return None
