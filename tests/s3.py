"""A real S3 server (versitygw) on this machine, for tests: `with s3_server(folder) as server: …`."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.ports import free_port, wait_for_port
from tests.tools.build import build


@dataclass(frozen=True)
class S3Server:
    """A running server. Its buckets are the folders below `root`."""

    endpoint: str
    root: Path
    environment: dict[str, str]  # what a client needs: endpoint, region and credentials
    process: int


@contextmanager
def s3_server(folder: Path, tls: tuple[Path, Path] | None = None, host: str = "127.0.0.1") -> Iterator[S3Server]:
    """Serves the folders below `folder`/buckets; stops when the block is left.

    Args:
        tls: certificate and key, for HTTPS.
        host: address of this machine.
    """
    root, attributes = folder / "buckets", folder / "attributes"
    root.mkdir()
    attributes.mkdir()
    port = free_port()
    endpoint = f"{'https' if tls else 'http'}://{host}:{port}"
    access, secret = "finetune-test", "finetune-test-secret"
    server = subprocess.Popen(
        [
            build("versitygw") / "versitygw",
            "--port",
            f"{host}:{port}",
            "--quiet",
            *(["--cert", str(tls[0]), "--key", str(tls[1])] if tls else []),
            "posix",
            "--sidecar",
            attributes,
            root,
        ],
        env={"ROOT_ACCESS_KEY": access, "ROOT_SECRET_KEY": secret},
        stdout=subprocess.DEVNULL,
    )
    try:
        wait_for_port(server, host, port)
        yield S3Server(
            endpoint=endpoint,
            root=root,
            environment={
                "AWS_ENDPOINT_URL": endpoint,
                "AWS_ACCESS_KEY_ID": access,
                "AWS_SECRET_ACCESS_KEY": secret,
                "AWS_REGION": "us-east-1",
                "AWS_EC2_METADATA_DISABLED": "true",
            },
            process=server.pid,
        )
    finally:
        server.terminate()
        server.wait()


def certificate(folder: Path) -> tuple[Path, Path]:
    """A self-signed certificate for this machine, and its key."""
    files = folder / "tls.crt", folder / "tls.key"
    subject = ["-subj", "/CN=test", "-addext", "subjectAltName=IP:127.0.0.1"]
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += [*subject, "-days", "2", "-out", str(files[0]), "-keyout", str(files[1])]
    subprocess.run(command, check=True, capture_output=True)
    return files
