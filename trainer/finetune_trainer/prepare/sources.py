"""Finds the files of a job's data sources, and says what cannot be prepared before anything is read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from finetune_api.errors import DataError, SpecError, StorageError
from finetune_api.job import DataSource, FinetuneJobSpec
from finetune_api.run import RunConfig
from finetune_trainer import storage
from finetune_trainer.manifest import VERSION, Split

KINDS: Final = (".jsonl", ".parquet", ".csv")
CODECS: Final = {".gz": "gzip", ".zst": "zstd"}
_HASH_BYTES: Final = 1 << 22
_FORMATS: Final = ("auto", "chat", "completion", "text")


@dataclass(frozen=True)
class SourceFile:
    """One file of rows: where, of which kind (.jsonl, .parquet, .csv), how compressed, and for which split."""

    stored: storage.StoredFile
    kind: str
    codec: str | None
    split: Split
    source: DataSource

    @property
    def uri(self) -> str:
        return self.stored.location.uri


def refuse_unavailable(spec: FinetuneJobSpec) -> None:
    """Stops at what the contract names and this version does not do yet.

    Raises:
        SpecError: naming the field.
    """
    for path, source in _sources(spec):
        if source.format not in _FORMATS:
            raise SpecError(
                f"the format {source.format} is not available yet",
                where=f"{path}.format",
                hint=f"use one of {', '.join(_FORMATS)}",
            )
    for index, source in enumerate(spec.data.evaluation):
        if source.weight != 1:
            raise SpecError(
                "evaluation rows are each seen once",
                where=f"spec.data.evaluation[{index}].weight",
                hint="remove the weight",
            )
    refusal_gates = any(gate.metric in ("refusalRate", "overRefusalRate") for gate in spec.evaluation.gates)
    for asked, what, where, hint in (
        (spec.data.refusals.mix > 0, "built-in refusal rows are", "data.refusals.mix", "set it to 0"),
        (spec.method.objective == "dpo", "dpo is", "method.objective", "use sft or pretrain"),
        (spec.deepspeed.sequence_parallel > 1, "sharing a sequence is", "deepspeed.sequenceParallel", "set it to 1"),
        (spec.evaluation.refusal_suite, "the refusal suite is", "evaluation.refusalSuite", "set it to false"),
        (refusal_gates, "gates on refusals are", "evaluation.gates", "use promptsPassed with prompts of your own"),
    ):
        if asked:
            raise SpecError(f"{what} not available yet", where=f"spec.{where}", hint=hint)


def find_files(run: RunConfig) -> list[SourceFile]:
    """Every file of every source: evaluation before train, then in the order of the spec, a folder's files by name.

    Raises:
        SpecError: a relative path leaves the job's folder.
        StorageError: a source is not there.
        DataError: a file is of no kind that can be read.
    """
    files = []
    for path, source in _sources(run.spec):
        split: Split = "evaluation" if path.startswith("spec.data.evaluation") else "train"
        location = storage.resolve(source.uri, run.base_dir, where=f"{path}.uri")
        for stored in storage.list_files(location):
            if "://" not in source.uri and not Path(source.uri).is_absolute():
                # A link inside the folder may lead out of it.
                storage.within(Path(run.base_dir), stored.location.uri, where=f"{path}.uri")
            files.append(_source_file(stored, split, source))
    return files


def fingerprint(file: SourceFile, done: Callable[[int], None]) -> str:
    """sha256 of the file as it is stored; `done` gets the number of bytes of each block.

    Raises:
        StorageError: the file cannot be read, or is not of the size that was listed.
    """
    digest = hashlib.sha256()
    total = 0
    location = file.stored.location
    with storage.explained(file.uri), location.fs.open_input_stream(location.path, compression=None) as stream:
        while block := stream.read(_HASH_BYTES):
            digest.update(block)
            total += len(block)
            done(len(block))
    if total != file.stored.size:
        raise _changed(file)
    return digest.hexdigest()


def check_unchanged(files: Sequence[SourceFile]) -> None:
    """Compares each file's size and time with those it had when it was found.

    Raises:
        StorageError: one changed.
    """
    for file in files:
        location = file.stored.location
        if storage.list_files(location) != [file.stored]:
            raise _changed(file)


def preparation_key(spec: FinetuneJobSpec, hashes: Sequence[tuple[SourceFile, str]], tokenizer: str) -> str:
    """Hash over all that the shards depend on; not on where the files lie."""
    data = spec.data.model_dump(mode="json", exclude={"train", "evaluation"})
    rows = [
        (file.split, file.kind, file.codec, file.source.model_dump(mode="json", exclude={"uri"}), sha256)
        for file, sha256 in hashes
    ]
    held_out = [prompt.prompt for prompt in spec.evaluation.prompts if prompt.held_out]
    parts = [VERSION, data, rows, tokenizer, held_out, spec.method.objective, bool(spec.data.evaluation)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _changed(file: SourceFile) -> StorageError:
    return StorageError("the file changed while it was read", where=file.uri, hint="run again when it is complete")


def _sources(spec: FinetuneJobSpec) -> Iterator[tuple[str, DataSource]]:
    """Each source with its place in the spec. Evaluation is first: a training row that repeats it is the one to go."""
    for name, sources in (("evaluation", spec.data.evaluation), ("train", spec.data.train)):
        for index, source in enumerate(sources):
            yield f"spec.data.{name}[{index}]", source


def _source_file(stored: storage.StoredFile, split: Split, source: DataSource) -> SourceFile:
    name = stored.location.path.lower()
    codec = next((codec for suffix, codec in CODECS.items() if name.endswith(suffix)), None)
    kind = Path(name.rpartition(".")[0] if codec else name).suffix
    if kind not in KINDS or (kind == ".parquet" and codec):
        raise DataError(
            "the file is of no kind that can be read",
            where=stored.location.uri,
            hint="use .jsonl or .csv, plain or with .gz or .zst behind it, or .parquet; leave other files out",
        )
    if stored.size == 0:
        raise DataError("the file is empty", where=stored.location.uri, hint="put rows into it, or leave it out")
    return SourceFile(stored, kind, codec, split, source)
