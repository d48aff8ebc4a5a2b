"""Files to and from a real S3 server, behind a proxy that answers 503, cuts, slows and lies about lengths."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from finetune_api.errors import SpecError, StorageError
from finetune_trainer import storage
from finetune_trainer.patience import may_pass, persistently
from finetune_trainer.stores import azure_options, gcs_options, s3_options
from finetune_trainer.unfinished import end_unfinished
from tests.faulty import FaultyStore
from tests.s3 import S3Server, s3_server

CONTENT = bytes(range(256)) * (80 << 10)  # 20 MiB: several parts of a multipart upload


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with s3_server(tmp_path_factory.mktemp("s3")) as running:
        (running.root / "data").mkdir()
        (running.root / "data" / "large").write_bytes(CONTENT)
        yield running


@pytest.fixture
def store(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyStore]:
    with FaultyStore(server.endpoint) as proxy:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


def _at(name: str, folder: Path) -> storage.Location:
    return storage.resolve(f"s3://data/{name}", folder)


def test_what_breaks_off_is_continued_where_it_was(tmp_path: Path, store: FaultyStore) -> None:
    store.faults.cut_answers = 4
    storage.download(_at("large", tmp_path), tmp_path / "copy")
    assert store.faults.cut_answers == 0
    assert (tmp_path / "copy").read_bytes() == CONTENT


def test_a_store_that_is_overloaded_for_a_while_is_waited_for(tmp_path: Path, store: FaultyStore) -> None:
    store.faults.unavailable = 8  # more than pyarrow itself tries
    storage.download(_at("large", tmp_path), tmp_path / "copy")
    store.faults.unavailable = 8
    storage.upload(tmp_path / "copy", _at("again", tmp_path))
    assert storage.read_bytes(_at("again", tmp_path)) == CONTENT


def test_an_answer_that_holds_less_than_it_should_is_no_whole_file(tmp_path: Path, store: FaultyStore) -> None:
    store.faults.shorter = 2
    storage.download(_at("large", tmp_path), tmp_path / "copy", hashlib.sha256(CONTENT).hexdigest())
    assert store.faults.shorter == 0
    assert (tmp_path / "copy").read_bytes() == CONTENT


def test_a_store_that_always_lies_is_told_and_leaves_nothing(
    tmp_path: Path, store: FaultyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FINETUNE_STORAGE_PATIENCE", "1")
    store.faults.shorter = 1_000_000
    with pytest.raises(StorageError, match="SHA-256 is another") as caught:
        storage.download(_at("large", tmp_path), tmp_path / "copy", hashlib.sha256(CONTENT).hexdigest())
    assert caught.value.where == "s3://data/large"
    assert not (tmp_path / "copy").exists()


def test_an_upload_whose_connection_is_lost_is_done_again(tmp_path: Path, store: FaultyStore) -> None:
    (tmp_path / "large").write_bytes(CONTENT)
    store.faults.cut_uploads = 5
    storage.upload(tmp_path / "large", _at("uploaded", tmp_path))
    assert store.faults.cut_uploads == 0
    store.faults.bytes_per_second = 200 << 20
    assert storage.read_bytes(_at("uploaded", tmp_path)) == CONTENT


def test_half_an_upload_is_never_taken_for_the_file(tmp_path: Path, store: FaultyStore, server: S3Server) -> None:
    """pyarrow completes an upload when it is closed, also after an error."""
    (tmp_path / "large").write_bytes(CONTENT)

    blocks = []

    def break_off(size: int) -> None:
        blocks.append(size)
        if len(blocks) == 2:
            raise RuntimeError

    with pytest.raises(RuntimeError):
        storage.upload(tmp_path / "large", _at("half", tmp_path), break_off)
    assert not (server.root / "data" / "half").exists()


_KILLED = """
import os, sys
from pathlib import Path
from finetune_trainer import storage
seen = []
def pace(size):
    seen.append(size)
    if len(seen) == 3:
        os._exit(9)
storage.upload(Path(sys.argv[1]), storage.resolve(sys.argv[2], "/"), pace)
"""


def test_what_a_killed_upload_left_is_ended(tmp_path: Path, store: FaultyStore, server: S3Server) -> None:
    (tmp_path / "large").write_bytes(CONTENT)
    for name in ("work/job one/shard", "work/other/shard"):
        command = [sys.executable, "-c", _KILLED, str(tmp_path / "large"), f"s3://data/{name}"]
        assert subprocess.run(command, check=False).returncode == 9
    assert not storage.exists(_at("work/job one/shard", tmp_path))
    assert end_unfinished(_at("work/job one", tmp_path)) == 1
    assert end_unfinished(_at("work/job one", tmp_path)) == 0
    assert end_unfinished(_at("work", tmp_path)) == 1, "another job's is left alone"


def test_a_file_that_changes_while_it_is_read_is_told(tmp_path: Path, store: FaultyStore, server: S3Server) -> None:
    changing = server.root / "data" / "changing"
    changing.write_bytes(CONTENT)
    store.faults.bytes_per_second = 16 << 20

    def change() -> None:
        while store.requests["GET"] < 2:
            pass
        changing.write_bytes(CONTENT[:-1])

    writer = threading.Thread(target=change)
    writer.start()
    with pytest.raises(StorageError):
        storage.download(_at("changing", tmp_path), tmp_path / "copy")
    writer.join()
    assert not (tmp_path / "copy").exists()


def test_a_refusal_is_not_asked_for_again(tmp_path: Path, store: FaultyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    monkeypatch.setenv("FINETUNE_STORAGE_PATIENCE", "3600")
    with pytest.raises(StorageError):
        storage.download(_at("large", tmp_path), tmp_path / "copy")


def test_what_moves_has_the_whole_budget_again() -> None:
    clock, moved, calls = [0.0], [0], [0]

    def act() -> str:
        calls[0] += 1
        clock[0] += 8.0
        if calls[0] < 6:
            moved[0] += 1
            raise OSError("reset")
        return "done"

    def sleep(seconds: float) -> None:
        clock[0] += seconds

    assert persistently(act, moved=lambda: moved[0], sleep=sleep, now=lambda: clock[0]) == "done"
    calls[0] = -1_000
    with pytest.raises(OSError, match="reset"):
        persistently(act, sleep=sleep, now=lambda: clock[0])


def test_what_a_disk_says_is_final() -> None:
    assert not may_pass(OSError(28, "No space left on device"))
    assert not may_pass(FileNotFoundError("k"))
    assert may_pass(OSError("AWS Error NETWORK_CONNECTION during HeadObject operation"))


@pytest.fixture
def secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A secret as the pods see it: one file for each key."""
    folder = tmp_path / "secret"
    folder.mkdir()
    monkeypatch.setenv("FINETUNE_STORAGE_SECRET", str(folder))
    return folder


