"""A kubelet's container logs: a node on loopback whose pods say what the test writes.

The API server asks it as it asks a real kubelet, so what a client reads has gone through the real subresource `log`.
"""

from __future__ import annotations

import secrets
import ssl
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.api.cluster import Cluster
from tests.api.objects import Api, Object


@dataclass
class _Log:
    lines: list[bytes] = field(default_factory=list)
    ended: bool = False


class LogNode:
    """A node, and the logs of its pods. Made by `log_node`."""

    def __init__(self, api: Api, name: str) -> None:
        self.name = name
        self._api = api
        self._logs: dict[tuple[str, bool], _Log] = defaultdict(_Log)
        self._changed = threading.Condition()
        self._closed = False

    def pod(self, namespace: str, name: str, labels: dict[str, str], container: str = "ray-worker") -> None:
        """Makes a pod on this node whose container runs."""
        spec = {"nodeName": self.name, "containers": [{"name": container, "image": "example.com/trainer:1"}]}
        metadata = {"name": name, "labels": labels}
        self._api.create({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}, namespace=namespace)
        self._set(namespace, name, container, "Running", {"running": {}})

    def waits(self, namespace: str, name: str, container: str, reason: str) -> None:
        """The pod's container has not started yet."""
        self._set(namespace, name, container, "Pending", {"waiting": {"reason": reason}})

    def write(self, pod: str, *lines: str, previous: bool = False) -> None:
        """Lines of a pod's log; `previous`: of the container before its restart."""
        with self._changed:
            self._logs[pod, previous].lines += [f"{line}\n".encode() for line in lines]
            self._changed.notify_all()

    def end(self, namespace: str, name: str, container: str = "ray-worker") -> None:
        """The container ends well, and its log with it."""
        self._set(namespace, name, container, "Succeeded", {"terminated": {"exitCode": 0}})
        with self._changed:
            self._logs[name, False].ended = True
            self._changed.notify_all()

    def read(self, pod: str, *, previous: bool, follow: bool, tail: int | None) -> Iterator[bytes]:
        """What a kubelet would send."""
        log = self._logs[pod, previous]
        at = 0 if tail is None else max(0, len(log.lines) - tail)
        while True:
            with self._changed:
                if follow:
                    self._changed.wait_for(partial(self._has_more, log, at))
                new, at, over = log.lines[at:], len(log.lines), log.ended or self._closed or not follow
            yield from new
            if over:
                return

    def close(self) -> None:
        """Ends every log."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _has_more(self, log: _Log, at: int) -> bool:
        return len(log.lines) > at or log.ended or self._closed

    def _set(self, namespace: str, name: str, container: str, phase: str, state: Object) -> None:
        status = {
            "name": container,
            "image": "example.com/trainer:1",
            "imageID": "",
            "ready": "running" in state,
            "restartCount": 0,
            "state": state,
        }
        change = {"status": {"phase": phase, "containerStatuses": [status]}}
        self._api.patch("v1/Pod", name, namespace, change, status=True)


@contextmanager
def log_node(api: Api, cluster: Cluster) -> Iterator[LogNode]:
    """A node of its own, gone on leaving."""
    node = LogNode(api, f"logs-{secrets.token_hex(4)}")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            url = urlsplit(self.path)
            _, what, _, pod, _ = url.path.split("/")
            assert what == "containerLogs"
            query = {key: values[0] for key, values in parse_qs(url.query).items()}
            self.send_response(200)
            self.end_headers()
            tail = int(query["tailLines"]) if "tailLines" in query else None
            previous, follow = query.get("previous") == "true", query.get("follow") == "true"
            for line in node.read(pod, previous=previous, follow=follow, tail=tail):
                self.wfile.write(line)
                self.wfile.flush()

        def log_message(self, *_: Any) -> None:
            """Says nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cluster.ca, cluster.ca.with_suffix(".key"))
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    api.create({"apiVersion": "v1", "kind": "Node", "metadata": {"name": node.name}})
    status = {
        "addresses": [{"type": "InternalIP", "address": "127.0.0.1"}],
        "daemonEndpoints": {"kubeletEndpoint": {"Port": server.server_port}},
    }
    api.patch("v1/Node", node.name, "", {"status": status}, status=True)
    try:
        yield node
    finally:
        api.delete("v1/Node", node.name)
        node.close()
        server.shutdown()
        thread.join()
        server.server_close()
