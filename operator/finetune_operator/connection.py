"""Where the API server is and how to sign in: from the pod's service account or a kubeconfig file."""

from __future__ import annotations

import os
import urllib.request
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import aiohttp
from kubernetes.aio import config
from kubernetes.aio.client import Configuration

from finetune_api.errors import FinetuneError
from finetune_operator.settings import Settings

_READ_BUFFER: Final = 1 << 20  # bytes

# The guard of the write that this task is sending.
_sending: ContextVar[Callable[[], None] | None] = ContextVar("sending", default=None)


@contextmanager
def guarded(guard: Callable[[], None]) -> Iterator[None]:
    """Requests of this block ask `guard` twice: now, and when their connection stands, which may be much later."""
    guard()
    token = _sending.set(guard)
    try:
        yield
    finally:
        _sending.reset(token)


async def _ask_guard(*_: object) -> None:
    """Called by aiohttp just before it writes a request to a connection."""
    if guard := _sending.get():
        guard()


async def configure(settings: Settings) -> tuple[Configuration, Coroutine[Any, Any, None] | None]:
    """The client library's configuration, and what keeps a sign-in by an external command fresh.

    Raises:
        FinetuneError: there is no configuration, or it cannot be used.
    """
    configuration = Configuration()
    refresh = None
    files = settings.kubeconfig or os.environ.get("KUBECONFIG")
    try:
        if "KUBERNETES_SERVICE_HOST" in os.environ and not files and not settings.context:
            config.load_incluster_config(configuration)
        else:
            files = files or "~/.kube/config"
            if not any(Path(file).expanduser().is_file() for file in files.split(os.pathsep)):
                hint = "run in a cluster, or name a kubeconfig file with --kubeconfig"
                raise FinetuneError(f"there is no {files}", hint=hint)
            loader = await config.load_kube_config(
                files, context=settings.context, client_configuration=configuration, persist_config=False
            )
            refresh = config.refresh_token(loader, configuration)
    except config.ConfigException as error:
        raise FinetuneError(f"the cluster's configuration cannot be used: {error}") from error
    host = urlsplit(configuration.host)
    if not configuration.proxy and host.hostname and not urllib.request.proxy_bypass(host.hostname):
        configuration.proxy = urllib.request.getproxies().get(host.scheme)
    # With trust_env aiohttp would ask a thread for the environment's proxies at every request. The API server cuts a
    # watch whose reader does not keep up for a moment, which 64 KiB, aiohttp's default, do not bridge: 20 jobs.
    configuration.client_session_kwargs = {
        "trust_env": False,
        "cookie_jar": aiohttp.DummyCookieJar(),
        "read_bufsize": _READ_BUFFER,
    }
    configuration.connection_pool_maxsize = 0  # no bound: each watch keeps a connection, the workers bound the rest
    tracing = aiohttp.TraceConfig()
    tracing.on_connection_create_end.append(_ask_guard)
    tracing.on_connection_reuseconn.append(_ask_guard)
    configuration.trace_configs = [tracing]
    return configuration, refresh
