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
from finetune_trainer.prepare.code import language_of, wanted_language
from finetune_trainer.reading import Reading

KINDS: Final = (".jsonl", ".parquet", ".csv")
CODECS: Final = {".gz": "gzip", ".zst": "zstd"}
TREE: Final = "tree"
BUILT_IN: Final = "builtin://refusals"
LARGEST_ROW: Final = 4 << 20  # about a million tokens, for which a tokenizer takes 0.8 GiB
_HIDDEN_CODE: Final = (".",)  # such as .git; names that begin with _ are as good as others there
_HASH_BYTES: Final = 1 << 22


@dataclass(frozen=True)
class SourceFile:
    """One file of rows: where, of which kind (.jsonl, .parquet, .csv), how compressed, and for which split.

    Of kind TREE it is a folder of source code: its `members` are the rows, numbered from 1.
    """

    stored: storage.StoredFile
    kind: str
    codec: str | None
    split: Split
    source: DataSource
    members: tuple[storage.StoredFile, ...] = ()
    left_out: int = 0  # other files of the folder: no code, of languages not asked for, or larger than a row may be

    @property
    def uri(self) -> str:
        return self.stored.location.uri

    @property
    def built_in(self) -> bool:
        """Rows of ours, which give way to the job's."""
        return self.source.uri == BUILT_IN

    def name(self, member: storage.StoredFile) -> str:
        """A member's path inside of the folder."""
        whole, root = member.location.path, self.stored.location.path.rstrip("/") + "/"
        return whole.removeprefix(root) if whole.startswith(root) else Path(whole).name

    def position(self, row: int) -> str:
        """Where a row stands, for people: file:line, or the file."""
        return self.members[row - 1].location.uri if self.members else f"{self.uri}:{row}"


def refuse_unavailable(spec: FinetuneJobSpec) -> None:
    """Stops at what the contract names and this version does not do yet.

    Raises:
        SpecError: naming the field.
    """
    for index, source in enumerate(spec.data.evaluation):
        if source.weight != 1:
            raise SpecError(
                "evaluation rows are each seen once",
                where=f"spec.data.evaluation[{index}].weight",
                hint="remove the weight",
            )


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
        found = storage.list_files(location)
        tree = source.format == "code" and not all(_kind(stored)[0] in KINDS for stored in found)
        if tree:
            found = storage.list_files(location, _HIDDEN_CODE)
        if "://" not in source.uri and not Path(source.uri).is_absolute():
            for stored in found:  # a link inside the folder may lead out of it
                storage.within(Path(run.base_dir), stored.location.uri, where=f"{path}.uri")
        if tree:
            files.append(_tree(location, found, split, source))
        else:
            files.extend(_source_file(stored, split, source) for stored in found)
    return files


def fingerprint(file: SourceFile, done: Callable[[int], None], look: Callable[[bytes], None] | None = None) -> str:
    """sha256 of the file as it is stored, of a tree with its members' names.

    `done` gets each block's size, and `look`, if there is one, the blocks.

    Raises:
        StorageError: the file cannot be read, or is not of the size that was listed.
    """
    digest = hashlib.sha256()
    for stored in file.members or (file.stored,):
        if file.members:
            digest.update(f"{file.name(stored)} {stored.size}\n".encode())
        total = 0
        location = stored.location
        with storage.explained(location.uri), Reading(location) as stream:
            while block := stream.read(_HASH_BYTES):
                digest.update(block)
                total += len(block)
                done(len(block))
                if look is not None:
                    look(block)
        if total != stored.size:
            raise _changed(location.uri)
    return digest.hexdigest()


def check_unchanged(files: Sequence[SourceFile]) -> None:
    """Compares each file's size and time with those it had when it was found.

    Raises:
        StorageError: one changed.
    """
    for file in files:
        listed = storage.list_files(file.stored.location, *([_HIDDEN_CODE] if file.members else []))
        found = {stored.location.path: stored for stored in listed}
        if any(found.get(stored.location.path) != stored for stored in file.members or (file.stored,)):
            raise _changed(file.uri)


def preparation_key(spec: FinetuneJobSpec, hashes: Sequence[tuple[SourceFile, str]], tokenizer: str) -> str:
    """Hash over all that the shards depend on; not on where the files lie."""
    data = spec.data.model_dump(mode="json", exclude={"train", "evaluation", "prepare"})
    rows = [
        (file.split, file.kind, file.codec, file.source.model_dump(mode="json", exclude={"uri"}), sha256)
        for file, sha256 in hashes
    ]
    held_out = [prompt.prompt for prompt in spec.evaluation.prompts if prompt.held_out]
    drawn = any(source.format in ("code", "rag", "auto") for _, source in _sources(spec))
    seed = spec.training.seed if drawn else None
    parts = [VERSION, data, rows, tokenizer, held_out, spec.method.objective, bool(spec.data.evaluation), seed]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _changed(uri: str) -> StorageError:
    return StorageError("the file changed while it was read", where=uri, hint="run again when it is complete")


def _sources(spec: FinetuneJobSpec) -> Iterator[tuple[str, DataSource]]:
    """Each source with its place in the spec. Evaluation is first: a training row that repeats it is the one to go."""
    for name, sources in (("evaluation", spec.data.evaluation), ("train", spec.data.train)):
        for index, source in enumerate(sources):
            yield f"spec.data.{name}[{index}]", source


def _kind(stored: storage.StoredFile) -> tuple[str, str | None]:
    """The ending of a file's name, and the codec named behind it."""
    name = stored.location.path.lower()
    codec = next((codec for suffix, codec in CODECS.items() if name.endswith(suffix)), None)
    return Path(name.rpartition(".")[0] if codec else name).suffix, codec


def _tree(
    location: storage.Location, found: Sequence[storage.StoredFile], split: Split, source: DataSource
) -> SourceFile:
    members = []
    for stored in found:
        language = language_of(stored.location.path)
        if language and wanted_language(language, source.code) and stored.size <= LARGEST_ROW:
            members.append(stored)
    if not members:
        raise DataError(
            "the folder holds no code in a language that is asked for",
            where=location.uri,
            hint="files are told apart by the ending of their names; see code.languages of the source",
        )
    whole = storage.StoredFile(location, sum(stored.size for stored in members), None)
    return SourceFile(whole, TREE, None, split, source, tuple(members), len(found) - len(members))


def _source_file(stored: storage.StoredFile, split: Split, source: DataSource) -> SourceFile:
    kind, codec = _kind(stored)
    if kind not in KINDS or (kind == ".parquet" and codec):
        raise DataError(
            "the file is of no kind that can be read",
            where=stored.location.uri,
            hint="use .jsonl or .csv, plain or with .gz or .zst behind it, or .parquet; leave other files out",
        )
    if stored.size == 0:
        raise DataError("the file is empty", where=stored.location.uri, hint="put rows into it, or leave it out")
    return SourceFile(stored, kind, codec, split, source)
