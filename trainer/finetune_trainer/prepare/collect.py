"""Takes the workers' results in order and keeps them on disk until it is known which rows stay."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from finetune_api.errors import DataError, join
from finetune_trainer.prepare.deduplicate import PERMUTATIONS
from finetune_trainer.prepare.report import ReportBuilder, Tally
from finetune_trainer.prepare.sources import SourceFile
from finetune_trainer.prepare.spill import Spill
from finetune_trainer.prepare.work import MOST_PROBLEMS, Result


class Collection:
    """All rows and documents of a job; only the documents' rows and sizes are in memory, 20 bytes each.

    Rows are numbered through all files, in the files' order; documents likewise, and each knows its row.
    """

    def __init__(self, folder: Path, files: Sequence[SourceFile]) -> None:
        folder.mkdir()
        self.folder = folder  # of all that is kept on disk
        self._files = files
        self.report = ReportBuilder(files)
        self.formats = ["" for _ in files]
        self.numbers = Spill(folder / "numbers", np.int64)  # of each row in its file
        self.hashes = Spill(folder / "hashes", np.uint64)  # of each row
        self.minima = Spill(folder / "minima", np.uint32, PERMUTATIONS)
        self.repositories = Spill(folder / "repositories", np.uint64)  # of each row; 0: none
        self._paths = Spill(folder / "paths", np.uint8)  # of rows that have a repository, one behind the other
        self._path_sizes: list[tuple[int, list[int]]] = []  # first row, and bytes of each row's path from there
        self._ids = Spill(folder / "ids", np.int32)
        self._weights = Spill(folder / "weights", np.float16)
        self._rows: list[npt.NDArray[np.int64]] = []
        self._sizes: list[npt.NDArray[np.int32]] = []

    def gather(self, results: Iterable[Result]) -> None:
        """Takes all results.

        Raises:
            DataError: rows have problems (the first of them are named), or a file has no rows.
        """
        problems: list[DataError] = []
        try:
            for result in results:
                for number, problem in result.problems:
                    where = self.report.position(result.file, number)
                    field = f": {problem.field}" if problem.field else ""
                    problems.append(DataError(problem.what, where=where + field, hint=problem.hint))
                if len(problems) >= MOST_PROBLEMS:
                    break
                self._add(result)
        except DataError as error:
            problems.append(error)
        if not problems:
            problems = [
                _without_rows(file, tally)
                for file, tally in zip(self._files, self.report.files, strict=True)
                if not tally.rows and not file.built_in
            ]
        if len(problems) == 1:
            raise problems[0]
        if problems:
            first = problems[:MOST_PROBLEMS]
            more = "at least " if len(problems) >= MOST_PROBLEMS else ""
            raise DataError(f"the data has {more}{len(first)} problems:\n{join(first)}")
        # Files' first rows, and documents' rows and first tokens.
        self.starts = np.cumsum([0, *(tally.rows for tally in self.report.files)])
        self.rows = np.concatenate([np.zeros(0, np.int64), *self._rows])
        self.sizes = np.concatenate([np.zeros(0, np.int32), *self._sizes])
        self._offsets = np.cumsum(self.sizes, dtype=np.int64) - self.sizes
        self.has_repositories = bool(self._path_sizes)
        path_sizes = np.zeros(len(self.hashes) if self.has_repositories else 0, np.int64)
        for row, sizes in self._path_sizes:
            path_sizes[row : row + len(sizes)] = sizes
        self._path_ends = np.cumsum(path_sizes)

    def file_of(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The file of each row."""
        return np.searchsorted(self.starts, rows, side="right") - 1

    def document(self, index: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float16]]:
        """Tokens and loss weights of one document, read from disk."""
        start = int(self._offsets[index])
        stop = start + int(self.sizes[index])
        return self._ids.read(start, stop), self._weights.read(start, stop)

    def path_of(self, document: int) -> bytes:
        """Where the document's code stands inside of its repository."""
        row = int(self.rows[document])
        start = int(self._path_ends[row - 1]) if row else 0
        return self._paths.read(start, int(self._path_ends[row])).tobytes()

    def close(self) -> None:
        """Closes the files; their folder can be deleted then."""
        for spill in (
            self.numbers, self.hashes, self.minima, self.repositories, self._paths, self._ids, self._weights
        ):  # fmt: skip
            spill.close()

    def _add(self, result: Result) -> None:
        before = len(self.numbers)
        self.numbers.append(result.numbers)
        self.hashes.append(result.hashes)
        self.minima.append(result.minima)
        self.repositories.append(result.repositories)
        if result.repositories.any():
            self._path_sizes.append((before, [len(path) for path in result.paths]))
            self._paths.append(np.frombuffer(b"".join(result.paths), np.uint8))
        self._ids.append(result.ids)
        self._weights.append(result.weights)
        self._rows.append(result.rows + before)
        self._sizes.append(result.sizes)
        self.formats[result.file] = self.formats[result.file] or result.format
        self.report.add(result)


def _without_rows(file: SourceFile, tally: Tally) -> DataError:
    if any(vars(tally.left_out).values()):
        asked = "languages and licenses of the source's `code`"
        return DataError("all of its code was left out", where=file.uri, hint=f"check {asked}, and that it is text")
    return DataError("the file has no rows", where=file.uri, hint="put rows into it, or leave it out")
