"""Small prepare runs for tests: rows in a folder, a tiny model, the stage in this process."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from finetune_api.run import PREPARED, RunConfig
from finetune_trainer.dataset import PackedDataset
from finetune_trainer.manifest import REPORT_FILE, Manifest, Split
from finetune_trainer.prepare import Opener, Progress, prepare

Row = Mapping[str, Any]


def chat(question: str, answer: str) -> dict[str, Any]:
    """A chat row of one turn."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def chats(count: int) -> list[dict[str, Any]]:
    """Different chats, no two of them alike."""
    return [chat(f"What is {i} and {i * i}?", f"It is {i * 7}, {i * 11} and {i * 13}.") for i in range(count)]


def jsonl(rows: Iterable[Row]) -> bytes:
    """JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def run_config(
    folder: Path, model: Path, data: Mapping[str, Any] | None = None, work: str = "work", **spec: Any
) -> RunConfig:
    """A run whose relative paths start from `folder`; by default over its rows.jsonl."""
    data = {"train": [{"uri": "rows.jsonl"}], "sequenceLength": 128} | dict(data or {})
    return RunConfig.model_validate(
        {
            "name": "job",
            "uid": "uid",
            "base_dir": str(folder),
            "model_path": str(model),
            "work": str(folder / work),
            "spec": {"model": {"source": "model"}, "output": {"uri": "output"}, "data": data} | spec,
        }
    )


class Prepared:
    """The outcome of one run of the stage."""

    def __init__(
        self, run: RunConfig, workers: int = 0, opener: Opener | None = None, progress: Progress = lambda *_: None
    ) -> None:
        self.manifest: Manifest = prepare(run, progress, workers=workers, opener=opener)
        self.folder = Path(run.work) / PREPARED
        self.report: dict[str, Any] = json.loads((self.folder / REPORT_FILE).read_text())

    def documents(self, split: Split = "train") -> list[list[int]]:
        """Token ids of every document of a split, sorted."""
        data = PackedDataset(self.folder, split)
        found = []
        for index in range(len(data)):
            sequence = data[index]
            start = 0
            for length in sequence.documents.tolist():
                found.append(sequence.input_ids[start : start + length].tolist())
                start += length
        return sorted(found)

    def files(self) -> dict[str, bytes]:
        """Name and content of each file."""
        return {path.name: path.read_bytes() for path in self.folder.iterdir()}
