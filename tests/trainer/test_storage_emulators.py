"""Azure Blob Storage and Google Cloud Storage through the interface that S3 is used by, on their emulators."""

from __future__ import annotations

import base64
import hashlib
import itertools
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from finetune_api.errors import StorageError
from finetune_api.run import METRICS_FILE, RunConfig
from finetune_trainer import storage
from finetune_trainer.patience import may_pass
from finetune_trainer.reporter import MetricsFile, read_metrics
from finetune_trainer.train import train
from tests import require
from tests.emulators import ACCOUNT, azurite, google_storage, shared_access_signature
from tests.faulty import FaultyStore
from tests.tiny import tiny_llama
from tests.trainer.jobs import Prepared, chats, jsonl
from tests.trainer.jobs import run_config as job_config
from tests.trainer.runs import documents, prepare_sequences, run_config

CONTENT = bytes(range(256)) * (80 << 10)  # 20 MiB: several blocks of Azure's, several parts of Google's
AZURE = f"abfs://data@{ACCOUNT}.dfs.core.windows.net"


@dataclass(frozen=True)
class Emulator:
    """A running emulator with a container or bucket named data, which `uri` is."""

    uri: str
    environment: dict[str, str]


@pytest.fixture(scope="module")
def azure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Emulator]:
    require.tools("azurite")
    with azurite(tmp_path_factory.mktemp("azurite")) as environment:
        with pytest.MonkeyPatch.context() as setting:
            for name, value in environment.items():
                setting.setenv(name, value)
            storage.resolve(AZURE, "/").fs.create_dir("data")
        yield Emulator(AZURE, environment)


@pytest.fixture(scope="module")
def google(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Emulator]:
    with google_storage(tmp_path_factory.mktemp("google"), "data") as environment:
        yield Emulator("gs://data", environment)


