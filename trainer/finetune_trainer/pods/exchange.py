"""What pods hand to each other under the work prefix, and how one gets it to its own disk.

model.json          which files of which revision the base model is (Origin)
prepared/           as in a run folder; manifest.json last
metrics.jsonl       of all attempts, as far as they were uploaded
result.json         written last
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

from finetune_api.errors import StorageError
from finetune_api.run import METRICS_FILE, MODEL_FILE, PREPARED, RunConfig
from finetune_trainer import base_model, storage
from finetune_trainer.manifest import MANIFEST_FILE, Manifest, read_manifest, write_json
from finetune_trainer.origin import Origin
from finetune_trainer.tracking import TRACKING

Moved = Callable[[str, int, int], None]  # what, bytes done, bytes in all


def prefix(run: RunConfig) -> storage.Location:
    """The work prefix of a run as the operator wrote it."""
    return storage.resolve(run.work, run.base_dir, where="work")


def origin(run: RunConfig) -> Origin | None:
    """The base model as prepare found it; None where every pod sees it as a folder."""
    content = storage.read_bytes(prefix(run).inside(MODEL_FILE))
    return None if content is None else Origin.model_validate_json(content)


def keep_origin(run: RunConfig, found: Origin, scratch: Path) -> None:
    """Fixes the base model for all pods of the job."""
    file = scratch / MODEL_FILE
    write_json(file, found.model_dump(mode="json"))
    storage.upload(file, prefix(run).inside(MODEL_FILE))


def fetch(run: RunConfig, local: RunConfig, moved: Moved) -> None:
    """Brings model and prepared rows to this pod's disk. Ranks of one pod that call at once wait for one copy.

    Raises:
        StorageError: the rows are not prepared, or something cannot be read.
    """
    if model := origin(run):
        base_model.fetch(
            model, Path(local.model_path), run.base_dir, progress=lambda done, total: moved("model", done, total)
        )
    work = Path(local.work)
    work.mkdir(parents=True, exist_ok=True)
    with (work / ".fetch.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not fetch_prepared(run, local, moved):
            raise StorageError("nothing is prepared here", where=prefix(run).uri, hint="the stage prepare comes first")


def fetch_prepared(run: RunConfig, local: RunConfig, moved: Moved = lambda what, done, total: None) -> bool:
    """Copies the prepared rows here; False when there are none. What is here already is not copied again.

    Raises:
        StorageError: they cannot be read, or are not what their manifest says.
    """
    remote, folder = prefix(run).inside(PREPARED), Path(local.work) / PREPARED
    content = storage.read_bytes(remote.inside(MANIFEST_FILE))
    if content is None:
        return False
    if (folder / MANIFEST_FILE).exists() and (folder / MANIFEST_FILE).read_bytes() == content:
        return True
    partial = folder.with_name(f"{PREPARED}.fetched")
    shutil.rmtree(partial, ignore_errors=True)
    for file in storage.list_files(remote, left_out=(".",)):
        name = file.location.path.removeprefix(remote.path.rstrip("/") + "/")
        if "/" not in name and not name.endswith(".arrow"):
            storage.download(file.location, partial / name)
    manifest = read_manifest(partial)
    _fetch_shards(manifest, remote, partial, moved)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return True


def _fetch_shards(manifest: Manifest, remote: storage.Location, folder: Path, moved: Moved) -> None:
    shards = [*manifest.splits.train.shards, *manifest.splits.evaluation.shards]
    total, done = sum(shard.bytes for shard in shards), 0
    for shard in shards:
        storage.download(remote.inside(shard.file), folder / shard.file, shard.sha256)
        done += shard.bytes
        moved("rows", done, total)


def publish_prepared(run: RunConfig, local: RunConfig) -> None:
    """Uploads what was prepared, the manifest last; nothing when it is there already."""
    folder, remote = Path(local.work) / PREPARED, prefix(run).inside(PREPARED)
    if storage.read_bytes(remote.inside(MANIFEST_FILE)) != (folder / MANIFEST_FILE).read_bytes():
        storage.publish(folder, remote, last=MANIFEST_FILE)


def manifest_sha256(run: RunConfig) -> str | None:
    """SHA-256 of the manifest under the work prefix."""
    content = storage.read_bytes(prefix(run).inside(PREPARED).inside(MANIFEST_FILE))
    return None if content is None else hashlib.sha256(content).hexdigest()


def fetch_metrics(run: RunConfig, local: RunConfig) -> None:
    """Brings the events of earlier attempts here: what is under the work prefix counts, not what lies here."""
    remote, file = prefix(run).inside(METRICS_FILE), Path(local.work) / METRICS_FILE
    file.unlink(missing_ok=True)
    if storage.exists(remote):
        storage.download(remote, file)


def publish_curves(run: RunConfig, local: RunConfig) -> None:
    """Uploads what a tracker wrote into files."""
    work = Path(local.work)
    for file in sorted(path for path in (work / TRACKING).rglob("*") if path.is_file() and not path.is_symlink()):
        storage.upload(file, prefix(run).inside(str(file.relative_to(work))))


def publish_metrics(run: RunConfig, local: RunConfig) -> None:
    """Uploads the events so far."""
    storage.upload(Path(local.work) / METRICS_FILE, prefix(run).inside(METRICS_FILE))
