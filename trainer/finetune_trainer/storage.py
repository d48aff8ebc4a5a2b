"""Files wherever they are: one way to name, read and publish them on a disk or in a bucket (pyarrow.fs).

Credentials come from the environment or the pod's identity, never from a URI; so no message can carry them.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

import pyarrow.fs as pafs

from finetune_api.errors import SpecError, StorageError

_CONNECT_SECONDS: Final = 10.0
_REQUEST_SECONDS: Final = 60.0
_COPY_BYTES: Final = 8 << 20
_OBJECT_STORES: Final = ("s3", "gs", "abfs", "abfss")


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
    if parts.scheme in _OBJECT_STORES:
        if ("@" in parts.netloc and parts.scheme in ("s3", "gs")) or parts.password or parts.query:
            raise SpecError(
                "a storage URI may carry neither credentials nor options",
                where=where,
                hint="set AWS_ACCESS_KEY_ID and the like in the environment, or use the pod's identity",
            )
        with explained(uri):
            return _object_store(uri, parts.scheme, parts.netloc, unquote(parts.path))
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
            hint="use s3://, gs://, abfs://, file:// or a path; from a model hub, download the folder first",
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
        info = location.fs.get_file_info(location.path)
        if info.type == pafs.FileType.NotFound:
            raise StorageError("there is no such file or folder", where=location.uri, hint="check the path's spelling")
        if info.type != pafs.FileType.Directory:
            return [_stored(location, info)]
        found = location.fs.get_file_info(pafs.FileSelector(location.path, recursive=True))
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
        return bool(location.fs.get_file_info(location.path).type != pafs.FileType.NotFound)


def read_bytes(location: Location) -> bytes | None:
    """What a small file holds; None when there is no such file.

    Raises:
        StorageError: it cannot be read.
    """
    with explained(location.uri):
        if location.fs.get_file_info(location.path).type != pafs.FileType.File:
            return None
        with location.fs.open_input_stream(location.path) as stream:
            return bytes(stream.read())


def download(source: Location, target: Path) -> None:
    """Copies a file here; `target` is there whole or as it was.

    Raises:
        StorageError: it cannot be read, or came in another length than the store says it has.
    """
    partial = target.with_name(f".{target.name}.partial")
    with explained(source.uri):
        target.parent.mkdir(parents=True, exist_ok=True)
        size = int(source.fs.get_file_info(source.path).size or 0)
        with source.fs.open_input_stream(source.path) as stream, partial.open("wb") as copy:
            shutil.copyfileobj(stream, copy, _COPY_BYTES)
    if partial.stat().st_size != size:
        raise StorageError(
            f"{partial.stat().st_size:,} bytes came, and it has {size:,}", where=source.uri, hint="try again"
        )
    partial.replace(target)


def upload(source: Path, target: Location, pace: Callable[[int], None] = lambda size: None) -> None:
    """Copies a file to a disk or bucket; a reader sees it whole or as it was.

    Args:
        pace: called before each block with its bytes; may wait.

    Raises:
        StorageError: it cannot be written.
    """
    with explained(target.uri):
        local = target.local
        path = target.path
        if local is not None:
            local.parent.mkdir(parents=True, exist_ok=True)
            path = str(local.with_name(f".{local.name}.partial"))
        # Not pyarrow's copy_files: it takes an upload that the store refuses at its end for a success.
        with source.open("rb") as stream, target.fs.open_output_stream(path) as copy:
            while block := stream.read(_COPY_BYTES):
                pace(len(block))
                copy.write(block)
        if local is not None:
            Path(path).replace(local)


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
        marker = f"{target.path}/{last}"
        if target.fs.get_file_info(marker).type == pafs.FileType.File:
            target.fs.delete_file(marker)
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
        said = " ".join((error.strerror or str(error)).split())
        raise StorageError(said, where=where, hint=hint or _hint(said)) from None


def _hint(said: str) -> str:
    """What to do about a store's own words."""
    known = {
        "NO_SUCH_BUCKET": "check the bucket's name and AWS_ENDPOINT_URL",
        "NO_SUCH_KEY": "check the key's spelling",
        "ACCESS_DENIED": "check that the credentials may read (or write) this bucket",
        "INVALID_ACCESS_KEY_ID": "check AWS_ACCESS_KEY_ID",
        "SIGNATURE": "check AWS_SECRET_ACCESS_KEY",
        "NETWORK_CONNECTION": "check AWS_ENDPOINT_URL and that this machine reaches it",
        "No space left": "free some disk space and run the same command again",
        "Permission denied": "check who owns the file",
    }
    otherwise = "check the bucket, the credentials and AWS_ENDPOINT_URL" if "AWS Error" in said else ""
    return next((hint for word, hint in known.items() if word in said), otherwise)


def _object_store(uri: str, scheme: str, bucket: str, key: str) -> Location:
    if scheme != "s3":
        fs, path = pafs.FileSystem.from_uri(uri)
        return Location(fs, path, uri)
    path = f"{bucket}/{key.strip('/')}".rstrip("/")
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    fs = pafs.S3FileSystem(
        endpoint_override=endpoint,  # pyarrow then names the bucket in the path, as servers other than AWS need
        region=region or ("us-east-1" if endpoint else pafs.resolve_s3_region(bucket)),
        connect_timeout=_CONNECT_SECONDS,
        request_timeout=_REQUEST_SECONDS,
    )
    return Location(fs, path, uri)


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
