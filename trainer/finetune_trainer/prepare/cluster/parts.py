"""What a machine of the cluster does to one part of the rows. Each function reads and writes blobs, and keeps no state.

A part is a bundle of chunks. Its tokens and signatures stay in blobs; what is decided globally (which rows stay, where
they lie) is decided by the driver from a few numbers for each row.
"""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from finetune_api.errors import FinetuneError
from finetune_trainer.manifest import ShardFacts, Split, SplitFacts
from finetune_trainer.prepare.cluster.exchange import Exchange
from finetune_trainer.prepare.deduplicate import PERMUTATIONS, Pairs, band_keys, equal_pairs
from finetune_trainer.prepare.read import Piece
from finetune_trainer.prepare.rows import RowFormat
from finetune_trainer.prepare.shards import ShardWriter
from finetune_trainer.prepare.sources import SourceFile
from finetune_trainer.prepare.tasks import tasks
from finetune_trainer.prepare.work import Result, Settings, Task, Worker
from finetune_trainer.tokenizer import CONFIG_FILE, TOKENIZER_FILES

Numbers = npt.NDArray[np.int64]

_READS: Final = 8  # ranges that are read at a time: a bucket answers late but many at once
_TOKEN_BYTES: Final = 6  # an id and a weight
_TOKENIZER: Final = "tokenizer"
_KEY: Final = np.dtype([("key", "<u8"), ("row", "<i8"), ("band", "u1")])


@dataclass(frozen=True)
class Bundle:
    """Some chunks of a piece in turn; `error` is what ends the file behind them."""

    name: str
    tasks: list[Task]
    error: FinetuneError | None = None


@dataclass(frozen=True)
class Part:
    """What became of a bundle: its results without tokens and signatures, which lie in blobs of its name."""

    name: str
    results: list[Result]
    error: FinetuneError | None


@dataclass(frozen=True)
class Extent:
    """Bytes [start, stop) of a blob."""

    name: str
    start: int
    stop: int


def bundles(
    name: str, index: int, file: SourceFile, piece: Piece, known: RowFormat | None, chunks: int
) -> Iterator[Bundle]:
    """The bundles of a piece of a file, of so many chunks each."""
    done: list[Task] = []
    number = 0
    try:
        for task in tasks(index, file, piece, known):
            done.append(task)
            if len(done) == chunks:
                yield Bundle(f"{name}-{number:05d}", done)
                done, number = [], number + 1
    except FinetuneError as error:
        yield Bundle(f"{name}-{number:05d}", done, error)
        return
    if done:
        yield Bundle(f"{name}-{number:05d}", done)


def leave_tokenizer(folder: Path, exchange: Exchange) -> None:
    """Leaves the tokenizer's files for machines that do not see the model's folder."""
    files = (folder / name for name in (CONFIG_FILE, *TOKENIZER_FILES))
    found = {file.name: file.read_bytes() for file in files if file.is_file()}
    exchange.write(_TOKENIZER, [memoryview(pickle.dumps(found))])


def local_settings(settings: Settings, exchange: Exchange) -> Settings:
    """The settings with a folder that has the tokenizer's files on this machine."""
    if settings.model.is_dir():
        return settings
    folder = Path(tempfile.mkdtemp(prefix="tokenizer-"))
    for name, content in pickle.loads(exchange.read(_TOKENIZER)).items():
        (folder / name).write_bytes(content)
    return replace(settings, model=folder)


def tokenise(worker: Worker, bundle: Bundle, exchange: Exchange) -> Part:
    """Turns a bundle into blobs of tokens and signatures, and the rest."""
    results, error = [], bundle.error
    for task in bundle.tasks:
        try:
            results.append(worker(task))
        except FinetuneError as raised:
            error = raised
            break
    exchange.write(f"tokens-{bundle.name}", [*(r.ids for r in results), *(r.weights for r in results)])
    if any(len(result.minima) for result in results):
        exchange.write(f"minima-{bundle.name}", [result.minima for result in results])
    return Part(bundle.name, [_without_arrays(result) for result in results], error)


def write_keys(
    name: str, first: int, unique: npt.NDArray[np.bool_], size: int, partitions: int, exchange: Exchange
) -> Numbers:
    """Writes the keys of each band of a part's signatures, without rows that repeat another exactly.

    Args:
        first: number of the part's first row.
        unique: bool [rows of the part].
        size: minima in a band.
        partitions: how many parts the keys' values are divided into.

    Returns:
        Where each partition's keys end in the blob, in bytes.
    """
    rows = np.flatnonzero(unique)
    keys = band_keys(_minima(name, exchange)[rows], size)
    bands = keys.shape[1]
    found = np.zeros(keys.size, dtype=_KEY)
    found["key"] = keys.reshape(-1)
    found["row"] = np.repeat(rows + first, bands)
    found["band"] = np.tile(np.arange(bands, dtype=np.uint8), len(rows))
    partition = (found["key"] % np.uint64(partitions)).astype(np.int64)
    found = found[np.argsort(partition, kind="stable")]  # by row in each partition
    exchange.write(f"keys-{name}", [memoryview(found.tobytes())])
    return np.cumsum(np.bincount(partition, minlength=partitions)) * _KEY.itemsize


