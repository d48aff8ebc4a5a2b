"""prepared/data-report.json: what was in the data and what became of it. Counts and positions, never a row's text."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from finetune_trainer.manifest import Split, SplitFacts
from finetune_trainer.prepare.cut import Cuts
from finetune_trainer.prepare.sources import SourceFile
from finetune_trainer.prepare.work import LeftOut, Result

MOST_POSITIONS: Final = 100
_LONGEST: Final = 10


@dataclass
class Tally:
    """Counts of one file, or of all files together."""

    rows: int = 0
    tokens: int = 0
    exact_duplicates: int = 0
    near_duplicates: int = 0
    evaluation_leaks: int = 0  # training rows dropped because evaluation has them
    cuts: Cuts = field(default_factory=Cuts)
    left_out: LeftOut = field(default_factory=LeftOut)
    other_files: int = 0  # of a folder of code: of other languages, or larger than a row may be

    def as_json(self) -> dict[str, Any]:
        """With the names of the report."""
        return {
            "rows": self.rows,
            "tokens": self.tokens,
            "duplicates": {
                "exact": self.exact_duplicates,
                "near": self.near_duplicates,
                "evaluationLeaks": self.evaluation_leaks,
            },
            "overlong": {
                "truncated": {"rows": self.cuts.truncated_rows, "tokens": self.cuts.truncated_tokens},
                "split": {"rows": self.cuts.split_rows},
                "dropped": {"rows": self.cuts.dropped_rows, "tokens": self.cuts.dropped_tokens},
                "nothingToLearn": {"documents": self.cuts.empty_documents, "tokens": self.cuts.empty_tokens},
            },
            "leftOut": {
                "otherFiles": self.other_files,
                "unreadable": self.left_out.unreadable,
                "language": self.left_out.language,
                "license": self.left_out.license,
                "controlToken": self.left_out.control_token,
            },
        }


class ReportBuilder:
    """Gathers the report while rows go by; memory does not grow with their number."""

    def __init__(self, files: Sequence[SourceFile]) -> None:
        self._sources = files
        self.files = [Tally(other_files=file.left_out) for file in files]
        self.pairs = False  # every two documents are a pair's answers
        self.refusals: dict[str, Any] | None = None  # built-in rows that were mixed in
        self._histogram: Counter[int] = Counter()
        self._longest: list[tuple[int, int, int]] = []  # tokens, -file, -row: the first of equals stays
        self.duplicate_rows: list[dict[str, str]] = []  # the first MOST_POSITIONS, as they stand in the report

    def add(self, result: Result) -> None:
        """Counts one chunk."""
        tally = self.files[result.file]
        self.pairs |= result.format == "preference"
        tally.rows += len(result.numbers)
        tally.tokens += int(result.lengths.sum())
        tally.cuts.add(result.cuts)
        tally.left_out.add(result.left_out)
        self._histogram.update(_buckets(result.lengths))
        rows = zip(result.lengths.tolist(), result.numbers.tolist(), strict=True)
        longest = ((length, -result.file, -number) for length, number in rows)
        self._longest = heapq.nlargest(_LONGEST, [*self._longest, *longest])

    def duplicate(self, kind: str, file: int) -> None:
        """Counts one dropped row of a file; kind is exact, near, or leak."""
        tally = self.files[file]
        tally.exact_duplicates += kind == "exact"
        tally.near_duplicates += kind == "near"
        tally.evaluation_leaks += kind == "leak"

    def position(self, file: int, row: int) -> str:
        """Where a row stands, for people: file:line, or the file of a folder of code."""
        return self._sources[file].position(row)

    def as_json(self, splits: Mapping[Split, SplitFacts]) -> dict[str, Any]:
        """The report."""
        total = Tally()
        for tally in self.files:
            for name in ("rows", "tokens", "exact_duplicates", "near_duplicates", "evaluation_leaks", "other_files"):
                setattr(total, name, getattr(total, name) + getattr(tally, name))
            total.cuts.add(tally.cuts)
            total.left_out.add(tally.left_out)
        return {
            "version": 1,
            **total.as_json(),
            "splits": {name: _split(facts, self.pairs) for name, facts in splits.items()},
            "lengths": [
                {"from": 1 << bucket, "to": (2 << bucket) - 1, "rows": self._histogram[bucket]}
                for bucket in range(min(self._histogram, default=0), max(self._histogram, default=-1) + 1)
            ],
            "longest": [{"row": self.position(-file, -row), "tokens": tokens} for tokens, file, row in self._longest],
            "duplicateRows": self.duplicate_rows,
            "sources": [
                {"uri": source.uri, **tally.as_json()} for source, tally in zip(self._sources, self.files, strict=True)
            ],
            **({"refusals": self.refusals} if self.refusals else {}),
        }


def _split(facts: SplitFacts, pairs: bool) -> dict[str, Any]:
    room = facts.tokens or 1
    return {
        "sequences": facts.sequences,
        "documents": facts.documents,
        **({"pairs": facts.documents // 2} if pairs else {}),
        "tokens": facts.tokens,
        "targetTokens": facts.target_tokens,
        "maskedShare": round(1 - facts.target_tokens / room, 4),
    }


def _buckets(lengths: npt.NDArray[np.int64]) -> list[int]:
    """Bucket b holds lengths of 2^b to 2^(b+1) - 1 tokens."""
    buckets: list[int] = (np.frexp(np.maximum(lengths, 1).astype(np.float64))[1] - 1).tolist()
    return buckets
