"""Decides which documents go into which split, and how often: without duplicates, by content hash, by source weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
import numpy.typing as npt

from finetune_api.job import Data
from finetune_trainer.manifest import Split
from finetune_trainer.prepare.collect import Collection
from finetune_trainer.prepare.deduplicate import Duplicates, Signatures, find_duplicates, mixed
from finetune_trainer.prepare.refusals import times as refusal_times
from finetune_trainer.prepare.report import MOST_POSITIONS
from finetune_trainer.prepare.sources import SourceFile

# The draw for a source's weight is another than that for evaluation.
_SAMPLING: Final = np.uint64(0x5851F42D4C957F2D)


def select_documents(
    collection: Collection,
    files: list[SourceFile],
    data: Data,
    signatures: Signatures,
    progress: Callable[[int, int], None],
) -> dict[Split, npt.NDArray[np.int64]]:
    """Numbers of the documents of each split, in order; a document that is seen twice an epoch stands there twice.

    A pure function of the rows' hashes: neither the number of workers nor the order of files changes a row's fate,
    except that of two duplicates the earlier stays. Evaluation files come first, so a training row that repeats an
    evaluation row is dropped: the yardstick stays as the user gave it. `progress` follows the search for duplicates.
    """
    rows = len(collection.hashes)
    kept = np.ones(rows, dtype=np.bool_)
    if data.deduplicate != "none":
        near = signatures if data.deduplicate == "near" else None
        duplicates = find_duplicates(collection.hashes, near, data.near_duplicate_threshold, progress)
        kept = duplicates.original < 0
        _report(collection, files, duplicates)
    in_train = np.concatenate(
        [np.full(tally.rows, file.split == "train") for file, tally in zip(files, collection.report.files, strict=True)]
    )
    times = np.concatenate(
        [np.full(tally.rows, file.source.weight) for file, tally in zip(files, collection.report.files, strict=True)]
    )
    built_in = np.concatenate(
        [np.full(tally.rows, file.built_in) for file, tally in zip(files, collection.report.files, strict=True)]
    )
    draws = _draws(collection, np.uint64(0))
    if not data.evaluation and data.evaluation_fraction > 0:
        own = kept & ~built_in
        chosen = own & (draws < data.evaluation_fraction)
        if not chosen.any() and own.sum() > 1:
            chosen[np.flatnonzero(own)[np.argmin(draws[own])]] = True
        in_train &= ~chosen
    repeats = np.where(in_train, np.floor(times) + (_draws(collection, _SAMPLING) < times % 1), 1) * kept
    if data.refusals.mix > 0:
        _mix_refusals(collection, repeats, in_train, built_in, data.refusals.mix)
    documents = np.arange(len(collection.sizes))
    train = in_train[collection.rows]
    return {
        "train": np.repeat(documents[train], repeats[collection.rows[train]].astype(np.int64)),
        "evaluation": np.repeat(documents[~train], repeats[collection.rows[~train]].astype(np.int64)),
    }


def _mix_refusals(
    collection: Collection,
    repeats: npt.NDArray[np.float64],
    in_train: npt.NDArray[np.bool_],
    built_in: npt.NDArray[np.bool_],
    mix: float,
) -> None:
    """Sets how often each built-in row is seen; those that repeat the job's own rows, or are too long, are not."""
    seen = repeats * (np.bincount(collection.rows, minlength=len(repeats)) > 0)
    others = int(seen[in_train & ~built_in].sum())
    candidates = np.flatnonzero(built_in & (seen > 0))
    repeats[built_in] = 0
    repeats[candidates] = times = refusal_times(mix, others, len(candidates))
    rows = int(times.sum())
    collection.report.refusals = {
        "rows": rows,
        "distinct": int((times > 0).sum()),
        "share": rows / (rows + others) if rows else 0.0,
    }


def _draws(collection: Collection, salt: np.uint64) -> npt.NDArray[np.float64]:
    """A number in [0, 1) for each row, drawn from its hash."""
    parts = [mixed(block ^ salt) / 2.0**64 for _, block in collection.hashes.blocks()]
    return np.concatenate([np.zeros(0), *parts])


def _report(collection: Collection, files: list[SourceFile], duplicates: Duplicates) -> None:
    repeated = np.flatnonzero(duplicates.original >= 0)
    originals = duplicates.original[repeated]
    file, of_file = collection.file_of(repeated), collection.file_of(originals)
    for place, row in enumerate(repeated.tolist()):
        leak = files[file[place]].split == "train" and files[of_file[place]].split == "evaluation"
        kind = "leak" if leak else "exact" if duplicates.exact[row] else "near"
        collection.report.duplicate(kind, int(file[place]))
        if place < MOST_POSITIONS:
            original = int(originals[place])
            collection.report.duplicate_rows.append(
                {
                    "row": _position(collection, int(file[place]), row),
                    "repeats": _position(collection, int(of_file[place]), original),
                    "kind": kind,
                }
            )


def _position(collection: Collection, file: int, row: int) -> str:
    return collection.report.position(file, int(collection.numbers.read(row, row + 1)[0]))
