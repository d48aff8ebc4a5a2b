"""The base model's files: where they are, at which revision, and a copy of them on this machine.

Only what is data is copied: safetensors, configuration and tokenizer. Code and pickles stay where they are.
"""

from __future__ import annotations

import fcntl
import re
from collections.abc import Callable
from pathlib import Path
from typing import Final

from pydantic import Field

from finetune_api.base import Model
from finetune_api.errors import ModelError, SpecError, StorageError
from finetune_trainer import storage
from finetune_trainer.manifest import write_json

ORIGIN_FILE: Final = ".origin.json"  # in the copy; written last
_WEIGHTS: Final = re.compile(
    r"(?!consolidated)[^/]+\.safetensors"
)  # consolidated: the same again in Mistral's own layout
_OTHERS: Final = re.compile(r"[^/]+\.(json|jinja|model)|merges\.txt")
_CLAIM: Final = re.compile(r"pvc://[a-z0-9][-a-z0-9.]*(?:/(.*))?")


class Origin(Model):
    """What a base model consists of, fixed for a whole job."""

    source: str = Field(description="The job's spec.model.source.")
    commit: str | None = Field(None, description="Commit that a hub's revision stood for.")
    files: dict[str, int] = Field(description="Bytes of every file, by its name in the folder.")

    def wanted(self, *, weights: bool) -> list[str]:
        """Names of the files that are copied."""
        kinds = (_OTHERS, _WEIGHTS) if weights else (_OTHERS,)
        return sorted(name for name in self.files if any(kind.fullmatch(name) for kind in kinds))


def in_place(source: str, base_dir: str | Path, claim: Path | None = None) -> Path | None:
    """The model's folder where this machine sees it already, or None: it has to be copied.

    Args:
        claim: where the volume of a model at pvc:// is mounted.

    Raises:
        SpecError: the source is no address of a model.
    """
    if found := _CLAIM.fullmatch(source):
        if claim is None:
            raise SpecError("volumes are a cluster's", where="spec.model.source", hint="give the folder's path")
        return storage.within(claim, found[1] or ".", where="spec.model.source")
    return storage.resolve(source, base_dir, where="spec.model.source").local


def look(source: str, base_dir: str | Path) -> Origin:
    """Finds the files of a model that has to be copied.

    Raises:
        SpecError: the source is no address of a model.
        StorageError: it is not there, or cannot be listed.
    """
    location = storage.resolve(source, base_dir, where="spec.model.source")
    root = location.path.rstrip("/") + "/"
    try:
        files = storage.list_files(location, left_out=(".",))
    except StorageError as error:
        raise StorageError(error.what, where="spec.model.source", hint=error.hint) from None
    return Origin(source=source, files={file.location.path.removeprefix(root): file.size for file in files})


def fetch(
    origin: Origin,
    folder: Path,
    base_dir: str | Path,
    *,
    weights: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Copies the model to `folder`, or does nothing when it is there. Processes that ask at once wait for one copy.

    Args:
        weights: without them the folder serves to prepare rows and to plan.
        progress: told bytes done and in all, after each file.

    Raises:
        ModelError: a file is not what `origin` says.
        StorageError: a file cannot be read, or not written here.
    """
    names = origin.wanted(weights=weights)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (folder / ORIGIN_FILE).exists() and read_origin(folder) != origin:
            (folder / ORIGIN_FILE).unlink()
        missing = [name for name in names if _size(folder / name) != origin.files[name]]
        total, done = sum(origin.files[name] for name in missing), 0
        where = storage.resolve(origin.source, base_dir, where="spec.model.source")
        for name in missing:
            storage.download(where.inside(name), folder / name)
            if _size(folder / name) != origin.files[name]:
                raise ModelError(
                    f"{name} is not as long as when the job began", where=origin.source, hint="submit the job again"
                )
            done += origin.files[name]
            progress(done, total)
        write_json(folder / ORIGIN_FILE, origin.model_dump(mode="json"))


def read_origin(folder: Path) -> Origin | None:
    """Where a copy is from; None for a folder that is no copy."""
    file = folder / ORIGIN_FILE
    return Origin.model_validate_json(file.read_bytes()) if file.exists() else None


def file_names(folder: Path) -> set[str]:
    """Names of the model's files, also of those that were not copied."""
    origin = read_origin(folder)
    return set(origin.files) if origin else {path.name for path in folder.iterdir() if path.is_file()}


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else -1