def pairs_of(extents: Sequence[Extent], exchange: Exchange) -> Pairs:
    """Pairs (first row, later row) that agree in a band, among the keys of one partition, from parts in order."""
    found = np.concatenate([np.zeros(0, _KEY), *(np.frombuffer(data, _KEY) for data in _read(extents, exchange))])
    pairs = []
    for band in np.unique(found["band"]):
        keys = found[found["band"] == band]
        pairs.append(equal_pairs(keys["key"], keys["row"]))
    nothing = np.zeros(0, np.int64)
    return np.concatenate([nothing, *(p[0] for p in pairs)]), np.concatenate([nothing, *(p[1] for p in pairs)])


def minima_of(name: str, rows: Numbers, exchange: Exchange) -> npt.NDArray[np.uint32]:
    """Signatures of some of a part's rows."""
    return _minima(name, exchange)[rows]


def scatter(
    name: str, split: Split, sizes: npt.NDArray[np.int32], documents: Numbers, shards: Numbers, exchange: Exchange
) -> Numbers:
    """Writes a part's documents again, in the order of the shards that they come to lie in.

    Args:
        sizes: tokens of each of the part's documents.
        documents: which of them are wanted, in the order of the split.
        shards: the shard of each.

    Returns:
        int64 [n, 3]: each shard that gets some, and the bytes [start, stop) of the blob that are for it.
    """
    data, tokens = exchange.read(f"tokens-{name}"), int(sizes.sum())
    ids, weights = np.frombuffer(data, np.int32, tokens), np.frombuffer(data, np.float16, tokens, 4 * tokens)
    ends = np.cumsum(sizes, dtype=np.int64)
    begins = ends - sizes
    found: list[npt.NDArray[np.generic]] = []
    places, start = [], 0
    for shard, chosen in _grouped(shards, documents):
        slices = [slice(begins[document], ends[document]) for document in chosen.tolist()]
        found += [np.concatenate([ids[each] for each in slices]), np.concatenate([weights[each] for each in slices])]
        stop = start + _TOKEN_BYTES * int(sizes[chosen].sum())
        places.append((shard, start, stop))
        start = stop
    exchange.write(f"{split}-{name}", found)
    return np.array(places, dtype=np.int64).reshape(-1, 3)


@dataclass(frozen=True)
class Shard:
    """One shard to write: where its documents' tokens lie, and how they make sequences.

    extents: of the parts that have some, in order; part: int32 [M], each document's place among these; sizes: int32
    [M], its tokens; groups and sequences as in `Layout`.
    """

    split: Split
    number: int
    extents: list[Extent]
    part: npt.NDArray[np.int32]
    sizes: npt.NDArray[np.int32]
    groups: Numbers
    sequences: Numbers


def write_shard(shard: Shard, exchange: Exchange, target: Exchange) -> tuple[SplitFacts, list[float]]:
    """Writes a shard into `target`; returns its facts, and the sum of the weights of each record batch."""
    ids, weights = [], []
    for data in _read(shard.extents, exchange):
        tokens = len(data) // _TOKEN_BYTES
        ids.append(np.frombuffer(data, np.int32, tokens))
        weights.append(np.frombuffer(data, np.float16, tokens, 4 * tokens))
    all_ids, all_weights = np.concatenate(ids), np.concatenate(weights)
    order = np.argsort(shard.part, kind="stable")  # as they lie: by part, then in the order of the split
    ends = np.empty(len(order), np.int64)
    ends[order] = np.cumsum(shard.sizes[order], dtype=np.int64)
    spans = [slice(end - size, end) for end, size in zip(ends.tolist(), shard.sizes.tolist(), strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        writer = ShardWriter(Path(folder), shard.split, shard.number)
        group = document = 0
        for count in shard.sequences.tolist():
            members = shard.groups[group : group + count]
            group += count
            own = spans[document : document + int(members.sum())]
            sizes = shard.sizes[document : document + len(own)]
            document += len(own)
            writer.add(
                np.concatenate([all_ids[span] for span in own]),
                np.concatenate([all_weights[span] for span in own]),
                np.add.reduceat(sizes, np.cumsum(members) - members, dtype=np.int32),
            )
        facts = writer.close()
        only: ShardFacts = facts.shards[0]
        target.put(Path(folder) / only.file)
    return facts, writer.targets


def _without_arrays(result: Result) -> Result:
    ids, weights, minima = np.zeros(0, np.int32), np.zeros(0, np.float16), np.zeros((0, PERMUTATIONS), np.uint32)
    return replace(result, ids=ids, weights=weights, minima=minima)


def _grouped(groups: Numbers, values: Numbers) -> Iterator[tuple[int, Numbers]]:
    """Values in turn of each group; groups ascend."""
    if len(groups):
        starts = np.flatnonzero(np.append(True, groups[1:] != groups[:-1]))
        yield from zip(groups[starts].tolist(), np.split(values, starts[1:]), strict=True)


def _minima(name: str, exchange: Exchange) -> npt.NDArray[np.uint32]:
    return np.frombuffer(exchange.read(f"minima-{name}"), np.uint32).reshape(-1, PERMUTATIONS)


def _read(extents: Sequence[Extent], exchange: Exchange) -> Iterator[memoryview]:
    """The extents' bytes, in order."""
    with ThreadPoolExecutor(_READS) as threads:
        for first in range(0, len(extents), _READS):  # no more of them in memory
            some = extents[first : first + _READS]
            yield from threads.map(lambda extent: exchange.read(extent.name, extent.start, extent.stop), some)
