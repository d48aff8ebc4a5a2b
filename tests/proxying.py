"""A proxy of a test's own on loopback, in a thread of its own: what every one of them needs, whatever it breaks."""

from __future__ import annotations

import asyncio
import threading
from abc import ABC, abstractmethod
from types import TracebackType
from typing import Any, ClassVar, Self

import aiohttp
from aiohttp import web


class LoopbackProxy(ABC):
    """Runs while its block does; `handle` and `client` are a subclass's.

    Attributes:
        url: where it listens.
        largest: bytes of the largest body that it takes.
        runner: further options of aiohttp's AppRunner.
    """

    largest: ClassVar[int]
    runner: ClassVar[dict[str, Any]]

    def __init__(self) -> None:
        self.url = ""
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name=type(self).__name__)

    @abstractmethod
    def client(self) -> aiohttp.ClientSession:
        """What asks the server behind the proxy; made in its loop, then at `self.session`."""

    @abstractmethod
    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answers a request."""

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._started.wait(10), "the proxy does not start"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        async with self.client() as self.session:
            app = web.Application(client_max_size=self.largest)
            app.router.add_route("*", "/{path:.*}", self.handle)
            runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, **self.runner)
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
            self._started.set()
            await self._stop.wait()
            await runner.cleanup()


def hang_up(request: web.Request) -> web.Response:
    """Closes the connection in place of an answer."""
    if request.transport:
        request.transport.abort()
    return web.Response()
