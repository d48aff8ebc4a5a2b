"""The job API of every Ray dashboard, as KubeRay asks for it: `with Dashboards(cluster.ray_proxy_port) as dashboards`.

Stands in for Ray's head pods, which nothing runs here. KubeRay reaches it as an HTTP proxy, so the URL says which
cluster is meant: http://<RayCluster>-head-svc.<namespace>.svc.cluster.local:8265/api/jobs/<submission id>.
"""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

# What Ray 2.60 says with each state of a job.
MESSAGES: Final = {
    "PENDING": "Job has not started yet. It may be waiting for the runtime environment to be set up.",
    "RUNNING": "Job is currently running.",
    "SUCCEEDED": "Job finished successfully.",
    "STOPPED": "Job was intentionally stopped.",
    "FAILED": "Job entrypoint command failed with exit code 6, last available logs (truncated to 20,000 chars):\n",
}
_FINAL: Final = frozenset({"SUCCEEDED", "STOPPED", "FAILED"})


class Request(NamedTuple):
    """One request of KubeRay's."""

    method: str
    host: str
    path: str
    token: str
    body: dict[str, Any]


class Dashboards:
    """Jobs by submission id; what KubeRay submits is PENDING until `say` says more.

    Attributes:
        requests: all of them, in their order.
        away: hosts that do not answer, as a head that is gone.
    """

    def __init__(self, port: int) -> None:
        self.jobs: dict[str, dict[str, Any]] = {}
        self.requests: list[Request] = []
        self.away: set[str] = set()
        self._server = _Server(("127.0.0.1", port), _Handler)
        self._server.dashboards = self
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> Dashboards:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def say(self, job: str, status: str, message: str = "") -> None:
        """Brings a job that was submitted into one of Ray's states."""
        times = {"start_time": 1_795_450_174_052} | ({"end_time": 1_795_450_194_052} if status in _FINAL else {})
        self.jobs[job] = {"submission_id": job, "status": status, "message": message or MESSAGES[status]} | times

    def answer(self, request: Request) -> tuple[int, object]:
        """Status and body; a text is sent as it is."""
        self.requests.append(request)
        if request.host in self.away:
            return 502, "Bad Gateway"
        if not request.token:
            return 401, "Unauthorized: Missing authentication token"
        job, _, verb = request.path.removeprefix("/api/jobs/").partition("/")
        if request.method == "POST" and not job:
            submitted: str = request.body["submission_id"]
            if submitted in self.jobs:
                return 500, f"Job with submission_id {submitted} already exists. Please use a different submission_id."
            self.jobs[submitted] = {"submission_id": submitted, "status": "PENDING", "message": MESSAGES["PENDING"]}
            return 200, {"job_id": submitted, "submission_id": submitted}
        if job not in self.jobs:
            return 404, f"Job {job} does not exist"
        if verb == "stop":
            return 200, {"stopped": True}
        return 200, self.jobs[job]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    dashboards: Dashboards


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        self._answer({})

    def do_POST(self) -> None:
        self._answer(json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}"))

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name in the standard library
        """Nothing: `requests` has them."""

    def _answer(self, body: dict[str, Any]) -> None:
        url = urlsplit(self.path)
        token = self.headers.get("x-ray-authorization", "")
        request = Request(self.command, url.hostname or "", url.path, token, body)
        status, said = self.server.dashboards.answer(request)
        data = (said if isinstance(said, str) else json.dumps(said)).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
