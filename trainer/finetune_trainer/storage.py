"""Files wherever they are: one way to name, read and publish them on a disk or in a bucket (pyarrow.fs).

Credentials come from the environment or the pod's identity, never from a URI; so no message can carry them.
"""

from __future__ import annotations

import functools
import hashlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Final
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.fs as pafs

from finetune_api.errors import SpecError, StorageError
from finetune_trainer.patience import persistently, words
from finetune_trainer.stores import SCHEMES, open_store

_COPY_BYTES: Final = 8 << 20


@dataclass(frozen=True)
class Location:
    """A file or folder: the file system it is on, its path there, and the URI the user wrote for messages."""

    fs: pafs.FileSystem
    path: str
    uri: str

    @property
    def local(self) -> Path | None:
        """Its path on this machine's disk; None in a bucket."""
        return Path(self.path) if isinstance(self.fs, pafs.LocalFileSystem) else None

    def __reduce__(self) -> tuple[object, ...]:
        # Another machine opens the bucket with its own keys: an open file system would carry these along.
        return (Location, (self.fs, self.path, self.uri)) if self.local else (_reopened, (self.uri, self.path))

    def inside(self, name: str) -> Location:
        """What lies below it under this name."""
        return replace(self, path=f"{self.path.rstrip('/')}/{name}", uri=f"{self.uri.rstrip('/')}/{name}")


@dataclass(frozen=True)
class StoredFile:
    """One file found by `list_files`; `modified` is in Unix nanoseconds, None where the store has none."""

    location: Location
    size: int
    modified: int | None


def resolve(uri: str, base_dir: str | Path, *, where: str = "") -> Location:
    """Opens the file system that `uri` names: s3://, gs://, abfs://, file://, or a path.

    A relative path starts from `base_dir` and may not leave it, neither by `..` nor by a link.

    Raises:
        SpecError: an unknown scheme, credentials in the URI, or a path that leaves `base_dir`.
        StorageError: the file system cannot be set up.
    """
    parts = urlsplit(uri)
    if parts.scheme in SCHEMES:
        if ("@" in parts.netloc and parts.scheme in ("s3", "gs")) or parts.password or parts.query:
            raise SpecError(
                "a storage URI may carry neither credentials nor options",
                where=where,
                hint="set AWS_ACCESS_KEY_ID and the like in the environment, or use the pod's identity",
            )
        with explained(uri):
            fs, bucket = open_store(parts.scheme, parts.netloc, where)
        return Location(fs, f"{bucket}/{unquote(parts.path).strip('/')}".rstrip("/"), uri)
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost"):
            raise SpecError(
                f"{uri!r} names the host {parts.netloc!r}",
                where=where,
                hint="an absolute path has three slashes: file:///folder/rows.jsonl",
            )
        return _on_disk(Path(unquote(parts.path)), uri)
    if "://" in uri:
        raise SpecError(
            f"{parts.scheme}:// is not a storage scheme",
            where=where,
            hint="use s3://, gs://, abfs://, file:// or a path",
        )
    if Path(uri).is_absolute():
        return _on_disk(Path(uri), uri)
    return _on_disk(within(Path(base_dir), uri, where=where), uri)


def within(base_dir: Path, relative: str, *, where: str = "") -> Path:
    """`base_dir / relative` with every link followed.

    Raises:
        SpecError: the path ends outside of `base_dir`.
    """
    base = base_dir.resolve()
    path = (base / relative).resolve()
    if not path.is_relative_to(base):
        raise SpecError(
            f"{relative!r} leaves the job file's folder",
            where=where,
            hint="keep the file beside the job file, or write its whole path as file:///…",
        )
    return path


def list_files(location: Location, left_out: tuple[str, ...] = (".", "_")) -> list[StoredFile]:
    """The file itself, or every file below the folder, sorted by path, without names that begin with `left_out`.

    Raises:
        StorageError: nothing is there, or it cannot be listed.
    """
    with explained(location.uri):
        info = _info(location)
        if info.type == pafs.FileType.NotFound:
            raise StorageError("there is no such file or folder", where=location.uri, hint="check the path's spelling")
        if info.type != pafs.FileType.Directory:
            return [_stored(location, info)]
        found = persistently(lambda: location.fs.get_file_info(pafs.FileSelector(location.path, recursive=True)))
    root = location.path.rstrip("/") + "/"
    files = [
        info
        for info in found
        if info.type == pafs.FileType.File
        and not any(part.startswith(left_out) for part in info.path.removeprefix(root).split("/"))
    ]
    if not files:
        raise StorageError("the folder holds no file", where=location.uri, hint="put the rows into it, or name a file")
    return [_stored(location, info) for info in sorted(files, key=lambda info: str(info.path))]


