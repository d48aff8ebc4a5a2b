"""Keeps a store like the API server's objects of one kind: a list, then watches from where the list ended.

A server that keeps a watch open without a word cannot be told from one with nothing to say, and bookmarks come about
once a minute. So a watch asks to be ended by the server after half a minute, and a healthy server does so, with a
bookmark just before: that end is the proof that nothing was missed. One that goes on in silence is cut, and then a list
is made. What was proved last is `age` seconds old; past RELIST_AGE a list is made too, so watches that are cut every
few seconds and prove nothing do not hide changes.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from typing import Any, Final

import structlog

from finetune_operator.client import ApiError, Client, Resource
from finetune_operator.store import Key, Store, key_of

WATCH_SECONDS: Final = (20, 30)
SILENCE_MARGIN: Final = 5.0
RELIST_AGE: Final = 45.0
MISSING_RETRY: Final = 15.0
_QUICK: Final = 2.0
_FIRST_DELAY: Final = 0.1
_LAST_DELAY: Final = 5.0
_STALE_SECONDS: Final = 60.0  # of lists from the past only, until the past is taken for the present: a restored backup

_log = structlog.get_logger(__name__)


class Reflector:
    """Fills a store and says which keys changed. `run` never ends by itself.

    Args:
        namespace: only this one's objects; None: all.
        on_change: called after each change of the store.

    Attributes:
        synced: whether a list was complete once, or the resource type is known to be missing.
        missing: whether the API server does not know the resource type.
        failed: the last error since something was last proved; None: all is well.
    """

    def __init__(
        self,
        client: Client,
        resource: Resource,
        store: Store[Any],
        on_change: Callable[[Key], None],
        *,
        label_selector: str | None = None,
        namespace: str | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.resource = resource
        self.namespace = namespace
        self.synced = asyncio.Event()
        self.missing = False
        self.failed: ApiError | None = None
        self._client = client
        self._store = store
        self._on_change = on_change
        self._selector = label_selector
        self._monotonic = monotonic
        self._proved = monotonic()
        self._version = ""  # where the next watch starts; empty: a list is needed
        self._newest = 0  # the newest version seen
        self._stale_since: float | None = None

    def age(self) -> float:
        """Seconds since the store was last known to hold everything."""
        return self._monotonic() - self._proved

    async def run(self) -> None:
        """Lists and watches until cancelled."""
        delay = _FIRST_DELAY
        while True:
            started = self._monotonic()
            wait = 0.0
            try:
                if not self._version or self.age() > RELIST_AGE:
                    await self._list()
                await self._watch()
            except ApiError as error:
                wait = self._after(error)
            # What ends as soon as it has begun is tried again ever more slowly, whatever the reason.
            delay = _FIRST_DELAY if self._monotonic() - started > _QUICK else min(_LAST_DELAY, delay * 2)
            await asyncio.sleep(max(wait, delay) * (1 + random.random() / 2))

    async def catch_up(self) -> None:
        """Lists beside the watch, which may have died without a sign; returns when the store has all there is now."""
        while True:
            try:
                await self._list()
                return
            except ApiError as error:
                wait = self._after(error)
            if self.missing:
                return
            await asyncio.sleep(max(wait, _QUICK))

    def _after(self, error: ApiError) -> float:
        """Takes up an error; answers how long to wait at least."""
        if error.gone:
            self._version = ""
            _log.info("relisting: the watch's version is too old", resource=self.resource.plural)
            return 0.0
        if error.not_found:
            self._miss()
            return MISSING_RETRY
        if not self.failed:  # one line for an outage, not one for every try
            _log.warning("cannot watch", resource=self.resource.plural, error=str(error), age=round(self.age(), 1))
        self.failed = error
        if error.reason == "Timeout":
            self._version = ""
        return min(error.retry_after or 0.0, _LAST_DELAY)

    def _prove(self) -> None:
        if self.failed:
            _log.info("watching again", resource=self.resource.plural, age=round(self.age(), 1))
        self.failed = None
        self._proved = self._monotonic()

    def _miss(self) -> None:
        """The resource type is not served. The store is left as it is: nobody may take this for a deletion of all."""
        if not self.missing:
            _log.warning("the API server does not know this resource", resource=self.resource.plural)
        self.missing = True
        self._version = ""
        self._prove()
        self.synced.set()

    async def _list(self) -> None:
        seen: set[Key] = set()
        version = 0
        async for page in self._client.list(self.resource, self.namespace, label_selector=self._selector):
            version = int(page.resource_version)
            if version < self._newest and self._is_stale(version):
                raise ApiError(0, "StaleList", f"a list of version {version} after version {self._newest}")
            for item in page.items:
                seen.add(key_of(item))
                if self._store.put(item):
                    self._on_change(key_of(item))
        for key in self._store:
            mine = self.namespace is None or key[0] == self.namespace
            if mine and key not in seen and self._store.remove(key, version):
                self._on_change(key)
        self._version, self._newest, self._stale_since = str(version), version, None
        if self.missing:
            _log.info("the API server knows this resource now", resource=self.resource.plural)
        self.missing = False
        self._prove()
        self.synced.set()

    def _is_stale(self, version: int) -> bool:
        """Whether a list that is older than what we know is to be ignored."""
        self._stale_since = self._stale_since or self._monotonic()
        if self._monotonic() - self._stale_since < _STALE_SECONDS:
            return True
        _log.warning("the API server's data was set back", resource=self.resource.plural, version=version)
        self._store.forget_versions()
        return False

    async def _watch(self) -> None:
        seconds = random.randint(*WATCH_SECONDS)
        started = self._monotonic()
        events = self._client.watch(
            self.resource,
            self.namespace,
            resource_version=self._version,
            seconds=seconds,
            silence=seconds + SILENCE_MARGIN,
            label_selector=self._selector,
        )
        async for event in events:
            self._take(event)
        if self._monotonic() - started > seconds - 1:  # the server's own end; an earlier one proves nothing
            self._prove()

    def _take(self, event: dict[str, Any]) -> None:
        obj = event["object"]
        version = str(obj["metadata"]["resourceVersion"])
        if event["type"] == "DELETED":
            if self._store.remove(key_of(obj), int(version)):
                self._on_change(key_of(obj))
        elif event["type"] != "BOOKMARK" and self._store.put(obj):
            self._on_change(key_of(obj))
        self._version, self._newest = version, max(self._newest, int(version))
        self._prove()
