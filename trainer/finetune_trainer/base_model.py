"""The base model's files: where they are, at which revision, and a copy of them on this machine."""

from __future__ import annotations

import fcntl
import re
from collections.abc import Callable
from pathlib import Path
from typing import Final

from finetune_api.errors import ModelError, SpecError, StorageError
from finetune_trainer import hub, storage
from finetune_trainer.manifest import write_json
from finetune_trainer.origin import ORIGIN_FILE, Origin, read_origin

_CLAIM: Final = re.compile(r"pvc://[a-z0-9][-a-z0-9.]*(?:/(.*))?")
_WHERE: Final = "spec.model.source"


def in_place(source: str, base_dir: str | Path, claim: Path | None = None) -> Path | None:
    """The model's folder where this machine sees it already, or None: it has to be copied.

    Args:
        claim: where the volume of a model at pvc:// is mounted.

    Raises:
        SpecError: the source is no address of a model.
    """
    if found := _CLAIM.fullmatch(source):
        if claim is None:
            raise SpecError("volumes are a cluster's", where=_WHERE, hint="give the folder's path")
        return storage.within(claim, found[1] or ".", where=_WHERE)
    if source.startswith(hub.SCHEME):
        return None
    return storage.resolve(source, base_dir, where=_WHERE).local


def look(source: str, base_dir: str | Path) -> Origin:
    """Finds the files of a model that has to be copied.

    Raises:
        SpecError: the source is no address of a model.
        ModelError: the hub has no such model or revision, or does not give it.
        StorageError: it is not there, or cannot be listed.
    """
    if source.startswith(hub.SCHEME):
        return hub.look(source)
    location = storage.resolve(source, base_dir, where=_WHERE)
    root = location.path.rstrip("/") + "/"
    try:
        files = storage.list_files(location, left_out=(".",))
    except StorageError as error:
        raise StorageError(error.what, where=_WHERE, hint=error.hint) from None
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
        for name in missing:
            _bring(origin, name, folder, base_dir)
            if _size(folder / name) != origin.files[name]:
                raise ModelError(
                    f"{name} is not as long as when the job began", where=origin.source, hint="submit the job again"
                )
            done += origin.files[name]
            progress(done, total)
        hub.clean(folder)
        write_json(folder / ORIGIN_FILE, origin.model_dump(mode="json"))


def _bring(origin: Origin, name: str, folder: Path, base_dir: str | Path) -> None:
    if origin.source.startswith(hub.SCHEME):
        hub.bring(origin, name, folder)
    else:
        storage.download(storage.resolve(origin.source, base_dir, where=_WHERE).inside(name), folder / name)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else -1