def exists(location: Location) -> bool:
    """Whether a file or folder is there.

    Raises:
        StorageError: the store does not answer or refuses.
    """
    with explained(location.uri):
        return bool(_info(location).type != pafs.FileType.NotFound)


def read_bytes(location: Location) -> bytes | None:
    """What a small file holds; None when there is no such file, or an empty one.

    pyarrow makes an Azure blob empty before it fills it: who finds it so came in between, or its writer was killed.

    Raises:
        StorageError: it cannot be read.
    """

    def read() -> bytes:
        with location.fs.open_input_file(location.path) as file:
            size, content = file.size(), bytes(file.read())
        if len(content) != size:
            raise OSError(f"{len(content):,} of {size:,} bytes came")
        return content

    with explained(location.uri):
        return persistently(read) or None if _info(location).type == pafs.FileType.File else None


def download(source: Location, target: Path, digest: str | None = None) -> None:
    """Copies a file here; `target` is there whole or as it was. What breaks off is continued where it was.

    Args:
        digest: the SHA-256 that it must have; another is brought again. Without it a store is believed that sends fewer
            bytes than it says within one answer: pyarrow does not tell.

    Raises:
        StorageError: it cannot be read, is not what it must be, or changed meanwhile.
    """
    partial = target.with_name(f".{target.name}.partial")
    with explained(source.uri):
        target.parent.mkdir(parents=True, exist_ok=True)
        before = _info(source)
        if before.type != pafs.FileType.File:
            raise StorageError("there is no such file", where=source.uri, hint="check the path's spelling")
        persistently(lambda: _copy(source, partial, int(before.size), digest))
        after = _info(source)
    if (after.size, after.mtime_ns) != (before.size, before.mtime_ns):
        raise StorageError("the file changed while it was read", where=source.uri, hint="try again when it is at rest")
    partial.replace(target)


def sha256(file: Path) -> str:
    """A file's SHA-256, in hexadecimal."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _copy(source: Location, target: Path, size: int, digest: str | None) -> None:
    with target.open("wb") as copy:
        persistently(lambda: _continue(source, copy, size), moved=copy.tell)
        copy.flush()
        if digest is not None and sha256(target) != digest:
            raise OSError("what came is not what was written there: its SHA-256 is another")


def _continue(source: Location, copy: BinaryIO, size: int) -> None:
    """Appends to `copy` what it does not have yet of the source's `size` bytes."""
    with source.fs.open_input_file(source.path) as file:
        file.seek(copy.tell())
        while (missing := size - copy.tell()) > 0:
            block = file.read(min(missing, _COPY_BYTES))
            if not block:
                raise OSError(f"{copy.tell():,} of {size:,} bytes came")
            copy.write(block)


def upload(source: Path, target: Location, pace: Callable[[int], None] = lambda size: None) -> None:
    """Copies a file to a disk or bucket; a reader sees it whole, as it was, or not at all.

    Args:
        pace: called before each block with its bytes; may wait.

    Raises:
        StorageError: it cannot be written, or the store has another length of it.
    """
    with explained(target.uri):
        if (local := target.local) is None:
            persistently(lambda: _put(source, target, pace))
            return
        local.parent.mkdir(parents=True, exist_ok=True)
        partial = replace(target, path=str(local.with_name(f".{local.name}.partial")))
        _put(source, partial, pace)
        Path(partial.path).replace(local)


def _put(source: Path, target: Location, pace: Callable[[int], None]) -> None:
    sent = 0
    try:
        # Not pyarrow's copy_files: it takes an upload that the store refuses at its end for a success.
        with source.open("rb") as stream, target.fs.open_output_stream(target.path) as copy:
            while block := stream.read(_COPY_BYTES):
                pace(len(block))
                copy.write(block)
                sent += len(block)
        stored = target.fs.get_file_info(target.path).size
        if stored != sent:
            raise OSError(f"the store has {stored} of {sent} bytes")
    except BaseException:
        with suppress(OSError):  # pyarrow cannot give an upload up: on leaving, the half of it became the file
            target.fs.delete_file(target.path)
        raise


def remove_folder(location: Location) -> None:
    """Removes a folder with all that is in it, if it is there.

    Raises:
        StorageError: it cannot be removed.
    """
    with explained(location.uri):
        if _info(location).type != pafs.FileType.NotFound:
            persistently(lambda: _delete_folder(location))


