"""The prepare stage, from the job's data to `<work>/prepared`: one pass that tokenises, one that packs.

Rows are read once and go through the workers; their tokens lie on disk until it is known which rows repeat others, then
they are gathered into packed sequences. All is written to a folder beside `prepared` that takes its name when it is
complete, so a killed run leaves nothing that counts.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from finetune_api.errors import DataError, SpecError, StorageError
from finetune_api.run import PREPARED, RunConfig
from finetune_trainer import storage
from finetune_trainer.manifest import (
    REPORT_FILE,
    Manifest,
    SourceFacts,
    Split,
    SplitFacts,
    Splits,
    read_manifest,
    write_json,
    write_manifest,
)
from finetune_trainer.prepare.collect import Collection
from finetune_trainer.prepare.pack import pack
from finetune_trainer.prepare.pool import Pool
from finetune_trainer.prepare.read import chunks
from finetune_trainer.prepare.refusals import built_in_rows
from finetune_trainer.prepare.repositories import join_pairs, join_repositories
from finetune_trainer.prepare.rows import FORMATS, normalised
from finetune_trainer.prepare.select import select_documents
from finetune_trainer.prepare.shards import ShardWriter
from finetune_trainer.prepare.sources import (
    SourceFile,
    check_unchanged,
    find_files,
    fingerprint,
    preparation_key,
    refuse_unavailable,
)
from finetune_trainer.prepare.work import Result, Settings, Task, first_format
from finetune_trainer.sampling import permutation
from finetune_trainer.tokenizer import check_model_folder, tokenizer_sha256

Progress = Callable[[float, float, str], None]  # done, total, what is being done

_BYTES_A_WORKER: Final = 4 << 20  # a smaller share is done before a process has started
_PROGRESS_SEQUENCES: Final = 1024


def _silent(done: float, total: float, what: str) -> None:
    pass


def prepare(run: RunConfig, progress: Progress = _silent, workers: int | None = None) -> Manifest:
    """Makes `<work>/prepared`, or returns at once when it is there already for the same data, model and settings.

    `workers` is the number of processes that tokenise, by default one for each core; 0 tokenises in this process.
    `progress` may raise a FinetuneError, to stop.

    Raises:
        SpecError: the job asks for what is not there yet, or for data outside of its folder.
        DataError: rows that cannot be used, with file, line and field; the first 20 of them.
        ModelError: the model's folder is not whole or has no chat template for chats.
        StorageError: data cannot be read, or the work folder not written.
    """
    refuse_unavailable(run.spec)
    model = Path(run.model_path)
    _check_positions(run, check_model_folder(model))
    files = find_files(run)
    if run.spec.data.refusals.mix > 0:
        files.append(built_in_rows())  # last: of two rows that are alike the earlier stays
    hashes = _fingerprints(files, progress)
    key = preparation_key(run.spec, list(zip(files, hashes, strict=True)), tokenizer_sha256(model))
    work = storage.resolve(run.work, run.base_dir, where="work").local
    if work is None:
        raise SpecError("the work folder must be on a disk", where=run.work, hint="give a local folder")
    prepared = work / PREPARED
    if (ready := _ready(prepared, key)) is not None:
        return ready
    partial = prepared.with_name(PREPARED + ".partial")
    with storage.explained(str(partial)):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            manifest = _write(run, partial, files, hashes, key, progress, workers)
            shutil.rmtree(prepared, ignore_errors=True)
            partial.rename(prepared)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return manifest


def _write(
    run: RunConfig,
    folder: Path,
    files: list[SourceFile],
    hashes: list[str],
    key: str,
    progress: Progress,
    workers: int | None,
) -> Manifest:
    """Everything that belongs into the prepared folder, the manifest last."""
    data = run.spec.data
    spill = folder / "spill"
    collection = Collection(spill, files)
    try:
        with Pool(_settings(run), _workers(files) if workers is None else workers) as pool:
            tokenizer = pool.facts()
            collection.gather(_reported(pool.map(_tasks(files)), files, progress))
        check_unchanged(files)
        documents = select_documents(
            collection, files, data, lambda done, total: progress(done, total, "find duplicates")
        )
        if not len(documents["train"]):
            raise DataError(
                "no row is left to train on",
                where="spec.data.train",
                hint="all rows were dropped as duplicates, as too long, or by the source's weight; see spec.data",
            )
        splits = {
            split: _write_split(folder, split, collection, chosen, data.sequence_length, data.packing, progress)
            for split, chosen in documents.items()
        }
    finally:
        collection.close()
        shutil.rmtree(spill)
    manifest = Manifest(
        key=key,
        sequence_length=data.sequence_length,
        packing=data.packing,
        tokenizer=tokenizer,
        sources=[
            SourceFacts(uri=file.uri, format=row_format, rows=tally.rows, bytes=file.stored.size, sha256=sha)
            for file, row_format, tally, sha in zip(
                files, collection.formats, collection.report.files, hashes, strict=True
            )
        ],
        splits=Splits(train=splits["train"], evaluation=splits["evaluation"]),
    )
    write_json(folder / REPORT_FILE, collection.report.as_json(splits))
    write_manifest(folder, manifest)
    return manifest


def _write_split(
    folder: Path,
    split: Split,
    collection: Collection,
    documents: npt.NDArray[np.int64],
    capacity: int,
    packing: bool,
    progress: Progress,
) -> SplitFacts:
    """Packs the documents and writes the split's shards."""
    writer = ShardWriter(folder, split)
    pairs = collection.report.pairs
    documents, counts = join_pairs(documents) if pairs else join_repositories(collection, documents, capacity)
    starts = np.cumsum(counts) - counts
    if packing:
        # Documents of one length fill a sequence in the order they come: without this they would all be of one source,
        # and what a step learns from would not be the mixture.
        order = permutation(0, 0, len(counts))
        starts, counts = starts[order], counts[order]
    ends = starts + counts
    totals = np.cumsum(np.append(0, collection.sizes[documents]), dtype=np.int64)
    sizes = (totals[ends] - totals[starts]).astype(np.int32)
    sequence = pack(sizes, capacity) if packing else np.arange(len(sizes))
    order = np.argsort(sequence, kind="stable")
    stops = np.cumsum(np.bincount(sequence)) if len(sequence) else np.zeros(0, np.int64)
    start = 0
    for number, stop in enumerate(stops.tolist()):
        members = order[start:stop]
        joined = [documents[starts[member] : ends[member]].tolist() for member in members.tolist()]
        parts = [collection.document(index) for indices in joined for index in indices]
        lengths = np.array([len(ids) for ids, _ in parts], np.int32) if pairs else sizes[members]
        writer.add(
            np.concatenate([ids for ids, _ in parts]), np.concatenate([weights for _, weights in parts]), lengths
        )
        start = stop
        if number % _PROGRESS_SEQUENCES == 0:
            progress(number, len(stops), f"pack {split}")
    return writer.close()


