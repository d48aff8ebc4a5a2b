"""Rows and base models in a bucket, read from a real S3 server, and folders published to it."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune_api.errors import StorageError
from finetune_trainer import storage
from finetune_trainer.pipeline import open_run
from finetune_trainer.prepare import prepare
from finetune_trainer.prepare.cluster.exchange import Exchange
from tests.faulty import FaultyStore
from tests.s3 import S3Server, s3_server
from tests.tiny import tiny_llama
from tests.trainer.jobs import Prepared, chats, jsonl, run_config
from tests.trainer.without_ray import FINE, on_cluster, without_ray


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        rows = server.root / "data" / "rows"
        rows.mkdir(parents=True)
        (rows / "a.jsonl").write_bytes(jsonl(chats(30)))
        (rows / "b.jsonl.gz").write_bytes(gzip.compress(jsonl(chats(60)[30:])))
        yield server


@pytest.fixture
def server(running: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    for name, value in running.environment.items():
        monkeypatch.setenv(name, value)
    return running


def test_rows_in_a_bucket_give_the_shards_of_local_rows(tmp_path: Path, model: Path, server: S3Server) -> None:
    data = {"train": [{"uri": "s3://data/rows"}], "evaluationFraction": 0.2}
    remote = Prepared(run_config(tmp_path, model, data), workers=1)
    (tmp_path / "rows").symlink_to(server.root / "data" / "rows")
    data["train"] = [{"uri": (server.root / "data" / "rows").as_uri()}]
    local = Prepared(run_config(tmp_path, model, data, work="other"))
    shards = {name: content for name, content in local.files().items() if name.endswith(".arrow")}
    assert len(shards) == 2
    assert {name: remote.files()[name] for name in shards} == shards
    assert remote.manifest.key == local.manifest.key
    assert [source.uri for source in remote.manifest.sources] == ["s3://data/rows/a.jsonl", "s3://data/rows/b.jsonl.gz"]


def test_rows_that_break_off_are_read_on_where_they_were(
    tmp_path: Path, model: Path, server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = jsonl(chats(4_000))
    (server.root / "data" / "broken.jsonl").write_bytes(rows)
    table = b"text\n" + b"A row of words.\n" * 20 + b"Last\n"
    (server.root / "data" / "broken.csv.gz").write_bytes(gzip.compress(table))
    data = {"train": [{"uri": "s3://data/broken.jsonl"}, {"uri": "s3://data/broken.csv.gz"}]}
    whole = Prepared(run_config(tmp_path, model, data))
    with FaultyStore(server.endpoint) as store:
        monkeypatch.setenv("AWS_ENDPOINT_URL", store.url)
        store.faults.cut_answers, store.faults.cut_after = 9, 1 << 10
        store.faults.unavailable = 8  # more than pyarrow itself tries
        broken = Prepared(run_config(tmp_path, model, data, work="other"))
        assert (store.faults.cut_answers, store.faults.unavailable) == (0, 0)
    assert broken.files() == whole.files()


def test_machines_may_exchange_through_a_bucket(
    tmp_path: Path, model: Path, server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_ray(monkeypatch)
    (server.root / "data" / "exchange").mkdir()
    exchange = Exchange(storage.resolve("s3://data/exchange", tmp_path))
    data = {"train": [{"uri": "s3://data/rows"}], "evaluationFraction": 0.2}
    here = Prepared(run_config(tmp_path, model, data))
    there = Prepared(run_config(tmp_path, model, data, work="other"), opener=on_cluster(FINE, lambda spill: exchange))
    assert there.files() == here.files()
    assert any(path.name.startswith("tokens-") for path in (server.root / "data" / "exchange").iterdir())
    with pytest.raises(StorageError):
        exchange.read("nothing")
    exchange.delete("nothing")


def test_folders_of_code_in_a_bucket_give_the_shards_of_local_ones(
    tmp_path: Path, model: Path, server: S3Server
) -> None:
    for repository in ("one", "two"):
        folder = server.root / "data" / "code" / repository / "package"
        folder.mkdir(parents=True)
        for name in ("__init__.py", "b.py", "a.go"):
            (folder / name).write_text(f"{repository} = '{name}'\n" * 3)
    data = {"fim": {"rate": 0}, "deduplicate": "none", "packing": False}
    for work, root in (("remote", "s3://data/code"), ("local", (server.root / "data" / "code").as_uri())):
        sources = [{"uri": f"{root}/{name}/", "format": "code"} for name in ("one", "two")]
        prepared = Prepared(run_config(tmp_path, model, data | {"train": sources}, work=work))
        assert [source.rows for source in prepared.manifest.sources] == [3, 3]
        assert prepared.manifest.splits.train.documents == 2, "one for each repository"
    shards = [(tmp_path / work / "prepared" / "train-00000.arrow").read_bytes() for work in ("remote", "local")]
    assert shards[0] == shards[1]


def _refused(folder: Path, model: Path, uri: str) -> StorageError:
    with pytest.raises(StorageError) as caught:
        prepare(run_config(folder, model, {"train": [{"uri": uri}]}), workers=0)
    assert caught.value.where == uri
    assert "secret" not in str(caught.value)
    assert "→" in str(caught.value), "it says what to do"
    return caught.value


def test_a_missing_key_is_named(tmp_path: Path, model: Path, server: S3Server) -> None:
    assert "no such file or folder" in _refused(tmp_path, model, "s3://data/other.jsonl").what


def test_a_missing_bucket_is_named(tmp_path: Path, model: Path, server: S3Server) -> None:
    assert "no such file or folder" in _refused(tmp_path, model, "s3://other/rows.jsonl").what


@pytest.mark.parametrize("name", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_refused_credentials_are_told_in_the_buckets_words(
    tmp_path: Path, model: Path, server: S3Server, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "wrong-secret")
    assert "AWS Error" in _refused(tmp_path, model, "s3://data/rows/a.jsonl").what


def test_a_server_that_is_not_there_is_told(
    tmp_path: Path, model: Path, server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("FINETUNE_STORAGE_PATIENCE", "1")
    assert "NETWORK_CONNECTION" in _refused(tmp_path, model, "s3://data/rows/a.jsonl").what


def _tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_is_published_to_a_bucket(tmp_path: Path, server: S3Server) -> None:
    (tmp_path / "out" / "model").mkdir(parents=True)
    (tmp_path / "out" / "model" / "weights").write_bytes(b"1" * 100_000)
    (tmp_path / "out" / "manifest.json").write_text("{}")
    target = storage.resolve("s3://data/published/run", tmp_path)
    storage.publish(tmp_path / "out", target, last="manifest.json")
    assert _tree(server.root / "data" / "published" / "run") == _tree(tmp_path / "out")
    assert storage.exists(target)


def test_a_publication_that_breaks_off_leaves_no_marker(tmp_path: Path, server: S3Server) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.json").write_text("{}")
    target = storage.resolve("s3://data/broken", tmp_path)
    storage.publish(tmp_path / "out", target, last="manifest.json")
    (tmp_path / "out" / "weights").write_bytes(b"")
    (server.root / "data" / "broken" / "weights" / "in-the-way").mkdir(parents=True)
    with pytest.raises(StorageError):
        storage.publish(tmp_path / "out", target, last="manifest.json")
    assert not (server.root / "data" / "broken" / "manifest.json").exists()


def test_a_folder_is_published_to_a_disk_in_one_step(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.json").write_text("new")
    target = storage.resolve("published", tmp_path)
    assert target.local is not None
    target.local.mkdir()
    (target.local / "old").write_text("old")
    storage.publish(tmp_path / "out", target, last="manifest.json")
    assert _tree(target.local) == {"manifest.json": b"new"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "published"]


def _model_opened(folder: Path, source: str) -> Path:
    """Where a run of a job with this base model finds it."""
    spec = {"model": {"source": source}, "data": {"train": [{"uri": "rows.jsonl"}]}, "output": {"uri": "output"}}
    job = {"apiVersion": "finetune.dev/v1alpha1", "kind": "FinetuneJob", "metadata": {"name": "tiny"}, "spec": spec}
    (folder / "job.yaml").write_text(json.dumps(job))
    with open_run(folder / "job.yaml", folder / "run", fresh=False) as run:
        return Path(run.model_path)


def test_a_base_model_in_a_bucket_is_copied_for_each_source(tmp_path: Path, model: Path, server: S3Server) -> None:
    shutil.copytree(model, server.root / "data" / "models" / "one")
    shutil.copytree(model, server.root / "data" / "models" / "two")
    (server.root / "data" / "models" / "two" / "config.json").write_text("{}")
    one = _model_opened(tmp_path, "s3://data/models/one")
    copied = {file.name: file.read_bytes() for file in one.iterdir() if not file.name.startswith(".")}
    assert copied == {file.name: file.read_bytes() for file in model.iterdir()}
    assert (_model_opened(tmp_path, "s3://data/models/two") / "config.json").read_text() == "{}"
    assert _model_opened(tmp_path, "s3://data/models/one") == one


def test_a_base_model_that_is_not_in_the_bucket_is_named(tmp_path: Path, server: S3Server) -> None:
    with pytest.raises(StorageError) as caught:
        _model_opened(tmp_path, "s3://data/models/none")
    assert caught.value.where == "spec.model.source"
