"""Which checkpoints there are, on a disk or in a bucket. A folder is one only when its marker says so.

The marker is written last. It lists every shard with size and SHA-256, and carries its own.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, TypedDict

import pyarrow.fs as pafs

from finetune_api.errors import StorageError
from finetune_api.run import checkpoint_name
from finetune_trainer import storage
from finetune_trainer.storage import Location

MARKER: Final = "complete.json"
_VERSION: Final = 1


class File(TypedDict):
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint, as its marker describes it."""

    step: int  # finished optimizer steps
    world_size: int  # workers that wrote it
    identity: dict[str, Any]  # what must be the same to go on from here: data, seed, global batch, parameters
    files: dict[str, File]  # by name in the folder

    @property
    def name(self) -> str:
        return checkpoint_name(self.step)

    @property
    def bytes(self) -> int:
        return sum(file["bytes"] for file in self.files.values())


@dataclass(frozen=True)
class Broken:
    """A folder whose marker is no marker."""

    name: str
    why: str


class Catalog:
    """The checkpoints below one folder or prefix."""

    def __init__(self, root: Location) -> None:
        self.root = root

    def folder(self, name: str) -> Location:
        return self.root.inside(name)

    def names(self) -> list[str]:
        """Every checkpoint folder, whether complete or not.

        Raises:
            StorageError: the storage does not answer.
        """
        # Recursively: of GCS pyarrow lists files, but no folders.
        selector = pafs.FileSelector(self.root.path, allow_not_found=True, recursive=True)
        with storage.explained(self.root.uri):
            below = self.root.fs.get_file_info(selector)
        folders = (i.path if i.type == pafs.FileType.Directory else i.path.rpartition("/")[0] for i in below)
        names = {folder.removeprefix(self.root.path).strip("/").partition("/")[0] for folder in folders}
        return sorted(name for name in names if name.startswith("step-"))

    def complete(self) -> tuple[list[Checkpoint], list[Broken]]:
        """Checkpoints with a good marker, newest first, and folders with a broken one.

        Raises:
            StorageError: the storage does not answer.
        """
        found: list[Checkpoint] = []
        broken: list[Broken] = []
        for name in self.names():
            text = storage.read_bytes(self.folder(name).inside(MARKER))
            if text is None:
                continue
            try:
                checkpoint = _parsed(text)
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                broken.append(Broken(name, f"{MARKER} is damaged ({error})"))
                continue
            if checkpoint.name != name:
                broken.append(Broken(name, f"{MARKER} belongs to {checkpoint.name}"))
            else:
                found.append(checkpoint)
        return sorted(found, key=lambda c: c.step, reverse=True), broken

    def complete_with(self, checkpoint: Checkpoint) -> None:
        """Writes the marker: from here on the checkpoint exists.

        Raises:
            StorageError: it cannot be written, or does not read back as written.
        """
        content = asdict(checkpoint) | {"version": _VERSION}
        text = json.dumps(content | {"sha256": _digest(content)}, indent=1).encode()
        marker = self.folder(checkpoint.name).inside(MARKER)
        with storage.explained(marker.uri):
            if marker.local is not None:
                _write_synced(marker.local, text)
            else:
                with marker.fs.open_output_stream(marker.path) as stream:
                    stream.write(text)
        if storage.read_bytes(marker) != text:
            raise StorageError("the checkpoint's marker does not read back as written", where=marker.uri)

    def remove(self, name: str) -> None:
        """Deletes a checkpoint, its marker first: half of one is none.

        Raises:
            StorageError: it cannot be deleted.
        """
        storage.remove_file(self.folder(name).inside(MARKER))
        storage.remove_folder(self.folder(name))

    def prune(self, keep: int) -> None:
        """Deletes all but the newest `keep` complete checkpoints, and what unfinished ones left before the newest.

        Raises:
            StorageError: the storage does not answer or refuses.
        """
        newest_first, _ = self.complete()
        if not newest_first:
            return
        kept = {checkpoint.name for checkpoint in newest_first[:keep]}
        for name in self.names():
            if name not in kept and name < newest_first[0].name:
                self.remove(name)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _parsed(text: bytes) -> Checkpoint:
    content = json.loads(text)
    stated = content.pop("sha256")
    if stated != _digest(content):
        raise ValueError("its SHA-256 is another")
    if content.pop("version") != _VERSION:
        raise ValueError("it has another version")
    return Checkpoint(**content)


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _write_synced(path: Path, text: bytes) -> None:
    unnamed = path.with_name(f".{path.name}.partial")
    with unnamed.open("wb") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    unnamed.replace(path)
    for folder in (path.parent, path.parent.parent):
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
