"""Serves a run's telemetry: `GET /metrics` for Prometheus, `GET /progress` for the operator."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from prometheus_client import CONTENT_TYPE_LATEST

from finetune_api.errors import FinetuneError
from finetune_trainer.telemetry import Telemetry


class _Everywhere(ThreadingHTTPServer):
    """Listens on every address, of IPv6 too where this machine has it."""

    address_family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()


@contextmanager
def served(telemetry: Telemetry, port: int, host: str = "127.0.0.1") -> Iterator[int]:
    """Serves until the block is left; yields the port.

    Args:
        port: 0 takes a free one.
        host: address to listen on; empty: every one that this machine has.

    Raises:
        FinetuneError: the port is taken.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if path == "/metrics":
                self._answer(200, CONTENT_TYPE_LATEST, telemetry.metrics())
            elif path == "/progress":
                report = telemetry.report(time.monotonic())
                body = report.model_dump_json(by_alias=True, exclude_none=True).encode()
                self._answer(200, "application/json", body)
            else:
                self._answer(404, "text/plain", b"there are /metrics and /progress\n")

        def _answer(self, status: int, kind: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            """Nothing: a scrape is no news."""

    try:
        server = (ThreadingHTTPServer if host else _Everywhere)((host, port), Handler)
    except OSError as error:
        raise FinetuneError(
            f"{host}:{port} cannot be listened on: {error.strerror}", hint="choose another port"
        ) from error
    thread = threading.Thread(target=server.serve_forever, name="telemetry", daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
