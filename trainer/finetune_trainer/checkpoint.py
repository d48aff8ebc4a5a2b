"""Checkpoints to resume from. A folder is one only when its marker says so; the marker is written last."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypedDict

from finetune_api.errors import TrainingError
from finetune_api.run import checkpoint_name
from finetune_trainer.distributed import World

MARKER: Final = "complete.json"
_BLOCK: Final = 1 << 22


class File(TypedDict):
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint, as its marker describes it."""

    folder: Path
    step: int  # finished optimizer steps
    world_size: int  # workers that wrote it
    identity: dict[str, Any]  # what must be the same to go on from here: data, seed, global batch
    files: dict[str, File]  # by path in the folder

    @property
    def bytes(self) -> int:
        return sum(file["bytes"] for file in self.files.values())


def complete(folder: Path) -> Iterator[Checkpoint]:
    """Checkpoints in `folder` with a marker and every file in its full size, newest first."""
    for marker in sorted(folder.glob(f"step-*/{MARKER}"), reverse=True):
        try:
            found = Checkpoint(folder=marker.parent, **json.loads(marker.read_text(encoding="utf-8")))
        except (ValueError, TypeError):
            continue
        if all(_size(found.folder / path) == file["bytes"] for path, file in found.files.items()):
            yield found


def save(
    engine: Any, folder: Path, world: World, *, step: int, identity: dict[str, Any], trained_only: bool
) -> Checkpoint:
    """Writes a checkpoint of `engine`, each worker its own part. A collective.

    Args:
        trained_only: leave out frozen parameters.
    """
    target = folder / checkpoint_name(step)
    if world.rank == 0:
        shutil.rmtree(target, ignore_errors=True)  # what a killed run left, or one that was found broken
    world.barrier()
    engine.save_checkpoint(str(folder), tag=target.name, save_latest=False, exclude_frozen_parameters=trained_only)
    paths = sorted(str(path.relative_to(target)) for path in target.rglob("*") if path.is_file())
    parts = world.gather({path: _flushed(target / path) for path in paths[world.rank :: world.size]})
    files = {path: file for part in parts for path, file in part.items()}
    checkpoint = Checkpoint(target, step, world.size, identity, files)
    if world.rank == 0:
        _write_marker(checkpoint)
    world.barrier()
    return checkpoint


def newest_good(folder: Path, world: World) -> tuple[Checkpoint | None, list[Path]]:
    """The newest complete checkpoint whose files are as they were written, and newer ones that are not. A collective.

    Each worker reads its share of the files.
    """
    broken: list[Path] = []
    for found in world.from_first(list(complete(folder))):
        mine = sorted(found.files)[world.rank :: world.size]
        wrong = sum(_sha256(found.folder / path) != found.files[path]["sha256"] for path in mine)
        if not world.sums([wrong])[0]:
            return found, broken
        broken.append(found.folder)
    return None, broken


def load(engine: Any, checkpoint: Checkpoint, world: World, *, identity: dict[str, Any], trained_only: bool) -> None:
    """Loads `checkpoint` into `engine`. A collective.

    Raises:
        TrainingError: it was written by another number of workers, or its `identity` is another.
    """
    changed = [key for key, value in identity.items() if checkpoint.identity.get(key) != value]
    if changed:
        raise TrainingError(
            f"the checkpoint cannot be continued: {', '.join(changed)} changed since it was written",
            where=str(checkpoint.folder),
            hint=f"undo the change, or delete {checkpoint.folder.parent} to start anew",
        )
    if checkpoint.world_size != world.size:
        raise TrainingError(
            f"the checkpoint was written by {checkpoint.world_size} workers and this run has {world.size}",
            where=str(checkpoint.folder),
            hint=f"run it with {checkpoint.world_size} workers, or remove the checkpoints to start anew",
        )
    engine.load_checkpoint(
        str(checkpoint.folder.parent), tag=checkpoint.folder.name, load_module_strict=not trained_only
    )


def prune(folder: Path, keep: int) -> None:
    """Deletes all but the newest `keep` complete checkpoints, and what unfinished ones left before the newest."""
    newest_first = list(complete(folder))
    if not newest_first:
        return
    kept = {checkpoint.folder for checkpoint in newest_first[:keep]}
    for path in folder.glob("step-*"):
        if path not in kept and path.name < newest_first[0].folder.name:
            (path / MARKER).unlink(missing_ok=True)  # first: a half-deleted folder is no checkpoint
            shutil.rmtree(path, ignore_errors=True)


def _write_marker(checkpoint: Checkpoint) -> None:
    text = json.dumps({k: v for k, v in vars(checkpoint).items() if k != "folder"}, indent=1)
    unnamed = checkpoint.folder / f"{MARKER}.tmp"
    with unnamed.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    unnamed.replace(checkpoint.folder / MARKER)
    for folder in (checkpoint.folder, checkpoint.folder.parent):
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _flushed(path: Path) -> File:
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else -1
