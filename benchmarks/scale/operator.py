"""The operator as an admin would run it: default settings, a Lease, jobs of all namespaces."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.api.cluster import Cluster
from tests.api.operator import Operator, operator


@contextmanager
def running(c: Cluster, folder: Path) -> Iterator[tuple[Operator, int]]:
    """The operator and the port of its metrics."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = {
        "leader-elect": "",
        "operator-namespace": "default",
        "metrics-bind-address": f"127.0.0.1:{port}",
        "progress-interval": "10s",
        "progress-timeout": "3s",
        "request-timeout": "10s",
    }
    with operator(c, folder, flags=flags) as started:
        yield started, port
