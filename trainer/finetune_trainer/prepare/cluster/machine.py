"""A Ray cluster as the machine that prepares: the driver hands out work, keeps a few numbers a row, decides nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from finetune_trainer.manifest import Split, SplitFacts, TokenizerFacts
from finetune_trainer.prepare.cluster import parts
from finetune_trainer.prepare.cluster.exchange import Exchange
from finetune_trainer.prepare.cluster.ray_data import spread, tokenised
from finetune_trainer.prepare.collect import Collection
from finetune_trainer.prepare.deduplicate import COMPARE, PERMUTATIONS, Pairs, Signatures, share_of_equal
from finetune_trainer.prepare.deduplicate import Progress as BandProgress
from finetune_trainer.prepare.layout import Layout
from finetune_trainer.prepare.machine import Progress, reported
from finetune_trainer.prepare.shards import added, shard_stops
from finetune_trainer.prepare.sources import SourceFile
from finetune_trainer.prepare.spill import Spill
from finetune_trainer.prepare.survey import Survey, survey
from finetune_trainer.prepare.work import Result, Settings, Worker

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Grain:
    """How finely the work is cut. It changes how long it takes, and nothing that is written.

    A worker has a bundle of chunks (of 1 MiB of rows) and its tokens in memory, about five times the bundle, or the
    keys of a partition, 17 bytes each.
    """

    piece_bytes: int = 256 << 20  # of a file that one task reads
    chunks: int = 32  # in a bundle
    keys: int = 8_000_000  # in a partition


@dataclass
class _Parts:
    """The parts in order, with the first row and the first document of each, and one past the last."""

    names: list[str]
    rows: list[int]
    documents: list[int]

    def add(self, name: str, rows: int, documents: int) -> None:
        self.names.append(name)
        self.rows.append(self.rows[-1] + rows)
        self.documents.append(self.documents[-1] + documents)


class RayMachine:
    """The workers of a Ray cluster that is there; see `Machine`.

    Args:
        settings: the workers' settings.
        exchange: where they leave blobs for each other.
        target: where the shards go: the prepared folder.
        grain: how finely the work is cut.
    """

    def __init__(self, settings: Settings, exchange: Exchange, target: Exchange, grain: Grain) -> None:
        self._settings, self._exchange, self._target, self._grain = settings, exchange, target, grain
        self._surveys: list[Survey] = []
        self._parts = _Parts([], [0], [0])

    def fingerprints(self, files: Sequence[SourceFile], progress: Progress) -> list[str]:
        """See `Machine`; done are files."""
        total = sum(file.stored.size for file in files)
        done = 0

        def tick() -> None:
            progress(done, total, "read")

        arguments = [(file, self._grain.piece_bytes) for file in files]
        for file, found in zip(files, spread(_survey, arguments, tick), strict=True):
            self._surveys.append(found)
            done += file.stored.size
            tick()
        return [found.sha256 for found in self._surveys]

    def facts(self) -> TokenizerFacts:
        """See `Machine`."""
        parts.leave_tokenizer(self._settings.model, self._exchange)
        return next(spread(_facts, [(self._settings, self._exchange)], _idle))

    def results(self, files: Sequence[SourceFile], progress: Progress) -> Iterator[Result]:
        """See `Machine`; tokens and signatures are left in the exchange."""
        last = (0.0, 1.0, "tokenise")

        def remember(done: float, total: float, what: str) -> None:
            nonlocal last
            last = (done, total, what)
            progress(*last)

        yield from reported(self._results(files, lambda: progress(*last)), files, remember)

    def _results(self, files: Sequence[SourceFile], tick: Callable[[], None]) -> Iterator[Result]:
        cuts = [
            (index, file, piece, found.format if number else None)
            for index, (file, found) in enumerate(zip(files, self._surveys, strict=True))
            for number, piece in enumerate(found.pieces)
        ]
        for part in tokenised(cuts, self._settings, self._exchange, self._grain.chunks, tick):
            results = part.results
            self._parts.add(part.name, sum(len(r.numbers) for r in results), sum(len(r.rows) for r in results))
            yield from results
            if part.error is not None:
                raise part.error

    def signatures(self, collection: Collection) -> Signatures:
        """See `Machine`."""
        return _ClusterSignatures(self._parts, collection.minima, self._exchange, self._grain.keys)

    def write_split(
        self, folder: Path, split: Split, collection: Collection, layout: Layout, progress: Progress
    ) -> SplitFacts:
        """See `Machine`."""
        stops = shard_stops(_tokens(collection, layout))
        if not stops:
            return SplitFacts(sequences=0, documents=0, tokens=0, target_tokens=0, shards=[])
        groups, documents = layout.stops()
        document_stops = documents[np.array(stops) - 1]
        shard = np.repeat(np.arange(len(stops)), np.diff(np.append(0, document_stops)))
        part = np.searchsorted(self._parts.documents, layout.documents, side="right") - 1
        extents = self._scatter(split, collection, layout, part, shard, progress)
        starts = [0, *stops[:-1]]
        group_starts = np.append(0, groups[np.array(stops) - 1])
        tasks = (
            (
                _shard(
                    split,
                    number,
                    extents[number],
                    part[begin:end],
                    collection.sizes[layout.documents[begin:end]],
                    layout.groups[group_starts[number] : group_starts[number + 1]],
                    layout.sequences[starts[number] : stop],
                ),
                self._exchange,
                self._target,
            )
            for number, (stop, begin, end) in enumerate(
                zip(stops, np.append(0, document_stops[:-1]).tolist(), document_stops.tolist(), strict=True)
            )
        )
        written: list[SplitFacts] = []
        targets: list[float] = []

        def tick() -> None:
            progress(len(written), len(stops), f"pack {split}")

        for facts, sums in spread(parts.write_shard, tasks, tick):
            written.append(facts)
            targets += sums
            tick()
        for name in self._parts.names:
            self._exchange.delete(f"{split}-{name}")
        return SplitFacts(
            sequences=sum(facts.sequences for facts in written),
            documents=sum(facts.documents for facts in written),
            tokens=sum(facts.tokens for facts in written),
            target_tokens=added(targets),
            shards=[facts.shards[0] for facts in written],
        )

    def _scatter(
        self, split: Split, collection: Collection, layout: Layout, part: Numbers, shard: Numbers, progress: Progress
    ) -> list[list[tuple[int, parts.Extent]]]:
        """Sorts each part's tokens by shard; gives the shards' extents, each with its part's number."""
        order = np.argsort(part, kind="stable")
        bounds = np.searchsorted(part[order], np.arange(len(self._parts.names) + 1))
        used = np.flatnonzero(np.diff(bounds)).tolist()
        firsts = self._parts.documents

        def arguments(index: int) -> tuple[object, ...]:
            places = order[bounds[index] : bounds[index + 1]]
            first, last = firsts[index], firsts[index + 1]
            documents = layout.documents[places] - first
            name = self._parts.names[index]
            return name, split, collection.sizes[first:last], documents, shard[places], self._exchange

        found: list[list[tuple[int, parts.Extent]]] = [[] for _ in range(int(shard[-1]) + 1)]
        done = 0

        def tick() -> None:
            progress(done, len(used), f"sort {split}")

        for index, places in zip(used, spread(parts.scatter, map(arguments, used), tick), strict=True):
            for number, start, stop in places.tolist():
                found[number].append((index, parts.Extent(f"{split}-{self._parts.names[index]}", start, stop)))
            done += 1
            tick()
        return found


