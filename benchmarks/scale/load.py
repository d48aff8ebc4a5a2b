"""Many requests at once, as the cluster's admin."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Coroutine, Iterable
from contextlib import asynccontextmanager
from typing import Any, Final

import aiohttp
from tests.api.cluster import Cluster

Json = dict[str, Any]
CONNECTIONS: Final = 32
MERGE: Final = "application/merge-patch+json"
STRATEGIC: Final = "application/strategic-merge-patch+json"
JOBS_API: Final = "/apis/finetune.dev/v1alpha1"


class Loader:
    """One pool of connections to the API server."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self.session = session

    async def send(self, verb: str, path: str, body: Json, kind: str = "application/json") -> Json:
        """One request.

        Raises:
            RuntimeError: the API server refused it.
        """
        async with self.session.request(verb, path, data=json.dumps(body), headers={"Content-Type": kind}) as answer:
            text = await answer.text()
            if answer.status >= 400:
                raise RuntimeError(f"{verb} {path}: {answer.status}: {text[:2000]}")
        found: Json = json.loads(text)
        return found

    async def watch(self, path: str) -> AsyncIterator[Json]:
        """Events from now on, without end."""
        async with self.session.get(path, read_bufsize=1 << 22) as answer:
            async for line in answer.content:
                yield json.loads(line)


@asynccontextmanager
async def loader(cluster: Cluster) -> AsyncIterator[Loader]:
    """A loader that closes its connections at the end."""
    connector = aiohttp.TCPConnector(ssl=ssl.create_default_context(cafile=cluster.ca), limit=CONNECTIONS)
    headers = {"Authorization": f"Bearer {cluster.token('admin')}"}
    timeout = aiohttp.ClientTimeout(total=None, sock_read=120)
    async with aiohttp.ClientSession(cluster.url, connector=connector, headers=headers, timeout=timeout) as session:
        yield Loader(session)


async def all_of(coroutines: Iterable[Coroutine[Any, Any, Any]]) -> None:
    """Runs them at once; the connections bound how many really are."""
    async with asyncio.TaskGroup() as tasks:
        for each in coroutines:
            tasks.create_task(each)
