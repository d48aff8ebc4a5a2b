"""A small Hugging Face hub on loopback, with one model, org/model: `with served_hub() as hub: …`."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_test_token"
WEIGHTS = "model.safetensors"
FILES = {
    "config.json": b"{}",
    "tokenizer.json": b'{"t": 1}',
    WEIGHTS: bytes(range(256)) * 4096,
    "modeling_own.py": b"raise SystemExit",
    "pytorch_model.bin": b"pickle",
    "original/consolidated.safetensors": b"twice",
}
_MODEL = "/api/models/org/model/revision/"
_FILE = f"/org/model/resolve/{COMMIT}/"


@dataclass
class Hub:
    """What the hub does, and the paths it was asked for."""

    url: str = ""
    gated: bool = False
    broken: int = 0  # answers with the weights that end in the middle
    wrong: bool = False  # weights that are not what their hash says
    asked: list[str] = field(default_factory=list)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: ClassVar[Hub]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(self.path.partition("?")[0])
        self.hub.asked.append(path)
        if self.hub.gated and self.headers["Authorization"] != f"Bearer {TOKEN}":
            self._refuse(401, "GatedRepo")
        elif path.startswith(_FILE):
            self._file(path.removeprefix(_FILE))
        elif path.startswith(_MODEL) and path.removeprefix(_MODEL) in ("main", "v1", COMMIT):
            self._give(json.dumps({"id": "org/model", "sha": COMMIT, "siblings": _siblings()}).encode(), {})
        else:
            self._refuse(404, "RevisionNotFound" if path.startswith(_MODEL) else "RepoNotFound")

    def _file(self, name: str) -> None:
        content = FILES[name]
        headers = {"ETag": f'"{_sha256(content)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if self.hub.wrong and name == WEIGHTS:
            content = content[::-1]
        start = int((self.headers["Range"] or "bytes=0-")[6:].partition("-")[0])
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        kept = content[start:]
        cut = self.hub.broken > 0 and name == WEIGHTS and self.command == "GET"
        self._give(kept, headers, 206 if start else 200, len(kept) // 2 if cut else None)
        if cut:
            self.hub.broken -= 1
            self.close_connection = True

    def _give(self, body: bytes, headers: dict[str, str], status: int = 200, sent: int | None = None) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:sent])

    def _refuse(self, status: int, code: str) -> None:
        self._give(b"{}", {"X-Error-Code": code}, status)

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def served_hub() -> Iterator[Hub]:
    """Serves until the block is left."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        hub.url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


def _siblings() -> list[dict[str, object]]:
    found: list[dict[str, object]] = []
    for name, content in FILES.items():
        file: dict[str, object] = {"rfilename": name, "size": len(content), "blobId": "0" * 40}
        if name.endswith((".safetensors", ".bin")):
            file["lfs"] = {"sha256": _sha256(content), "size": len(content), "pointerSize": 134}
        found.append(file)
    return found


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
