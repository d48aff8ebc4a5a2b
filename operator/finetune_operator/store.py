"""What the watches have seen, as compressed bytes: ten thousand jobs in tens of MiB, where parsed ones take hundreds.

A store never goes back: an older version of an object than the one it holds, or has seen deleted, is ignored. So the
answers to our own writes can be put in too, whichever arrives first.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

Key = tuple[str, str]  # namespace ("" for what has none), name
Object = dict[str, Any]
S = TypeVar("S")

JOB_LABEL: Final = "finetune.dev/job"
_TOMBSTONES: Final = 10_000  # deletions remembered; a late answer to a write is seconds old
_LAST_APPLIED: Final = "kubectl.kubernetes.io/last-applied-configuration"
_ZLIB_WINDOW: Final = 32_768


@dataclass(frozen=True, slots=True)
class _Entry(Generic[S]):
    version: int
    blob: bytes
    job: Key | None
    summary: S | None


class Store(Generic[S]):
    """Objects of one kind by key, and by the job that they belong to.

    Args:
        trim: drops what is not read; it may change and return its argument.
        summarize: small facts about an object that are wanted of all objects at once; kept as they are.
        on_summary: called with the facts before and after, when they changed; None: there was or is no object.
    """

    def __init__(
        self,
        trim: Callable[[Object], Object],
        summarize: Callable[[Object], S] | None = None,
        on_summary: Callable[[Key, S | None, S | None], None] | None = None,
    ) -> None:
        self._trim = trim
        self._summarize = summarize
        self._on_summary = on_summary
        self._entries: dict[Key, _Entry[S]] = {}
        self._by_job: dict[Key, set[Key]] = {}
        self._deleted: dict[Key, tuple[int, Key | None]] = {}
        self._dictionary = b""

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Key]:
        return iter(self.keys())

    def keys(self) -> list[Key]:
        """Keys of all objects, as they are now."""
        return list(self._entries)

    def put(self, obj: Object) -> bool:
        """Takes up an object; answers whether it is new or says anything that it did not say before."""
        key = key_of(obj)
        version = int(obj["metadata"].get("resourceVersion") or 0)
        old = self._entries.get(key)
        if version <= (old.version if old else self._deleted.get(key, (-1, None))[0]):
            return False
        trimmed = self._trim(obj)
        metadata = {name: value for name, value in trimmed["metadata"].items() if name != "resourceVersion"}
        blob = self._pack(trimmed | {"metadata": metadata})
        if old and old.blob == blob:
            self._entries[key] = _Entry(version, old.blob, old.job, old.summary)
            return False
        job = (metadata.get("labels") or {}).get(JOB_LABEL)
        entry = _Entry(
            version,
            blob,
            (key[0], job) if job else None,
            self._summarize(trimmed) if self._summarize else None,
        )
        self._replace(key, old, entry)
        return True

    def remove(self, key: Key, version: int) -> bool:
        """Takes up that an object was gone at a resource version; answers whether it was there."""
        old = self._entries.get(key)
        if old and old.version > version:
            return False
        known, job = self._deleted.pop(key, (0, None))
        self._deleted[key] = (max(version, known), old.job if old else job)
        while len(self._deleted) > _TOMBSTONES:
            del self._deleted[next(iter(self._deleted))]
        if old:
            self._replace(key, old, None)
        return old is not None

    def get(self, key: Key) -> Object | None:
        """The object as last seen; the caller's own copy."""
        entry = self._entries.get(key)
        return self._unpack(entry) if entry else None

    def of_job(self, key: Key) -> list[Object]:
        """The objects with this job's label in its namespace, by name."""
        return [self._unpack(self._entries[child]) for child in sorted(self._by_job.get(key, ()))]

    def job_of(self, key: Key) -> Key | None:
        """The job that an object belongs to, or belonged to before it was deleted just now."""
        entry = self._entries.get(key)
        return entry.job if entry else self._deleted.get(key, (0, None))[1]

    def summary(self, key: Key) -> S | None:
        """The facts kept about an object."""
        entry = self._entries.get(key)
        return entry.summary if entry else None

    def summaries(self) -> Iterator[tuple[Key, S]]:
        """The facts kept about all objects, as they are now."""
        for key, entry in list(self._entries.items()):
            if entry.summary is not None:
                yield key, entry.summary

    def forget_versions(self) -> None:
        """Believes the next version of every object, though it be older: the API server's data was set back."""
        self._deleted.clear()
        self._entries = {key: _Entry(-1, entry.blob, entry.job, entry.summary) for key, entry in self._entries.items()}

    def _replace(self, key: Key, old: _Entry[S] | None, new: _Entry[S] | None) -> None:
        if old and old.job:
            children = self._by_job[old.job]
            children.discard(key)
            if not children:
                del self._by_job[old.job]
        if new:
            self._entries[key] = new
            self._deleted.pop(key, None)
            if new.job:
                self._by_job.setdefault(new.job, set()).add(key)
        else:
            del self._entries[key]
        before, after = old.summary if old else None, new.summary if new else None
        if self._on_summary and before != after:
            self._on_summary(key, before, after)

    def _pack(self, obj: Object) -> bytes:
        data = json.dumps(obj, separators=(",", ":"), ensure_ascii=False).encode()
        if not self._dictionary:
            # Objects of a kind look alike: the first one is what the others are compressed against.
            self._dictionary = data[-_ZLIB_WINDOW:]
        packer = zlib.compressobj(1, wbits=-15, zdict=self._dictionary)
        return packer.compress(data) + packer.flush()

    def _unpack(self, entry: _Entry[S]) -> Object:
        obj: Object = json.loads(zlib.decompressobj(wbits=-15, zdict=self._dictionary).decompress(entry.blob))
        obj["metadata"]["resourceVersion"] = str(entry.version)
        return obj


def key_of(obj: Object) -> Key:
    """Namespace and name."""
    metadata = obj["metadata"]
    return metadata.get("namespace") or "", metadata["name"]


def trim_metadata(obj: Object) -> Object:
    """Drops the bookkeeping of other clients."""
    metadata = obj["metadata"]
    metadata.pop("managedFields", None)
    if annotations := metadata.get("annotations"):
        annotations.pop(_LAST_APPLIED, None)
    return obj