@pytest.fixture(params=["azure", "google"])
def store(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Emulator:
    return _used(request.getfixturevalue(request.param), monkeypatch)


def _used(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> Emulator:
    for name, value in emulator.environment.items():
        monkeypatch.setenv(name, value)
    return emulator


def _at(store: Emulator, name: str) -> storage.Location:
    return storage.resolve(f"{store.uri}/{name}", "/")


def _write(location: storage.Location, content: bytes, folder: Path) -> None:
    (folder / "source").write_bytes(content)
    storage.upload(folder / "source", location)


def test_files_are_written_listed_read_overwritten_and_removed(tmp_path: Path, store: Emulator) -> None:
    root = _at(store, "files")
    _write(root.inside("large"), CONTENT, tmp_path)
    _write(root.inside("a folder/ü+%.txt"), b"small", tmp_path)
    _write(root.inside("a folder/_hidden"), b"hidden", tmp_path)
    storage.download(root.inside("large"), tmp_path / "copy", hashlib.sha256(CONTENT).hexdigest())
    found = {file.location.uri.removeprefix(store.uri): file.size for file in storage.list_files(root)}
    assert found == {"/files/a folder/ü+%.txt": 5, "/files/large": len(CONTENT)}
    assert [file.size for file in storage.list_files(root.inside("large"))] == [len(CONTENT)]

    _write(root.inside("large"), b"other", tmp_path)
    assert storage.read_bytes(root.inside("large")) == b"other"
    storage.remove_file(root.inside("large"))
    storage.remove_file(root.inside("large"))
    assert storage.read_bytes(root.inside("large")) is None
    assert storage.exists(root.inside("a folder"))
    storage.remove_folder(root.inside("a folder"))
    storage.remove_folder(root.inside("a folder"))
    assert not storage.exists(root.inside("a folder"))


def test_a_busy_store_is_waited_for_and_a_broken_download_continued(
    tmp_path: Path, azure: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write(_at(_used(azure, monkeypatch), "busy/large"), CONTENT, tmp_path)
    address, _, account = azure.environment["AZURE_STORAGE_SERVICE_ENDPOINT"].rpartition("/")
    with FaultyStore(address) as proxy:
        monkeypatch.setenv("AZURE_STORAGE_SERVICE_ENDPOINT", f"{proxy.url}/{account}")
        proxy.faults.unavailable, proxy.faults.cut_answers = 2, 3
        storage.download(_at(azure, "busy/large"), tmp_path / "copy")
        assert (proxy.faults.unavailable, proxy.faults.cut_answers) == (0, 0)
    assert (tmp_path / "copy").read_bytes() == CONTENT


def test_a_published_folder_has_its_last_file_only_when_it_has_all(
    tmp_path: Path, store: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, target = tmp_path / "out", _at(store, "published")
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "weights").write_bytes(CONTENT)
    (folder / "manifest.json").write_text("{}")
    storage.publish(folder, target, last="manifest.json")
    assert storage.read_bytes(target.inside("manifest.json")) == b"{}"
    assert storage.read_bytes(target.inside("model/weights")) == CONTENT
    (folder / "unreadable").symlink_to("/proc/self/mem")  # a file whose disk answers with an error
    monkeypatch.setenv("FINETUNE_STORAGE_PATIENCE", "0")
    with pytest.raises(StorageError):
        storage.publish(folder, target, last="manifest.json")
    assert not storage.exists(target.inside("manifest.json"))
    assert not storage.exists(target.inside("unreadable"))


_KILLED = """
import os, sys
from pathlib import Path
from finetune_trainer import storage
blocks = []
def pace(size):
    blocks.append(size)
    if len(blocks) == int(sys.argv[3]):
        os._exit(9)
storage.upload(Path(sys.argv[1]), storage.resolve(sys.argv[2], "/"), pace)
"""


@pytest.mark.parametrize("block", [1, 3])
def test_an_upload_that_is_killed_leaves_nothing_that_is_taken_for_the_file(
    tmp_path: Path, store: Emulator, block: int
) -> None:
    (tmp_path / "large").write_bytes(CONTENT)
    target = _at(store, f"killed/{block}")
    command = [sys.executable, "-c", _KILLED, str(tmp_path / "large"), target.uri, str(block)]
    assert subprocess.run(command, check=False).returncode == 9
    assert storage.read_bytes(target) is None
    storage.upload(tmp_path / "large", target)
    assert storage.read_bytes(target) == CONTENT


def _refused(store: Emulator, name: str) -> StorageError:
    with pytest.raises(StorageError) as caught:
        storage.list_files(_at(store, name))
    assert "→" in str(caught.value), "it says what to do"
    return caught.value


def test_what_is_not_there_is_named(store: Emulator) -> None:
    assert "no such file or folder" in _refused(store, "nothing").what
    elsewhere = Emulator(store.uri.replace("data", "other"), store.environment)
    assert "no such file or folder" in _refused(elsewhere, "nothing").what


def test_a_wrong_key_is_told_at_once_and_not_shown(azure: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    _used(azure, monkeypatch)
    monkeypatch.setenv("FINETUNE_STORAGE_PATIENCE", "3600")
    for key in (base64.b64encode(b"of another account").decode(), "no-base-64"):
        monkeypatch.setenv("AZURE_STORAGE_KEY", key)
        error = _refused(azure, "any")
        assert "AZURE_STORAGE_KEY" in str(error)
        assert key not in str(error)


@pytest.mark.parametrize("mark", ["", "?"])
def test_a_shared_access_signature_opens_the_container_and_is_shown_nowhere(
    azure: Emulator, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path, mark: str
) -> None:
    _used(azure, monkeypatch)
    monkeypatch.delenv("AZURE_STORAGE_KEY")
    token = shared_access_signature(azure.environment["AZURE_STORAGE_KEY"])
    monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", mark + token)
    _write(_at(azure, "signed"), b"small", tmp_path)
    assert storage.read_bytes(_at(azure, "signed")) == b"small"
    monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", mark + token.replace("sp=rwdlac", "sp=rwdla"))
    at = _at(azure, "signed")
    with pytest.raises(StorageError) as caught, storage.explained(at.uri):
        at.fs.delete_file(at.path)
    assert "AuthorizationFailure" in str(caught.value)
    assert f"/{ACCOUNT}/data/signed" in str(caught.value), "pyarrow shows the URL, with the signature in it"
    assert "sig=" not in str(caught.value) + caplog.text
    assert token[-20:] not in str(caught.value) + caplog.text


def test_a_key_file_of_google_that_is_none_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "GOOGLE_APPLICATION_CREDENTIALS_JSON").write_text("a-secret that is no JSON")
    monkeypatch.setenv("FINETUNE_STORAGE_SECRET", str(tmp_path))
    error = _refused(Emulator("gs://data", {}), "any")
    assert "GOOGLE_APPLICATION_CREDENTIALS_JSON" in str(error)
    assert "a-secret" not in str(error)


def test_clear_refusals_are_final_also_in_azures_and_googles_words() -> None:
    """A container that is not there costs pyarrow 15 s before it says so, and no emulator of Google's refuses."""
    said = (
        "UploadFrom failed for 'http://…'. Azure Error: [ContainerNotFound] 404 The specified container does not exist."
    )
    assert not may_pass(OSError(said))
    assert may_pass(OSError("GetProperties failed for 'http://…'. Azure Error: [] 500 Internal Server Error"))
    assert not may_pass(OSError("google::cloud::Status(PERMISSION_DENIED: Permanent error …)"))
    assert may_pass(OSError("google::cloud::Status(UNAVAILABLE: Retry policy exhausted, with a last message of …)"))


def test_rows_in_a_container_give_the_shards_of_local_rows(tmp_path: Path, store: Emulator) -> None:
    model = tiny_llama(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_bytes(jsonl(chats(30)))
    storage.upload(tmp_path / "rows.jsonl", _at(store, "rows/a.jsonl"))
    remote = Prepared(job_config(tmp_path, model, {"train": [{"uri": f"{store.uri}/rows"}]}))
    local = Prepared(job_config(tmp_path, model, work="other"))
    assert [source.uri for source in remote.manifest.sources] == [f"{store.uri}/rows/a.jsonl"]
    assert remote.files()["train-00000.arrow"] == local.files()["train-00000.arrow"]


def test_a_run_goes_on_from_its_checkpoint_in_a_container(tmp_path: Path, store: Emulator) -> None:
    model, sequences = tiny_llama(tmp_path / "model"), [[document] for document in documents(12, seed=3)]
    losses: dict[tuple[str, int], float] = {}
    done = []
    for name, remote in (("whole", None), ("parted", _at(store, "work"))):
        for stop_after in (None,) if remote is None else (4, None):
            folder = tmp_path / f"{name}-{stop_after}"  # the disk of another machine
            prepare_sequences(folder, sequences)
            run = run_config(folder, model, training={"maxSteps": 6}, checkpoint={"everySteps": 1, "keep": 1})
            now = _trained(run, remote, stop_after)
            losses |= {(name, step): loss for step, loss in now.items()}
            done.append(list(now))
    assert done == [[1, 2, 3, 4, 5, 6], [1, 2, 3], [4, 5, 6]]
    assert [losses["parted", step] for step in range(1, 7)] == [losses["whole", step] for step in range(1, 7)]
    kept = {file.location.path.split("/")[-2] for file in storage.list_files(_at(store, "work/checkpoints"))}
    assert kept == {"step-00000006"}


def _trained(run: RunConfig, remote: storage.Location | None, stop_after: int | None) -> dict[int, float]:
    """The loss of each step that was done now."""
    steps = itertools.count(1)
    with MetricsFile(Path(run.work) / METRICS_FILE) as metrics:
        train(run, metrics, remote=remote, should_stop=lambda: next(steps) == stop_after)
    events = read_metrics(Path(run.work) / METRICS_FILE)
    return {event["step"]: event["loss"] for event in events if event["event"] == "step"}
