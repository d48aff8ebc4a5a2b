"""Servers that speak like Azure Blob Storage (Azurite) and Google Cloud Storage, for tests."""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final
from urllib.parse import quote

from tests.ports import free_port, wait_for_port
from tests.tools.build import build, node

ACCOUNT: Final = "finetunetest"
# By itself it serves one request at a time; pyarrow leaves an answer half read and asks on.
_THREADED: Final = """
from http import server
server.HTTPServer = server.ThreadingHTTPServer
from gcp_storage_emulator.__main__ import main
main()
"""


@contextmanager
def azurite(folder: Path) -> Iterator[dict[str, str]]:
    """Azurite with one account; yields a client's environment. Its files lie in memory, its log in `folder`.

    It knows no hierarchical namespace, and no other identities than keys and signatures.
    """
    port, key = free_port(), base64.b64encode(os.urandom(64)).decode()
    main = build("azurite") / "node_modules" / "azurite" / "dist" / "src" / "blob" / "main.js"
    command = [str(node()), str(main), "--blobPort", str(port), "--inMemoryPersistence", "--disableTelemetry"]
    command += ["--silent", "--skipApiVersionCheck"]  # pyarrow 26 speaks 2026-10-06, which this one does not know yet
    with _running(command, folder, port, {"AZURITE_ACCOUNTS": f"{ACCOUNT}:{key}"}):
        yield {
            "AZURE_STORAGE_SERVICE_ENDPOINT": f"http://127.0.0.1:{port}/{ACCOUNT}",
            "AZURE_STORAGE_ACCOUNT": ACCOUNT,
            "AZURE_STORAGE_KEY": key,
        }


def shared_access_signature(key: str) -> str:
    """A token for everything that blobs of the account allow, as `az storage account generate-sas` prints it."""
    permissions, services, resources, expiry, version = "rwdlac", "b", "sco", "2099-01-01T00:00:00Z", "2021-12-02"
    lines = (ACCOUNT, permissions, services, resources, "", expiry, "", "http,https", version, "", "")
    text = "\n".join(lines).encode()
    signature = base64.b64encode(hmac.digest(base64.b64decode(key), text, hashlib.sha256)).decode()
    fields = {"se": expiry, "sig": signature, "sp": permissions, "spr": "http,https", "srt": resources}
    fields |= {"ss": services, "sv": version}
    return "&".join(f"{name}={quote(value, safe='')}" for name, value in fields.items())


@contextmanager
def google_storage(folder: Path, bucket: str) -> Iterator[dict[str, str]]:
    """gcp-storage-emulator with one bucket; yields a client's environment. It asks nobody for keys."""
    port = free_port()
    command = [
        sys.executable,
        "-c",
        _THREADED,
        "start",
        "--host=127.0.0.1",
        f"--port={port}",
        "--in-memory",
        f"--default-bucket={bucket}",
    ]
    with _running(command, folder, port, {}):
        yield {"STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{port}"}


@contextmanager
def _running(command: list[str], folder: Path, port: int, environment: dict[str, str]) -> Iterator[None]:
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen(
            command, cwd=folder, env=os.environ | environment, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        wait_for_port(server, "127.0.0.1", port, folder / "server.log")
        yield
    finally:
        server.terminate()
        server.wait()
