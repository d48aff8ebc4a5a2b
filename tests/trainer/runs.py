"""Run folders with prepared shards of random documents, for tests of the training loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from finetune_api.job import FinetuneJobSpec
from finetune_api.run import PREPARED, RunConfig
from finetune_trainer.deepspeed_config import merged
from finetune_trainer.manifest import Manifest, Split, Splits, TokenizerFacts, write_manifest
from finetune_trainer.prepare.shards import ShardWriter

VOCABULARY = 512
Sequence = list[list[int]]  # its documents' token ids

SPEC: dict[str, Any] = {
    "model": {"source": "model"},
    "method": {"tuning": "full"},
    "data": {"train": [{"uri": "rows.jsonl"}], "sequenceLength": 64},
    "training": {
        "sequencesPerBatch": 4,
        "learningRate": 1e-3,
        "schedule": "constant",
        "warmup": 0,
        "precision": "fp32",
        "seed": 5,
    },
    "output": {"uri": "output"},
}


def documents(count: int, seed: int, shortest: int = 4, longest: int = 40) -> list[list[int]]:
    """Token ids of random documents, with some structure to learn: each token is near the one before it."""
    random = np.random.default_rng(seed)
    steps = (random.integers(1, 4, random.integers(shortest, longest + 1)) for _ in range(count))
    return [((np.cumsum(s) + random.integers(VOCABULARY)) % VOCABULARY).tolist() for s in steps]


def prepare_sequences(folder: Path, train: list[Sequence], evaluation: list[Sequence] | None = None) -> None:
    """Writes shards and manifest below `folder`. About two of three tokens count, never the first of a document."""
    prepared = folder / PREPARED
    prepared.mkdir(parents=True, exist_ok=True)

    def write(split: Split, sequences: list[Sequence]) -> Any:
        writer = ShardWriter(prepared, split)
        for sequence in sequences:
            weights = [float(i > 0 and token % 3 > 0) for document in sequence for i, token in enumerate(document)]
            writer.add(
                np.array([t for document in sequence for t in document], np.int32),
                np.array(weights, np.float16),
                np.array([len(document) for document in sequence], np.int32),
            )
        return writer.close()

    facts = TokenizerFacts(
        vocabulary_size=VOCABULARY,
        eos_token_id=2,
        end_of_turn_token_ids=[2],
        chat_template_sha256=None,
        sha256="0" * 64,
    )
    splits = Splits(train=write("train", train), evaluation=write("evaluation", evaluation or []))
    write_manifest(
        prepared,
        Manifest(key="k", sequence_length=64, packing=True, tokenizer=facts, sources=[], splits=splits),
    )


def run_config(folder: Path, model: Path, **changes: Any) -> RunConfig:
    """A run in `folder` of SPEC with `changes` merged in."""
    return RunConfig(
        name="test",
        uid="test",
        spec=FinetuneJobSpec.model_validate(merged(SPEC, changes)),
        base_dir=str(folder),
        model_path=str(model),
        work=str(folder),
    )
