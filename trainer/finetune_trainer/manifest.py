"""prepared/manifest.json: what was prepared, under which key, in which shards. Its presence means prepare finished."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Final, Literal

from pydantic import Field, ValidationError

from finetune_api.base import Model
from finetune_api.errors import StorageError

MANIFEST_FILE: Final = "manifest.json"
REPORT_FILE: Final = "data-report.json"
VERSION: Final = 1

Split = Literal["train", "evaluation"]


class TokenizerFacts(Model):
    """The tokenizer that made the ids, as far as training and export need it."""

    vocabulary_size: int = Field(description="Entries, added tokens included: one more than the largest id.")
    eos_token_id: int | None = Field(description="The tokenizer's end-of-text token.")
    end_of_turn_token_ids: list[int] = Field(description="Tokens that end an assistant turn; generation stops at them.")
    chat_template_sha256: str | None = Field(description="Hash of the chat template; null without one.")
    sha256: str = Field(description="Hash of the tokenizer's files.")


class SourceFacts(Model):
    """One file of rows, as it was read."""

    uri: str
    format: str = Field(description="chat, completion or text.")
    rows: int
    bytes: int = Field(description="Size in storage, compressed if the file is.")
    sha256: str = Field(description="Hash of the file in storage.")


class ShardFacts(Model):
    """One Arrow IPC file of packed sequences."""

    file: str = Field(description="Name inside the prepared folder.")
    sha256: str
    bytes: int
    sequences: int


class SplitFacts(Model):
    """Totals of one split and its shards, in order."""

    sequences: int
    documents: int
    tokens: int
    target_tokens: float = Field(description="Sum of the loss weights.")
    shards: list[ShardFacts]


class Splits(Model):
    """Both splits; evaluation may be empty."""

    train: SplitFacts
    evaluation: SplitFacts


class Manifest(Model):
    """What `prepare` made. Equal keys mean equal shards."""

    version: Literal[1] = VERSION
    key: str = Field(description="sha256 over data spec, tokenizer, template and source hashes.")
    sequence_length: int
    packing: bool
    tokenizer: TokenizerFacts
    sources: list[SourceFacts]
    splits: Splits

    def split(self, name: Split) -> SplitFacts:
        """Facts of one split."""
        return self.splits.train if name == "train" else self.splits.evaluation


def read_manifest(prepared: Path) -> Manifest:
    """Reads `prepared/manifest.json`.

    Raises:
        StorageError: there is none, or it is damaged.
    """
    file = prepared / MANIFEST_FILE
    try:
        return Manifest.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        raise StorageError("nothing is prepared here", where=str(file), hint="run `finetune prepare` first") from None
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise StorageError(
            f"the manifest is damaged: {field}: {first['msg']}",
            where=str(file),
            hint="delete the prepared folder and prepare again",
        ) from None


def write_manifest(prepared: Path, manifest: Manifest) -> None:
    """Writes `prepared/manifest.json` atomically: it is whole, or it is not there."""
    write_json(prepared / MANIFEST_FILE, manifest.model_dump(mode="json"))


def write_json(file: Path, value: object) -> None:
    """Writes JSON atomically and durably, for people to read: indented, keys in the order given."""
    partial = file.with_name(file.name + ".partial")
    with partial.open("w", encoding="utf-8") as out:
        json.dump(value, out, indent=2, ensure_ascii=False)
        out.write("\n")
        out.flush()
        os.fsync(out.fileno())
    partial.replace(file)
