"""What a base model consists of, fixed once for all pods of a job."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from pydantic import Field

from finetune_api.base import Model

ORIGIN_FILE: Final = ".origin.json"  # in a copy; written last
_WEIGHTS: Final = re.compile(r"(?!consolidated)[^/]+\.safetensors")  # consolidated: all once more, in Mistral's layout
_OTHERS: Final = re.compile(r"[^/]+\.(json|jinja|model)|merges\.txt")


class Origin(Model):
    """A base model's files. Only data is copied: safetensors, configuration, tokenizer; no code, no pickles."""

    source: str = Field(description="The job's spec.model.source.")
    commit: str | None = Field(None, description="Commit that a hub's revision stood for.")
    files: dict[str, int] = Field(description="Bytes of every file, by its name in the folder.")
    sha256: dict[str, str] = Field(default_factory=dict, description="Of the files whose hash the hub tells.")

    def wanted(self, *, weights: bool) -> list[str]:
        """Names of the files that are copied."""
        kinds = (_OTHERS, _WEIGHTS) if weights else (_OTHERS,)
        return sorted(name for name in self.files if any(kind.fullmatch(name) for kind in kinds))


def read_origin(folder: Path) -> Origin | None:
    """Where a copy is from; None for a folder that is no copy."""
    file = folder / ORIGIN_FILE
    return Origin.model_validate_json(file.read_bytes()) if file.exists() else None


def file_names(folder: Path) -> set[str]:
    """Names of the model's files, also of those that were not copied."""
    origin = read_origin(folder)
    return set(origin.files) if origin else {path.name for path in folder.iterdir() if path.is_file()}