class _ClusterSignatures:
    """Signatures that lie in the exchange, part by part; see `Signatures`."""

    def __init__(self, known: _Parts, minima: Spill[np.uint32], exchange: Exchange, keys: int) -> None:
        self._parts, self._minima, self._exchange, self._keys = known, minima, exchange, keys
        self._rows = np.zeros(0, np.int64)  # those whose signatures are here, in `minima`

    def pairs(self, size: int, original: Numbers, progress: BandProgress) -> Iterator[Pairs]:
        """See `Signatures`: keys by part, pairs by partition of the keys, then the signatures of the pairs' rows."""
        spans = zip(self._parts.names, self._parts.rows[:-1], self._parts.rows[1:], strict=True)
        used = [(name, first, last) for name, first, last in spans if last > first]
        partitions = -(-len(original) * (PERMUTATIONS // size) // self._keys)
        steps, done = 2 * len(used) + partitions, 0

        def tick() -> None:
            progress(done, steps)

        keys = [(name, first, original[first:last] < 0, size, partitions, self._exchange) for name, first, last in used]
        ends = []
        for found in spread(parts.write_keys, keys, tick):
            ends.append(np.append(0, found).tolist())
            done += 1
        partitioned = [
            (
                [
                    parts.Extent(f"keys-{name}", end[number], end[number + 1])
                    for (name, _, _), end in zip(used, ends, strict=True)
                    if end[number + 1] > end[number]
                ],
                self._exchange,
            )
            for number in range(partitions)
        ]
        pairs = []
        for pair in spread(parts.pairs_of, partitioned, tick):
            pairs.append(pair)
            done += 1
        self._rows = np.unique(np.concatenate([np.zeros(0, np.int64), *(rows for pair in pairs for rows in pair)]))
        asked = [
            (name, self._rows[(self._rows >= first) & (self._rows < last)] - first, self._exchange)
            for name, first, last in used
        ]
        for some in spread(parts.minima_of, [each for each in asked if len(each[1])], tick):
            self._minima.append(some)
            done += 1
        for name, _, _ in used:
            self._exchange.delete(f"keys-{name}")
        for first, later in pairs:
            for start in range(0, len(first), COMPARE):
                yield first[start : start + COMPARE], later[start : start + COMPARE]

    def similarity(self, left: Numbers, right: Numbers) -> npt.NDArray[np.float64]:
        """See `Signatures`."""
        return share_of_equal(self._gather(left), self._gather(right))

    def _gather(self, rows: Numbers) -> npt.NDArray[np.uint32]:
        places = np.searchsorted(self._rows, rows).tolist()
        return np.array([self._minima.read(place, place + 1)[0] for place in places]).reshape(-1, PERMUTATIONS)


def _shard(
    split: Split,
    number: int,
    extents: list[tuple[int, parts.Extent]],
    part: Numbers,
    sizes: npt.NDArray[np.int32],
    groups: Numbers,
    sequences: Numbers,
) -> parts.Shard:
    place = np.searchsorted([index for index, _ in extents], part).astype(np.int32)
    return parts.Shard(split, number, [extent for _, extent in extents], place, sizes, groups, sequences)


def _tokens(collection: Collection, layout: Layout) -> Numbers:
    """Tokens of each sequence."""
    _, stops = layout.stops()
    totals = np.append(0, np.cumsum(collection.sizes[layout.documents], dtype=np.int64))
    return np.diff(np.append(0, totals[stops]))


def _survey(file: SourceFile, piece_bytes: int) -> Survey:
    return survey(file, piece_bytes, lambda count: None)


def _facts(settings: Settings, exchange: Exchange) -> TokenizerFacts:
    return Worker(parts.local_settings(settings, exchange)).facts()


def _idle() -> None:
    pass
