"""Ports for servers that tests start."""

from __future__ import annotations

import random
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path


def free_port() -> int:
    """A loopback port that nobody listens on, below those that the kernel gives to others meanwhile."""
    while True:
        port = random.randrange(10_000, 30_000)
        with socket.socket() as free, suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port


def wait_for_port(
    server: subprocess.Popen[bytes], host: str, port: int, log: Path | None = None, seconds: float = 60
) -> None:
    """Returns as soon as the server listens.

    Raises:
        RuntimeError: it ended; what is in `log` is in the message.
        OSError: it does not listen after `seconds`.
    """
    end = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, port), timeout=1).close()
        except OSError:
            if server.poll() is not None:
                raise RuntimeError(f"it ended with {server.returncode}: {log.read_text() if log else ''}") from None
            if time.monotonic() > end:
                raise
            time.sleep(0.05)
        else:
            return
