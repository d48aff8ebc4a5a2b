"""Cuts files into the tasks that workers take, and finds out how their rows are to be read."""

from __future__ import annotations

from collections.abc import Iterator

from finetune_trainer.prepare.read import WHOLE, Piece, chunks
from finetune_trainer.prepare.rows import FORMATS, RowFormat
from finetune_trainer.prepare.sources import SourceFile
from finetune_trainer.prepare.work import Task, first_format


def tasks(index: int, file: SourceFile, piece: Piece = WHOLE, known: RowFormat | None = None) -> Iterator[Task]:
    """The tasks of a file, or of a piece of it.

    Args:
        index: the file's number among the job's files.
        known: format of the rows before the piece; without one the first rows show it.

    Raises:
        StorageError: the file cannot be read.
        DataError: it is damaged; the tasks before the damage come first.
    """
    row_format = _named(file) or known
    for chunk in chunks(file, piece):
        row_format = row_format or first_format(chunk, file.source.columns)
        yield Task(
            file=index,
            chunk=chunk,
            format=row_format,
            given=file.source.format != "auto",
            columns=file.source.columns,
            train=file.split == "train",
            code=file.source.code,
            built_in=file.built_in,
        )


def file_format(file: SourceFile) -> RowFormat | None:
    """The format of a file's rows: the one that the source names, or that its first rows show, if they do."""
    shown = (first_format(chunk, file.source.columns) for chunk in chunks(file))
    return _named(file) or next((found for found in shown if found), None)


def _named(file: SourceFile) -> RowFormat | None:
    return next((name for name in FORMATS if name == file.source.format), None)
