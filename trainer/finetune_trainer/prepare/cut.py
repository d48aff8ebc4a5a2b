"""Makes documents of a row's tokens: as they are, or cut to the sequence's length as data.overlong says."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Self

import numpy as np
import numpy.typing as npt

from finetune_trainer.prepare.fields import BadRow

Tokens = tuple[npt.NDArray[np.int32], npt.NDArray[np.float16]]  # ids, and their loss weights


@dataclass
class Counts:
    """Whole numbers that add up over chunks and files."""

    def add(self, other: Self) -> None:
        """Adds another's counts to these."""
        for name, count in vars(other).items():
            setattr(self, name, getattr(self, name) + count)


@dataclass
class Cuts(Counts):
    """What became of rows longer than the sequence, in rows and tokens."""

    truncated_rows: int = 0
    truncated_tokens: int = 0
    split_rows: int = 0
    dropped_rows: int = 0
    dropped_tokens: int = 0
    empty_documents: int = 0  # pieces with nothing to learn in them, left out
    empty_tokens: int = 0


@dataclass
class Documents:
    """What became of a chunk's rows. The two documents of a pair follow each other."""

    rows: list[int] = field(default_factory=list)
    ids: list[npt.NDArray[np.int32]] = field(default_factory=list)
    weights: list[npt.NDArray[np.float16]] = field(default_factory=list)

    def add(self, row: int, ids: npt.NDArray[np.int32], weights: npt.NDArray[np.float16]) -> None:
        """Adds one."""
        self.rows.append(row)
        self.ids.append(ids)
        self.weights.append(weights)


@dataclass(frozen=True)
class Cutter:
    """Adds rows' documents, of at most `limit` tokens, to `documents`, and counts what was cut."""

    limit: int
    overlong: str
    documents: Documents
    cuts: Cuts

    def add(self, row: int, ids: npt.NDArray[np.int32], weights: npt.NDArray[np.float16]) -> None:
        """Adds a row's documents: itself, or what data.overlong makes of it.

        Raises:
            BadRow: nothing in it is learned, or it is too long and that is an error.
        """
        limit, overlong, documents, cuts = self.limit, self.overlong, self.documents, self.cuts
        if not weights.any():
            raise BadRow("", "the row has nothing to learn", "give it an answer, with a weight above 0")
        if len(ids) <= limit:
            documents.add(row, ids, weights)
            return
        if overlong == "error":
            raise BadRow(
                "",
                f"the row has {len(ids)} tokens, more than data.sequenceLength, {limit}",
                "raise data.sequenceLength, or set data.overlong to truncate, split or drop",
            )
        if overlong == "drop":
            cuts.dropped_rows += 1
            cuts.dropped_tokens += len(ids)
            return
        if overlong == "truncate":
            cuts.truncated_rows += 1
            cuts.truncated_tokens += len(ids) - limit
            ids, weights = ids[:limit], weights[:limit]
        else:
            cuts.split_rows += 1
        for start in range(0, len(ids), limit):
            piece = weights[start : start + limit].copy()
            piece[0] = 0  # nothing stands before the first token of a piece
            if piece.any():
                documents.add(row, ids[start : start + limit], piece)
            else:
                cuts.empty_documents += 1
                cuts.empty_tokens += len(piece)

    def add_pair(self, row: int, chosen: Tokens, rejected: Tokens) -> None:
        """Adds a pair's two documents, which together have at most `limit` tokens. Of one that is too long either goes
        whole, or the longer answer is cut, then both.

        Raises:
            BadRow: an answer has nothing to learn, or the pair is too long and that is an error.
        """
        for name, (_, weights) in (("chosen", chosen), ("rejected", rejected)):
            if not weights.any():
                raise BadRow(name, "the answer has nothing to learn", "give it a text")
        sizes = [len(chosen[0]), len(rejected[0])]
        total = sum(sizes)
        if total > self.limit and self.overlong in ("error", "split"):
            raise BadRow(
                "",
                f"the two answers with their prompts have {total} tokens, more than data.sequenceLength, {self.limit}",
                "raise data.sequenceLength, or set data.overlong to truncate or drop",
            )
        if total > self.limit and self.overlong == "drop":
            self.cuts.dropped_rows += 1
            self.cuts.dropped_tokens += total
            return
        if total > self.limit:
            most = max(self.limit // 2, self.limit - min(sizes))
            chosen, rejected = ((ids[:most], weights[:most]) for ids, weights in (chosen, rejected))
            left = len(chosen[0]) + len(rejected[0])
            self.cuts.truncated_rows += 1
            self.cuts.truncated_tokens += total - left
            if not (chosen[1].any() and rejected[1].any()) or np.array_equal(chosen[0], rejected[0]):
                self.cuts.empty_documents += 2
                self.cuts.empty_tokens += left
                return
        self.documents.add(row, *chosen)
        self.documents.add(row, *rejected)
