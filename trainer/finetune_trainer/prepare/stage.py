"""The prepare stage, from the job's data to `<work>/prepared`: one pass that tokenises, one that packs.

Rows are read once and go through the workers; their tokens lie on disk until it is known which rows repeat others, then
they are gathered into packed sequences. All is written to a folder beside `prepared` that takes its name when it is
complete, so a killed run leaves nothing that counts.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from finetune_api.errors import DataError, SpecError, StorageError
from finetune_api.run import PREPARED, RunConfig
from finetune_trainer import storage
from finetune_trainer.manifest import (
    REPORT_FILE,
    Manifest,
    SourceFacts,
    Splits,
    read_manifest,
    write_json,
    write_manifest,
)
from finetune_trainer.prepare.cluster.opening import Opener, ray_machine
from finetune_trainer.prepare.collect import Collection
from finetune_trainer.prepare.layout import lay_out
from finetune_trainer.prepare.machine import Machine, Progress, ThisMachine, processes
from finetune_trainer.prepare.pool import Pool
from finetune_trainer.prepare.refusals import built_in_rows
from finetune_trainer.prepare.rows import normalised
from finetune_trainer.prepare.select import select_documents
from finetune_trainer.prepare.sources import (
    SourceFile,
    check_unchanged,
    find_files,
    preparation_key,
    refuse_unavailable,
)
from finetune_trainer.prepare.work import Settings
from finetune_trainer.tokenizer import check_model_folder, tokenizer_sha256

_SPILL: Final = "spill"


def _silent(done: float, total: float, what: str) -> None:
    pass


def prepare(
    run: RunConfig, progress: Progress = _silent, workers: int | None = None, opener: Opener | None = None
) -> Manifest:
    """Makes `<work>/prepared`, or returns at once when it is there already for the same data, model and settings.

    Args:
        run: the run.
        progress: is told how far it is; may raise a FinetuneError, to stop.
        workers: processes that tokenise, by default one for each core; 0 tokenises in this process.
        opener: opens the machine that works; by default processes of this one, or Ray where the spec asks for it.

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
    work = storage.resolve(run.work, run.base_dir, where="work").local
    if work is None:
        raise SpecError("the work folder must be on a disk", where=run.work, hint="give a local folder")
    prepared, partial = work / PREPARED, work / f"{PREPARED}.partial"
    opener = opener or _opener(run, files, workers)
    try:
        with opener(worker_settings(run), partial, partial / _SPILL) as machine:
            return _prepare(run, files, prepared, partial, machine, progress)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # after the machine's end: it may have been writing still


def _opener(run: RunConfig, files: list[SourceFile], workers: int | None) -> Opener:
    machines = run.spec.data.prepare.workers or 1
    if machines > 1 and workers is None:
        return functools.partial(ray_machine, workers=machines)
    return functools.partial(_this_machine, workers=processes(files) if workers is None else workers)


@contextmanager
def _this_machine(settings: Settings, partial: Path, spill: Path, workers: int) -> Iterator[Machine]:
    with Pool(settings, workers) as pool:
        yield ThisMachine(pool)


def _prepare(
    run: RunConfig, files: list[SourceFile], prepared: Path, partial: Path, machine: Machine, progress: Progress
) -> Manifest:
    hashes = machine.fingerprints(files, progress)
    key = preparation_key(run.spec, list(zip(files, hashes, strict=True)), tokenizer_sha256(Path(run.model_path)))
    if (ready := _ready(prepared, key)) is not None:
        return ready
    with storage.explained(str(partial)):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        manifest = _write(run, partial, files, hashes, key, machine, progress)
        shutil.rmtree(prepared, ignore_errors=True)
        partial.rename(prepared)
    return manifest


def _write(
    run: RunConfig,
    folder: Path,
    files: list[SourceFile],
    hashes: list[str],
    key: str,
    machine: Machine,
    progress: Progress,
) -> Manifest:
    """Everything that belongs into the prepared folder, the manifest last."""
    data = run.spec.data
    spill = folder / _SPILL
    collection = Collection(spill, files)
    try:
        tokenizer = machine.facts()
        collection.gather(machine.results(files, progress))
        check_unchanged(files)
        documents = select_documents(
            collection,
            files,
            data,
            machine.signatures(collection),
            lambda done, total: progress(done, total, "find duplicates"),
        )
        if not len(documents["train"]):
            raise DataError(
                "no row is left to train on",
                where="spec.data.train",
                hint="all rows were dropped as duplicates, as too long, or by the source's weight; see spec.data",
            )
        splits = {
            split: machine.write_split(
                folder, split, collection, lay_out(collection, chosen, data.sequence_length, data.packing), progress
            )
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


def worker_settings(run: RunConfig) -> Settings:
    """What a worker needs to know of the job."""
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
