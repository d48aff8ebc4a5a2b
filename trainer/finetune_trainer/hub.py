"""Models of a Hugging Face hub, by revision: which files they consist of, and those files.

    HF_ENDPOINT           another hub than huggingface.co
    HF_TOKEN              for gated and private models: a key of the storage's secret, or the environment
    FINETUNE_HF_MIRROR    a folder in a bucket that stands in for the hub, for clusters that reach none

In a mirror a model is `ORG/NAME/COMMIT/…` with its `origin.json` written last, and `ORG/NAME/refs/REVISION` holds the
commit that a branch or tag stood for; `finetune mirror` makes both.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from finetune_api.errors import ModelError, SpecError, StorageError
from finetune_trainer import storage
from finetune_trainer.origin import Origin
from finetune_trainer.patience import persistently
from finetune_trainer.stores import secret

SCHEME: Final = "hf://"
MIRROR_FILE: Final = "origin.json"
_SOURCE: Final = re.compile(r"hf://([^/@]+/[^/@]+)(?:@(.+))?")
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_WHERE: Final = "spec.model.source"


def look(source: str) -> Origin:
    """The files of a model, at the commit that its revision stands for now.

    Raises:
        ModelError: there is no such model or revision, or it is gated.
        StorageError: hub or mirror does not answer.
    """
    repository, revision = parse(source)
    if mirror := os.environ.get("FINETUNE_HF_MIRROR"):
        return _look_in_mirror(source, repository, revision, mirror)
    info: Any = _asked(source, lambda api: api.model_info(repository, revision=revision, files_metadata=True))
    files = {file.rfilename: file.size or 0 for file in info.siblings}
    hashes = {file.rfilename: file.lfs.sha256 for file in info.siblings if file.lfs}
    return Origin(source=source, commit=info.sha, files=files, sha256=hashes)


def bring(origin: Origin, name: str, folder: Path) -> None:
    """Copies one file of a model to `folder`.

    Raises:
        ModelError: the hub does not give it.
        StorageError: it does not come, or is not what it should be.
    """
    repository, _ = parse(origin.source)
    if mirror := os.environ.get("FINETUNE_HF_MIRROR"):
        at = mirrored(mirror, repository, origin.commit or "").inside(name)
        storage.download(at, folder / name, origin.sha256.get(name))
        return
    _asked(
        origin.source,
        lambda api: api.hf_hub_download(repository, name, revision=origin.commit, local_dir=folder),
    )
    if (digest := origin.sha256.get(name)) and storage.sha256(folder / name) != digest:
        (folder / name).unlink()
        raise StorageError(
            f"{name} is not what the hub says it is: its SHA-256 is another",
            where=origin.source,
            hint="try again; if it stays so, a proxy or mirror on the way is at fault",
        )


def clean(folder: Path) -> None:
    """Removes what the hub's library keeps beside the files."""
    shutil.rmtree(folder / ".cache", ignore_errors=True)


def parse(source: str) -> tuple[str, str]:
    """Repository and revision of hf://ORG/NAME@REVISION.

    Raises:
        SpecError: it is none.
    """
    found = _SOURCE.fullmatch(source)
    if found is None:
        raise SpecError("this is no model of a hub", where=_WHERE, hint="write hf://ORG/NAME@REVISION")
    return found[1], found[2] or "main"


def mirrored(mirror: str, repository: str, commit: str) -> storage.Location:
    """Where a model lies in a mirror."""
    return storage.resolve(f"{mirror.rstrip('/')}/{repository}/{commit}", "/", where="FINETUNE_HF_MIRROR")


def reference(mirror: str, repository: str, revision: str) -> storage.Location:
    """The file that says which commit a branch or tag stands for."""
    name = quote(revision, safe="")
    return storage.resolve(f"{mirror.rstrip('/')}/{repository}/refs", "/", where="FINETUNE_HF_MIRROR").inside(name)


def _look_in_mirror(source: str, repository: str, revision: str, mirror: str) -> Origin:
    commit = revision
    if not _COMMIT.fullmatch(revision):
        at = reference(mirror, repository, revision)
        commit = (storage.read_bytes(at) or b"").decode().strip()
    content = storage.read_bytes(mirrored(mirror, repository, commit).inside(MIRROR_FILE)) if commit else None
    if content is None:
        raise ModelError(
            f"the mirror has no {repository} at {revision}", where=source, hint=f"finetune mirror {source} {mirror}"
        )
    return Origin.model_validate_json(content).model_copy(update={"source": source})


def _asked(source: str, question: Any) -> Any:
    """The hub's answer; what it refuses in words that say what to do."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    endpoint = os.environ.get("HF_ENDPOINT") or None
    api = HfApi(endpoint=endpoint, token=secret("HF_TOKEN") or False)

    def ask() -> Any:
        try:
            return question(api)
        except GatedRepoError:
            raise _refused(source, "the model is gated", "accept its terms, and give a token of that account") from None
        except RepositoryNotFoundError:
            hint = "check the name; a private model needs HF_TOKEN in the storage's secret"
            raise _refused(source, "the hub knows no such model, or not for this token", hint) from None
        except (RevisionNotFoundError, EntryNotFoundError):
            raise _refused(source, "the model has no such revision", "check what stands behind @") from None
        except OfflineModeIsEnabled:
            hint = "unset HF_HUB_OFFLINE, or set FINETUNE_HF_MIRROR"
            raise _refused(source, "HF_HUB_OFFLINE is set", hint) from None
        except HfHubHTTPError as error:
            status = error.response.status_code if error.response is not None else 0
            if 400 <= status < 500 and status != 429:
                hint = "check HF_TOKEN in the storage's secret" if status in (401, 403) else "check the address"
                raise _refused(source, f"the hub refuses it (HTTP {status})", hint) from None
            raise OSError(f"the hub answers with HTTP {status}") from None
        except OSError:
            raise
        except Exception as error:  # of its HTTP library, which may change
            raise OSError(f"the hub does not answer ({type(error).__name__})") from None

    with storage.explained(source, hint="check HF_ENDPOINT and that this machine reaches it"):
        return persistently(ask)


def _refused(source: str, what: str, hint: str) -> ModelError:
    return ModelError(what, where=source, hint=hint)
