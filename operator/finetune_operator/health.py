"""The HTTP servers for Kubernetes and Prometheus: /healthz, /readyz and /metrics."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Final

from aiohttp import web

from finetune_api.errors import FinetuneError

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Sites = dict[str, dict[str, Handler]]  # by address and path

OFF: Final = "0"


def parse_address(text: str) -> tuple[str | None, int]:
    """Host and port of ``:8080``, ``127.0.0.1:8080`` or ``[::1]:8080``; no host means every address.

    Raises:
        FinetuneError: the text is something else.
    """
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdecimal() or int(port) > 65_535:
        raise FinetuneError(f"{text!r} is no address to listen on", hint="write for example :8080, or 0 for none")
    return host.strip("[]") or None, int(port)


def checked(problems: Callable[[], list[str]]) -> Handler:
    """Answers 200 while there are no problems, else 503 with one in each line."""

    async def handle(_request: web.Request) -> web.Response:
        found = problems()
        return web.Response(status=503 if found else 200, text="".join(f"{line}\n" for line in found or ["ok"]))

    return handle


def page(render: Callable[[], bytes], content_type: str) -> Handler:
    """Answers with a page that is made in a thread: ten thousand jobs' series take longer than the loop may stand."""

    async def handle(_request: web.Request) -> web.Response:
        return web.Response(body=await asyncio.to_thread(render), headers={"Content-Type": content_type})

    return handle


@asynccontextmanager
async def serve(sites: Sites) -> AsyncIterator[list[tuple[str, int]]]:
    """Serves handlers; yields the addresses that are listened on.

    Raises:
        FinetuneError: an address is malformed or cannot be had.
    """
    runners: list[web.AppRunner] = []
    try:
        listening: list[tuple[str, int]] = []
        for address, handlers in sites.items():
            if address == OFF:
                continue
            host, port = parse_address(address)
            app = web.Application()
            app.add_routes([web.get(path, handler) for path, handler in handlers.items()])
            runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
            runners.append(runner)
            await runner.setup()
            try:
                await web.TCPSite(runner, host, port).start()
            except OSError as error:
                raise FinetuneError(f"cannot listen on {address}: {error.strerror}") from error
            listening += [(str(name[0]), int(name[1])) for name in runner.addresses]
        yield listening
    finally:
        for runner in runners:
            await runner.cleanup()