def _delete_folder(location: Location) -> None:
    try:
        location.fs.delete_dir(location.path)
    except FileNotFoundError:
        # On GCS pyarrow wants to delete a file `folder/`, too, which is there only when create_dir made the folder.
        if location.fs.get_file_info(location.path).type != pafs.FileType.NotFound:
            raise


def remove_file(location: Location) -> None:
    """Removes a file, if it is there.

    Raises:
        StorageError: it cannot be removed.
    """
    with explained(location.uri):
        if _info(location).type == pafs.FileType.File:
            persistently(lambda: location.fs.delete_file(location.path))


def publish(folder: Path, target: Location, *, last: str) -> None:
    """Copies the tree `folder` to `target` so that a reader never takes half of it for the whole.

    On a disk it is copied beside the target and renamed over it. In a bucket, which has no rename, a `last` from before
    is deleted first, and the file `last` (relative to `folder`) is written after all others: who finds it finds all.

    Raises:
        StorageError: it cannot be written.
    """
    with explained(target.uri):
        local = target.local
        if local is not None:
            _publish_on_disk(folder, local)
            return
        remove_file(target.inside(last))
        files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / last)
        for path in [*files, folder / last]:
            upload(path, target.inside(path.relative_to(folder).as_posix()))


@contextmanager
def explained(where: str, hint: str = "") -> Iterator[None]:
    """Turns what a disk or bucket says into a StorageError at `where`.

    Raises:
        StorageError: the block raised OSError or one of its kind.
    """
    try:
        yield
    except OSError as error:
        said = words(error.strerror or str(error))
        raise StorageError(said, where=where, hint=hint or _hint(said)) from None


def _hint(said: str) -> str:
    """What to do about a store's own words."""
    known = {
        "NO_SUCH_BUCKET": "check the bucket's name and AWS_ENDPOINT_URL",
        "NO_SUCH_KEY": "check the key's spelling",
        "ACCESS_DENIED": "check that the credentials may read (or write) this bucket",
        "INVALID_ACCESS_KEY_ID": "check AWS_ACCESS_KEY_ID",
        "SIGNATURE": "check AWS_SECRET_ACCESS_KEY",
        "ContainerNotFound": "check the container's name and the account's",
        "AuthorizationPermissionMismatch": "check that the identity may read (or write) this container",
        "[Auth": "check AZURE_STORAGE_KEY or AZURE_STORAGE_SAS_TOKEN, and the account's name",
        "Base64": "check AZURE_STORAGE_KEY",
        "Fail to get a new connection": "check the account's name and that this machine reaches it",
        "NOT_FOUND": "check the bucket's name",
        "PERMISSION_DENIED": "check that the identity may read (or write) this bucket",
        "ServiceAccountCredentials": "check GOOGLE_APPLICATION_CREDENTIALS_JSON",
        "NETWORK_CONNECTION": "check AWS_ENDPOINT_URL and that this machine reaches it",
        "No space left": "free some disk space and run the same command again",
        "Permission denied": "check who owns the file",
        "AWS Error": "check the bucket, the credentials and AWS_ENDPOINT_URL",
        "Azure Error": "check the container, the account and its key",
        "google::cloud": "check the bucket and the credentials",
    }
    return next((hint for word, hint in known.items() if word in said), "")


@functools.lru_cache(maxsize=64)
def _store(scheme: str, netloc: str) -> pafs.FileSystem:
    return open_store(scheme, netloc, "")[0]


def _reopened(uri: str, path: str) -> Location:
    """A location in a bucket, as it arrives in another process."""
    parts = urlsplit(uri)
    return Location(_store(parts.scheme, parts.netloc), path, uri)


def _info(location: Location) -> pafs.FileInfo:
    try:
        return persistently(lambda: location.fs.get_file_info(location.path))
    except pa.ArrowException as error:  # keys that are none: Azure's and Google's libraries tell it at the first use
        raise OSError(str(error)) from None


def _on_disk(path: Path, uri: str) -> Location:
    return Location(pafs.LocalFileSystem(), str(path), uri)


def _stored(location: Location, info: pafs.FileInfo) -> StoredFile:
    name = location.uri.rstrip("/") + str(info.path).removeprefix(location.path.rstrip("/"))
    return StoredFile(Location(location.fs, str(info.path), name), int(info.size or 0), info.mtime_ns)


def _publish_on_disk(folder: Path, target: Path) -> None:
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(folder, partial)
    if target.exists():
        shutil.rmtree(target)
    partial.rename(target)
