"""An HTTP proxy before a storage server that breaks things on demand: `with FaultyStore(server.endpoint) as store: …`.

Requests keep their Host header, so that signatures stay right. Faults are set on `store.faults` at any time and hold
from the next request on.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import aiohttp
from aiohttp import web
from yarl import URL

from tests.proxying import LoopbackProxy, hang_up

_HOP: Final = frozenset({"connection", "content-length", "transfer-encoding", "expect"})
_BLOCK: Final = 1 << 16


@dataclass
class Faults:
    """What goes wrong. Counts are used up; those of bytes concern the bodies of objects only.

    Attributes:
        unavailable: so many of the next requests get 503.
        cut_answers: so many of the next answers with a body of more than `cut_after` bytes end there, in the middle.
        cut_uploads: so many of the next uploads of more than `cut_after` bytes lose their connection there.
        shorter: so many of the next answers claim less than they should hold, and hold that.
        bytes_per_second: of each answer; 0: no bound.
    """

    unavailable: int = 0
    cut_answers: int = 0
    cut_uploads: int = 0
    cut_after: int = 1 << 17
    shorter: int = 0
    bytes_per_second: int = 0


class FaultyStore(LoopbackProxy):
    """A running proxy.

    Attributes:
        url: where it listens.
        faults: what goes wrong now.
        requests: by method.
    """

    largest = 1 << 28
    runner: ClassVar[dict[str, Any]] = {"auto_decompress": False}

    def __init__(self, upstream: str) -> None:
        super().__init__()
        self.faults = Faults()
        self.requests: Counter[str] = Counter()
        self._upstream = upstream

    def client(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            auto_decompress=False, skip_auto_headers=["Accept-Encoding", "User-Agent", "Content-Type", "Accept"]
        )

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.requests[request.method] += 1
        faults = self.faults
        if faults.unavailable > 0:
            faults.unavailable -= 1
            return web.Response(status=503, text="<Error><Code>SlowDown</Code></Error>", content_type="application/xml")
        if request.method == "PUT" and faults.cut_uploads and _length(request) > faults.cut_after:
            faults.cut_uploads -= 1
            await request.content.read(faults.cut_after)
            return hang_up(request)
        body = await request.read()
        headers = [(name, value) for name, value in request.headers.items() if name.lower() not in _HOP]
        # The path as it was signed: decoding and encoding it again could change it.
        url = URL(self._upstream + request.raw_path, encoded=True)
        async with self.session.request(request.method, url, headers=headers, data=body or None) as answer:
            return await self._answer(request, answer)

    async def _answer(self, request: web.Request, answer: aiohttp.ClientResponse) -> web.StreamResponse:
        faults = self.faults
        kept = {name: value for name, value in answer.headers.items() if name.lower() not in _HOP}
        if request.method == "HEAD":
            response = web.StreamResponse(status=answer.status, headers=kept)
            response.content_length = int(answer.headers.get("Content-Length", 0))
            await response.prepare(request)
            return response
        content = await answer.read()
        of_object = request.method == "GET" and "Last-Modified" in kept and answer.status < 300
        if of_object and faults.shorter > 0 and len(content) > 1:
            faults.shorter -= 1
            content = content[: len(content) // 2]
        cut = of_object and faults.cut_answers > 0 and len(content) > faults.cut_after
        response = web.StreamResponse(status=answer.status, headers=kept)
        response.content_length = len(content)
        await response.prepare(request)
        if cut:
            faults.cut_answers -= 1
            await response.write(content[: faults.cut_after])
            return hang_up(request)
        with suppress(ConnectionError):  # the client may have gone
            for start in range(0, len(content), _BLOCK):
                await response.write(content[start : start + _BLOCK])
                if faults.bytes_per_second:
                    await asyncio.sleep(_BLOCK / faults.bytes_per_second)
        return response


def _length(request: web.Request) -> int:
    """Bytes of the object that is uploaded; its body may come in chunks with a checksum at the end."""
    return int(request.headers.get("x-amz-decoded-content-length") or request.content_length or 0)