def _tasks(files: list[SourceFile]) -> Iterator[Task]:
    for index, file in enumerate(files):
        asked = file.source.format
        row_format = next((name for name in FORMATS if name == asked), None)
        for chunk in chunks(file):
            if row_format is None:
                row_format = first_format(chunk, file.source.columns)
            yield Task(
                file=index,
                chunk=chunk,
                format=row_format,
                given=asked != "auto",
                columns=file.source.columns,
                train=file.split == "train",
                code=file.source.code,
                built_in=file.built_in,
            )


def _reported(results: Iterator[Result], files: list[SourceFile], progress: Progress) -> Iterator[Result]:
    """Passes the results on and reports how much of the files is done."""
    before = np.cumsum([0, *(file.stored.size for file in files)]).tolist()
    for result in results:
        yield result
        progress(before[result.file] + result.read, before[-1], "tokenise")


def _fingerprints(files: list[SourceFile], progress: Progress) -> list[str]:
    total = sum(file.stored.size for file in files)
    read = 0

    def done(count: int) -> None:
        nonlocal read
        read += count
        progress(read, total, "read")

    return [fingerprint(file, done) for file in files]


def _settings(run: RunConfig) -> Settings:
    spec = run.spec
    return Settings(
        model=Path(run.model_path),
        loss="all" if spec.method.objective == "pretrain" else spec.data.loss,
        sequence_length=spec.data.sequence_length,
        overlong=spec.data.overlong,
        near_duplicates=spec.data.deduplicate == "near",
        fim=spec.data.fim,
        rag=spec.data.rag,
        seed=spec.training.seed,
        held_out={
            normalised(prompt.prompt): index for index, prompt in enumerate(spec.evaluation.prompts) if prompt.held_out
        },
        pairs=spec.method.objective == "dpo",
    )


def _workers(files: list[SourceFile]) -> int:
    """One process for each core this process may use, or fewer for little data."""
    share = sum(file.stored.size for file in files) // _BYTES_A_WORKER
    return max(1, min(_cores(), share))


def _cores() -> int:
    """Cores that this process may use: of a container's limit, too, which the scheduler's affinity does not show."""
    cores = len(os.sched_getaffinity(0))
    limit = Path("/sys/fs/cgroup/cpu.max")
    quota, _, period = limit.read_text().partition(" ") if limit.is_file() else ("max", "", "")
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))


def _ready(prepared: Path, key: str) -> Manifest | None:
    """The manifest that is there, if it has this key and its shards are whole."""
    try:
        manifest = read_manifest(prepared)
    except StorageError:
        return None
    shards = [shard for split in (manifest.splits.train, manifest.splits.evaluation) for shard in split.shards]
    whole = all((prepared / s.file).is_file() and (prepared / s.file).stat().st_size == s.bytes for s in shards)
    return manifest if manifest.key == key and whole else None


def _check_positions(run: RunConfig, config: dict[str, Any]) -> None:
    most = config.get("max_position_embeddings")
    if isinstance(most, int) and run.spec.data.sequence_length > most:
        raise SpecError(
            f"{run.spec.data.sequence_length} is more than the {most} positions of the model",
            where="spec.data.sequenceLength",
            hint=f"use at most {most}, or a model with a longer context",
        )
