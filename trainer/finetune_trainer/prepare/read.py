"""Reads a file in chunks of about a megabyte that workers can take apart, each with the number of its first row.

Memory does not depend on the file: lines are bounded, compressed files are unpacked as they are read.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from finetune_api.errors import DataError
from finetune_trainer.prepare.code import language_of
from finetune_trainer.prepare.rows import COLUMNS
from finetune_trainer.prepare.sources import LARGEST_ROW, TREE, SourceFile
from finetune_trainer.reading import Reading
from finetune_trainer.storage import explained

CHUNK_BYTES: Final = 1 << 20
_BOMS: Final = {
    b"\xef\xbb\xbf": "UTF-8",
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}

Lines = bytes  # whole lines of JSON
Cells = list[tuple[int, dict[str, Any]]]  # CSV rows with their line number, or a tree's files with theirs


@dataclass(frozen=True)
class Chunk:
    """Some rows of a file, in order. `first` is the number, from 1, of the first line (JSONL) or row (Parquet)."""

    first: int
    rows: Lines | Cells | pa.RecordBatch
    read: int  # bytes of the stored file read so far
    unreadable: int = 0  # files of a tree between these rows that are empty or no UTF-8 text


@dataclass(frozen=True)
class Piece:
    """A part of a file that can be read by itself: items [start, stop), of which the first row has the number `first`.

    Items are bytes of plain JSONL, row groups of Parquet, and members of a tree. Other files are one piece.
    """

    start: int = 0
    stop: int | None = None  # None: to the end
    first: int = 1


WHOLE: Final = Piece()


def chunks(file: SourceFile, piece: Piece = WHOLE) -> Iterator[Chunk]:
    """The rows of a file, or of a piece of it.

    Raises:
        StorageError: it cannot be read.
        DataError: it is damaged, not UTF-8 text, or has a line longer than LARGEST_ROW.
    """
    if file.kind == TREE:
        yield from _tree(file, piece)
        return
    location = file.stored.location
    if file.kind == ".parquet":
        with explained(file.uri), location.fs.open_input_file(location.path) as opened:
            yield from _parquet(file, opened, piece)
        return
    with explained(file.uri), Reading(location, piece.start) as reading:
        counted = _Counted(reading, piece)
        stream = pa.CompressedInputStream(pa.PythonFile(counted, "r"), file.codec) if file.codec else counted
        blocks = _blocks(file, stream, piece.first)
        if file.kind == ".csv":
            yield from _csv(file, blocks, counted)
            return
        line = piece.first
        for block in blocks:
            yield Chunk(line, block, counted.read_bytes)
            line += block.count(b"\n")


class _Counted:
    """A stream that ends where the piece ends."""

    closed = False

    def __init__(self, reading: Reading, piece: Piece) -> None:
        self._reading = reading
        self._stop = sys.maxsize if piece.stop is None else piece.stop

    @property
    def read_bytes(self) -> int:
        """Bytes of the file up to here."""
        return self._reading.position

    def read(self, size: int) -> bytes:
        return self._reading.read(min(size, self._stop - self._reading.position))


def _blocks(file: SourceFile, stream: _Counted | pa.CompressedInputStream, line: int) -> Iterator[bytes]:
    """The text in blocks of whole lines, of which the first has the number `line`."""
    rest = b""
    while True:
        with _readable(file):
            block = stream.read(CHUNK_BYTES)
        if line == 1 and not rest:
            _check_start(file, block)
        if not block:
            break
        head, newline, tail = block.rpartition(b"\n")
        if newline:
            yield rest + head + newline
            line += head.count(b"\n") + 1
            rest = tail
        else:
            rest += tail
        if len(rest) > LARGEST_ROW:
            raise DataError(
                f"the line is longer than {LARGEST_ROW >> 20} MiB",
                where=f"{file.uri}:{line}",
                hint="write one row a line, and cut a long text into several rows",
            )
    if rest:
        yield rest


def _check_start(file: SourceFile, block: bytes) -> None:
    for mark, encoding in _BOMS.items():
        if block.startswith(mark):
            raise DataError(
                f"the file begins with the byte order mark of {encoding}",
                where=f"{file.uri}:1",
                hint="save it as UTF-8 without a byte order mark"
                + ("" if encoding == "UTF-8" else f": iconv -f {encoding} -t UTF-8"),
            )


def _csv(file: SourceFile, blocks: Iterator[bytes], counted: _Counted) -> Iterator[Chunk]:
    csv.field_size_limit(LARGEST_ROW)
    reader = csv.reader(_text_lines(file, blocks), strict=True)
    try:
        header = next(reader, [])
        if len(set(header)) < len(header) or not all(header):
            raise DataError(
                "a column has no name, or the name of another",
                where=f"{file.uri}:1",
                hint="name every column in the first line, each differently",
            )
        first = reader.line_num + 1
        rows: Cells = []
        size = 0
        begin = first
        for cells in reader:
            if cells and len(cells) != len(header):
                raise DataError(
                    f"the row has {len(cells)} cells and the header {len(header)}",
                    where=f"{file.uri}:{begin}",
                    hint="quote cells that hold a comma or a line break",
                )
            if cells:
                rows.append((begin, dict(zip(header, cells, strict=True))))
                size += sum(map(len, cells))
            begin = reader.line_num + 1
            if size >= CHUNK_BYTES:
                yield Chunk(first, rows, counted.read_bytes)
                first, rows, size = begin, [], 0
        if rows:
            yield Chunk(first, rows, counted.read_bytes)
    except csv.Error as error:
        raise DataError(
            f"the line is not CSV: {error}", where=f"{file.uri}:{reader.line_num}", hint='write a quote in a cell as ""'
        ) from None


def _text_lines(file: SourceFile, blocks: Iterator[bytes]) -> Iterator[str]:
    line = 0
    for block in blocks:
        for text in block.splitlines(keepends=True):
            line += 1
            try:
                yield text.decode()
            except UnicodeDecodeError as error:
                raise DataError(
                    f"byte {error.start + 1} of the line is not UTF-8",
                    where=f"{file.uri}:{line}",
                    hint="convert the file to UTF-8",
                ) from None


def _tree(file: SourceFile, piece: Piece) -> Iterator[Chunk]:
    """Each member is a row; a repository always holds some files that are no text, so they end nothing."""
    rows: Cells = []
    size = unreadable = 0
    read = sum(member.size for member in file.members[: piece.start])
    for number, member in enumerate(file.members[piece.start : piece.stop], piece.start + 1):
        location = member.location
        with explained(location.uri), Reading(location) as reading:
            data = reading.read(member.size + 1)  # a byte more: `check_unchanged` tells of a file that has grown
        read += len(data)
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError:
            text = ""
        if not text.strip() or "\0" in text:
            unreadable += 1
            continue
        name = file.name(member)
        row = {"text": text, "path": name, "language": language_of(name), "repository": file.source.uri}
        rows.append((number, row))
        size += len(data)
        if size >= CHUNK_BYTES:
            yield Chunk(rows[0][0], rows, read, unreadable)
            rows, size, unreadable = [], 0, 0
    if rows or unreadable:
        yield Chunk(rows[0][0] if rows else 1, rows, read, unreadable)


def _parquet(file: SourceFile, opened: pa.NativeFile, piece: Piece) -> Iterator[Chunk]:
    with _readable(file):
        parquet = pq.ParquetFile(opened)
        wanted = {*COLUMNS, *file.source.columns.values()}
        names = [name for name in parquet.schema_arrow.names if name in wanted]
        rows = parquet.metadata.num_rows
        largest = max((group.total_byte_size / max(group.num_rows, 1) for group in _groups(parquet)), default=1.0)
        size = max(min(int(CHUNK_BYTES / max(largest, 1)), 4096), 1)
        groups = range(parquet.metadata.num_row_groups)[piece.start : piece.stop]
        batches = parquet.iter_batches(size, row_groups=list(groups), columns=names or None)
    row = piece.first
    while True:
        with _readable(file):
            batch = next(batches, None)
        if batch is None:
            return
        yield Chunk(row, batch, int(file.stored.size * (row - 1 + len(batch)) / max(rows, 1)))
        row += len(batch)


def _groups(parquet: pq.ParquetFile) -> Iterator[Any]:
    return (parquet.metadata.row_group(i) for i in range(parquet.metadata.num_row_groups))


@contextmanager
def _readable(file: SourceFile) -> Iterator[None]:
    """What the decoders say about a damaged file. A bucket's own errors name AWS and pass as they are."""
    try:
        yield
    except (pa.ArrowInvalid, OSError) as error:
        said = " ".join(str(error).split())
        if "AWS Error" in said:
            raise
        kind = file.codec or file.kind.removeprefix(".")
        raise DataError(
            f"the file is not whole {kind}: {said[:200]}", where=file.uri, hint="write the file again"
        ) from None
