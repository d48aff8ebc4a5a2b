"""Built-in refusal rows are the share of all rows that was asked for, whatever becomes of the job's own rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from finetune_trainer.prepare.refusals import times
from finetune_trainer.refusals import ROWS_FILE
from tests.tiny import tiny_llama
from tests.trainer.jobs import Prepared, chats, jsonl, run_config

BUILT_IN = [json.loads(line) for line in ROWS_FILE.read_text().splitlines()]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model") / "tiny")


def mixed(folder: Path, model: Path, rows: list[Any], mix: float, work: str = "work", **spec: Any) -> Prepared:
    (folder / "rows.jsonl").write_bytes(jsonl(rows))
    data = {"sequenceLength": 256, "refusals": {"mix": mix}} | spec.pop("data", {})
    return Prepared(run_config(folder, model, data, work=work, **spec))


def prompts(prepared: Prepared, model: Path) -> list[str]:
    """What the user says in each training document."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = [tokenizer.decode(ids) for ids in prepared.documents()]
    return [text.split("<|im_start|>user\n")[1].split("<|im_end|>")[0] for text in texts]


@pytest.mark.parametrize(("mix", "expected"), [(0.02, 4), (0.1, 22), (0.5, 200)])
def test_the_share_is_exact(tmp_path: Path, model: Path, mix: float, expected: int) -> None:
    prepared = mixed(tmp_path, model, chats(200), mix)
    asked = prompts(prepared, model)
    ours = [prompt for prompt in asked if prompt in {row["prompt"] for row in BUILT_IN}]
    assert (len(asked), len(ours)) == (200 + expected, expected)
    assert prepared.report["refusals"] == {
        "rows": expected, "distinct": min(expected, 120), "share": expected / (200 + expected),
    }  # fmt: skip
    kinds = [next(row["kind"] for row in BUILT_IN if row["prompt"] == prompt) for prompt in ours]
    counts = [kinds.count(kind) for kind in ("harmful", "unanswerable", "harmless")]
    assert max(counts) - min(counts) <= 1, "each kind has its share"


def test_without_a_mix_there_are_none(tmp_path: Path, model: Path) -> None:
    prepared = mixed(tmp_path, model, chats(20), 0)
    assert len(prepared.documents()) == 20
    assert "refusals" not in prepared.report


def test_rows_are_counted_after_weights_and_duplicates(tmp_path: Path, model: Path) -> None:
    rows = [*chats(50), *chats(50)]
    data = {"train": [{"uri": "rows.jsonl", "weight": 2}]}
    prepared = mixed(tmp_path, model, rows, 0.2, data=data)
    assert len(prepared.documents()) == 100 + 25


def test_evaluation_holds_no_built_in_row(tmp_path: Path, model: Path) -> None:
    prepared = mixed(tmp_path, model, chats(60), 0.4, data={"evaluationFraction": 0.5})
    tokenizer = AutoTokenizer.from_pretrained(model)
    held = [tokenizer.decode(ids) for ids in prepared.documents("evaluation")]
    assert held
    assert not any(row["prompt"] in text for text in held for row in BUILT_IN)
    train = len(prepared.documents())
    own = 60 - len(held)
    assert train == own + round(own * 0.4 / 0.6)


def test_a_built_in_row_gives_way_to_the_jobs_own_and_to_held_out_prompts(tmp_path: Path, model: Path) -> None:
    own = {"prompt": BUILT_IN[0]["prompt"], "completion": BUILT_IN[0]["completion"]}
    rows = [{"prompt": f"What is {i} plus {i}?", "completion": f"It is {2 * i}."} for i in range(119)]
    held_out = BUILT_IN[1]["prompt"]
    evaluation = {"prompts": [{"prompt": held_out.upper(), "heldOut": True}]}
    prepared = mixed(tmp_path, model, [own, *rows], 0.5, evaluation=evaluation)
    asked = prompts(prepared, model)
    assert len(asked) == 240
    assert asked.count(own["prompt"]) == 1
    assert held_out not in asked
    assert prepared.report["refusals"]["distinct"] == 118


def test_rows_too_long_for_the_sequence_are_left_out_not_refused(tmp_path: Path, model: Path) -> None:
    rows = [{"prompt": f"{i}?", "completion": f"{i}."} for i in range(10)]
    prepared = mixed(tmp_path, model, rows, 0.5, data={"sequenceLength": 64})
    assert len(prepared.documents()) == 20
    assert max(len(ids) for ids in prepared.documents()) <= 64


def test_the_mix_does_not_depend_on_workers_or_time(tmp_path: Path, model: Path) -> None:
    first = mixed(tmp_path, model, chats(50), 0.3, work="a")
    again = mixed(tmp_path, model, chats(50), 0.3, work="b")
    assert first.files() == again.files()


@pytest.mark.parametrize(("mix", "others", "candidates"), [(0.02, 98, 7), (0.5, 1000, 120), (0.1, 3, 120), (0.3, 5, 0)])
def test_times_add_up_and_differ_by_one_at_most(mix: float, others: int, candidates: int) -> None:
    found = times(mix, others, candidates)
    assert len(found) == candidates
    if candidates:
        assert found.sum() == max(1, round(others * mix / (1 - mix)))
        assert found.max() - found.min() <= 1