def test_keys_come_from_the_mounted_secret(
    tmp_path: Path, server: S3Server, secret: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ENDPOINT_URL", "AWS_REGION", "AWS_EC2_METADATA_DISABLED"):
        monkeypatch.setenv(name, server.environment[name])
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        (secret / name).write_text(server.environment[name] + "\n")
        monkeypatch.setenv(name, "of something else")
    assert storage.exists(_at("large", tmp_path))


def test_an_endpoint_with_a_certificate_of_ones_own_is_reached(
    tmp_path: Path, server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.s3 import certificate

    monkeypatch.setenv("FINETUNE_STORAGE_PATIENCE", "1")
    folder = tmp_path / "tls"
    folder.mkdir()
    files = certificate(tmp_path)
    with s3_server(folder, files) as secure:
        (secure.root / "data").mkdir()
        for name, value in secure.environment.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(StorageError):
            storage.exists(_at("large", tmp_path))
        monkeypatch.setenv("AWS_CA_BUNDLE", str(files[0]))
        assert not storage.exists(_at("large", tmp_path))


def test_a_pods_own_identity_is_asked_for_keys(
    tmp_path: Path, server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As EKS Pod Identity gives them: from an address, with a token from a file."""
    asked = []

    class Agent(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.headers["Authorization"])
            body = json.dumps(
                {
                    "AccessKeyId": server.environment["AWS_ACCESS_KEY_ID"],
                    "SecretAccessKey": server.environment["AWS_SECRET_ACCESS_KEY"],
                    "Token": "",
                    "Expiration": "2099-01-01T00:00:00Z",
                }
            ).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Agent) as agent:
        thread = threading.Thread(target=agent.serve_forever)
        thread.start()
        (tmp_path / "token").write_text("pod-token")
        for name in ("AWS_ENDPOINT_URL", "AWS_REGION", "AWS_EC2_METADATA_DISABLED"):
            monkeypatch.setenv(name, server.environment[name])
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"http://127.0.0.1:{agent.server_port}/v1")
        monkeypatch.setenv("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", str(tmp_path / "token"))
        assert storage.exists(_at("large", tmp_path))
        agent.shutdown()
        thread.join()
    assert asked == ["pod-token"]


def test_buckets_are_named_in_the_host_when_the_runtime_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://objects.example.com")
    assert not s3_options("bucket")["force_virtual_addressing"], "servers other than AWS want it in the path"
    monkeypatch.setenv("FINETUNE_S3_PATH_STYLE", "0")
    assert s3_options("bucket")["force_virtual_addressing"]


def test_googles_library_is_told_where_the_secrets_key_is(secret: Path) -> None:
    (secret / "GOOGLE_APPLICATION_CREDENTIALS_JSON").write_text("{}")
    assert "anonymous" not in gcs_options()
    assert os.environ["GOOGLE_APPLICATION_CREDENTIALS"] == str(secret / "GOOGLE_APPLICATION_CREDENTIALS_JSON")


def test_an_azure_account_comes_with_the_first_kind_of_key_there_is(
    secret: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert azure_options("c@a.dfs.core.windows.net", "")[1] == {"account_name": "a"}
    (secret / "AZURE_TENANT_ID").write_text("t")
    (secret / "AZURE_CLIENT_ID").write_text("i")
    assert azure_options("c@a.dfs.core.windows.net", "")[1] == {"account_name": "a"}, "a workload identity"
    (secret / "AZURE_CLIENT_SECRET").write_text("s")
    client = {"tenant_id": "t", "client_id": "i", "client_secret": "s"}
    assert azure_options("c@a.dfs.core.windows.net", "") == ("c", {"account_name": "a"} | client)
    (secret / "AZURE_STORAGE_KEY").write_text("k")
    assert azure_options("c@a.dfs.core.windows.net", "")[1] == {"account_name": "a", "account_key": "k"}
    with pytest.raises(SpecError, match="names no storage account"):
        azure_options("container", "spec.output.uri")


def test_another_azure_than_the_public_cloud_is_named_by_its_endpoint(secret: Path) -> None:
    (secret / "AZURE_STORAGE_SERVICE_ENDPOINT").write_text("https://a.blob.core.usgovcloudapi.net/")
    options = azure_options("c@a.dfs.core.windows.net", "")[1]
    assert options["blob_storage_authority"] == ".blob.core.usgovcloudapi.net", "pyarrow puts the account before it"
    assert options["dfs_storage_authority"] == ".dfs.core.usgovcloudapi.net"
    assert options["blob_storage_scheme"] == options["dfs_storage_scheme"] == "https"
