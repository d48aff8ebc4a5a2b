"""Base models of a hub, fetched by its own client from a small server that speaks the hub's endpoints.

The hub itself cannot be run here, and an answer that was recorded could not break off.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune_api.errors import FinetuneError, ModelError, StorageError
from finetune_trainer import base_model
from finetune_trainer.origin import file_names
from tests.hub import COMMIT, FILES, TOKEN, Hub, served_hub
from tests.s3 import s3_server


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # the tests' environment has set it, so that none is asked
    monkeypatch.setenv("FINETUNE_STORAGE_SECRET", str(tmp_path / "secret"))
    (tmp_path / "secret").mkdir()
    with served_hub() as served:
        monkeypatch.setenv("HF_ENDPOINT", served.url)
        yield served


def _copied(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".origin"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def _look_and_fetch(source: str, folder: Path) -> None:
    base_model.fetch(base_model.look(source, folder), folder / "model", folder)


def _error(source: str, folder: Path) -> FinetuneError:
    with pytest.raises(FinetuneError) as caught:
        _look_and_fetch(source, folder)
    assert TOKEN not in str(caught.value)
    assert "→" in str(caught.value), "it says what to do"
    return caught.value


def test_a_branch_becomes_its_commit_and_only_data_is_copied(tmp_path: Path, hub: Hub) -> None:
    origin = base_model.look("hf://org/model@v1", tmp_path)
    assert origin.commit == COMMIT
    base_model.fetch(origin, tmp_path / "model", tmp_path)
    data = ("config.json", "tokenizer.json", "model.safetensors")
    assert _copied(tmp_path / "model") == {name: FILES[name] for name in data}
    assert not [path for path in hub.asked if path.endswith((".py", ".bin"))], "code and pickles are not even asked for"


def test_rows_need_no_weights(tmp_path: Path, hub: Hub) -> None:
    base_model.fetch(base_model.look("hf://org/model", tmp_path), tmp_path / "model", tmp_path, weights=False)
    assert "model.safetensors" not in _copied(tmp_path / "model")
    assert "model.safetensors" in file_names(tmp_path / "model")


def test_a_download_that_breaks_off_is_continued(tmp_path: Path, hub: Hub) -> None:
    hub.broken = 2
    base_model.fetch(base_model.look("hf://org/model", tmp_path), tmp_path / "model", tmp_path)
    assert hub.broken == 0
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == FILES["model.safetensors"]


def test_weights_with_another_hash_are_refused(tmp_path: Path, hub: Hub) -> None:
    hub.wrong = True
    error = _error("hf://org/model", tmp_path)
    assert isinstance(error, StorageError)
    assert "SHA-256" in str(error)
    assert not (tmp_path / "model" / "model.safetensors").exists()


def test_a_gated_model_needs_the_secrets_token(tmp_path: Path, hub: Hub) -> None:
    hub.gated = True
    error = _error("hf://org/model", tmp_path)
    assert isinstance(error, ModelError)
    assert "gated" in error.what
    (tmp_path / "secret" / "HF_TOKEN").write_text(TOKEN)
    assert base_model.look("hf://org/model", tmp_path).commit == COMMIT


def test_a_missing_model_and_a_missing_revision_are_named(tmp_path: Path, hub: Hub) -> None:
    assert "no such model" in _error("hf://org/other", tmp_path).what
    error = _error("hf://org/model@nowhere", tmp_path)
    assert isinstance(error, ModelError)
    assert "no such revision" in error.what


def test_a_hub_that_is_away_is_told_after_the_budget(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("FINETUNE_STORAGE_PATIENCE", "1")
    assert isinstance(_error("hf://org/model", tmp_path), StorageError)


def test_a_mirror_in_a_bucket_stands_in_for_the_hub(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune_trainer.commands import mirror

    with s3_server(tmp_path) as server:
        (server.root / "data").mkdir()
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        mirror.main(["hf://org/model@v1", "s3://data/mirror"], standalone_mode=False)
        asked = len(hub.asked)
        monkeypatch.setenv("FINETUNE_HF_MIRROR", "s3://data/mirror")
        origin = base_model.look("hf://org/model@v1", tmp_path)
        base_model.fetch(origin, tmp_path / "model", tmp_path)
        assert len(hub.asked) == asked, "the hub is not asked"
        assert origin.commit == COMMIT
        assert (tmp_path / "model" / "model.safetensors").read_bytes() == FILES["model.safetensors"]
        assert "the mirror has no org/other" in _error("hf://org/other", tmp_path).what


def test_a_hub_is_loaded_only_for_models_of_one() -> None:
    script = "import sys, finetune_trainer.base_model; print('huggingface_hub' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "False\n"
    )
