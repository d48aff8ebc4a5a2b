"""An HTTP proxy before the API server that breaks things on demand: `with Proxy(cluster.url, cluster.ca) as proxy`.

It speaks plain HTTP on loopback and passes the caller's token on. Faults are set on `proxy.faults` at any time; they
take effect from the next request, and within 0.1 s on a watch. Every write that the API server answered is recorded.
"""

from __future__ import annotations

import asyncio
import json
import random
import ssl
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Final

import aiohttp
from aiohttp import web

from tests.proxying import LoopbackProxy, hang_up

# What holds for one connection only. Without Accept-Encoding answers come, and are passed on, as they are.
_HOP: Final = frozenset({"accept-encoding", "connection", "content-length", "host", "transfer-encoding"})


@dataclass
class Faults:
    """What goes wrong.

    Attributes:
        refused: fraction of requests, other than watches, that get 500, get 429, or no answer after they were done.
        away: nobody answers: connections are closed, watches cut.
        cut_watches: seconds after which a watch is cut in the middle; None: never.
        silent_watches: watches stay open and say nothing, for good: a watch that fell silent does not wake up again.
        expired_watches: so many of the next watches are answered with 410.
        stale_lists: lists are answered as they were when they were first asked for under this fault.
        only: the faults of watches and lists concern paths that hold this.
    """

    refused: float = 0.0
    away: bool = False
    cut_watches: float | None = None
    silent_watches: bool = False
    expired_watches: int = 0
    stale_lists: bool = False
    only: str = ""


@dataclass(frozen=True)
class Write:
    """A write and the API server's answer to it."""

    method: str
    path: str
    status: int
    time: float = field(default_factory=time.monotonic)


class Proxy(LoopbackProxy):
    """A running proxy.

    Attributes:
        url: where it listens.
        faults: what goes wrong now.
        requests: requests by method and path, watches as WATCH, failed ones included.
        writes: what the API server has answered, in that order.
        after_write: called with the number of the write, from 1, before its answer is passed on; in the proxy's thread.
    """

    largest = 2**24
    runner: ClassVar[dict[str, Any]] = {"handler_cancellation": True}

    def __init__(self, upstream: str, ca: Path, seed: int = 0) -> None:
        super().__init__()
        self.faults = Faults()
        self.requests: Counter[tuple[str, str]] = Counter()
        self.writes: list[Write] = []
        self.after_write: Callable[[int], None] = lambda number: None
        self._upstream = upstream
        self._ca = ca
        self._random = random.Random(seed)
        self._stale: dict[str, tuple[int, bytes, str]] = {}

    def kubeconfig(self, path: Path, token: str) -> Path:
        """Writes a kubeconfig that leads through the proxy, as the user of a token."""
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "proxy", "cluster": {"server": self.url}}],
            "users": [{"name": "user", "user": {"token": token}}],
            "contexts": [{"name": "proxy", "context": {"cluster": "proxy", "user": "user"}}],
            "current-context": "proxy",
        }
        path.write_text(json.dumps(config))
        path.chmod(0o600)
        return path

    def client(self) -> aiohttp.ClientSession:
        context = ssl.create_default_context(cafile=str(self._ca))
        connector = aiohttp.TCPConnector(ssl=context, limit=0)
        timeout = aiohttp.ClientTimeout(total=None)
        return aiohttp.ClientSession(connector=connector, timeout=timeout, skip_auto_headers=["Accept-Encoding"])

    async def handle(self, request: web.Request) -> web.StreamResponse:
        watch = request.query.get("watch") in ("1", "true")
        self.requests["WATCH" if watch else request.method, request.path] += 1
        if self.faults.away:
            return hang_up(request)
        if watch:
            return await self._watch(request)
        fault = self._random.choice(("500", "429", "lost")) if self._random.random() < self.faults.refused else ""
        if fault == "500":
            return _status(500, "InternalError")
        if fault == "429":
            return _status(429, "TooManyRequests", {"Retry-After": "1"})
        answer = await self._forward(request)
        if fault == "lost":
            await self._forever(request)
        return answer

    async def _forward(self, request: web.Request) -> web.Response:
        body = await request.read()
        is_list = request.method == "GET" and self._concerned(request) and "limit" in request.query
        if is_list and self.faults.stale_lists and request.path_qs in self._stale:
            status, content, kind = self._stale[request.path_qs]
            return web.Response(status=status, body=content, headers={"Content-Type": kind})
        async with self._ask(request, body) as answer:
            content = await answer.read()
            response = web.Response(status=answer.status, body=content, headers=_passed(answer.headers))
        if is_list and self.faults.stale_lists:
            self._stale[request.path_qs] = (response.status, content, response.headers["Content-Type"])
        elif not self.faults.stale_lists:
            self._stale.clear()
        if request.method != "GET":
            self.writes.append(Write(request.method, request.path, response.status))
            self.after_write(len(self.writes))
        return response

    async def _watch(self, request: web.Request) -> web.StreamResponse:
        if self._concerned(request) and self.faults.expired_watches > 0:
            self.faults.expired_watches -= 1
            return _status(410, "Expired")
        started = time.monotonic()
        async with self._ask(request, b"") as answer:
            response = web.StreamResponse(status=answer.status, headers=_passed(answer.headers))
            await response.prepare(request)
            while True:
                piece = b""
                with suppress(TimeoutError):
                    async with asyncio.timeout(0.1):  # how late a fault may take effect on a watch that is quiet
                        piece = await answer.content.readany()
                        if not piece:
                            break
                concerned, cut = self._concerned(request), self.faults.cut_watches
                if concerned and self.faults.silent_watches:
                    await self._forever(request)
                if self.faults.away or (concerned and cut is not None and time.monotonic() - started > cut):
                    return hang_up(request)
                if piece:
                    await response.write(piece)
        return response

    def _ask(self, request: web.Request, body: bytes) -> aiohttp.client._RequestContextManager:
        headers = [(name, value) for name, value in request.headers.items() if name.lower() not in _HOP]
        return self.session.request(request.method, self._upstream + request.path_qs, headers=headers, data=body)

    def _concerned(self, request: web.Request) -> bool:
        return self.faults.only in request.path

    async def _forever(self, request: web.Request) -> None:
        """Until the caller gives up, which cancels this."""
        while request.transport and not request.transport.is_closing():
            await asyncio.sleep(0.1)


def _passed(headers: aiohttp.typedefs.LooseHeaders) -> dict[str, str]:
    return {name: value for name, value in dict(headers).items() if name.lower() not in _HOP}


def _status(code: int, reason: str, headers: dict[str, str] | None = None) -> web.Response:
    body = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": reason, "code": code}
    return web.json_response(body | {"message": f"{reason}, says the test's proxy"}, status=code, headers=headers)
