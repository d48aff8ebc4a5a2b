"""Pairs of answers on their way to the shards: what is learned, what stays together, which rows are refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune_api.errors import DataError
from finetune_trainer.dataset import PackedDataset
from finetune_trainer.prepare.fields import BadRow
from finetune_trainer.prepare.rows import check_row
from finetune_trainer.tokenizer import load_tokenizer
from tests.tiny import tiny_llama, tiny_tokenizer
from tests.trainer.jobs import Prepared, Row, jsonl, run_config

USER, GOOD, BAD = ({"role": role, "content": text} for role, text in (("user", "Hi?"), *[("assistant", "Yes.")] * 2))
BAD = BAD | {"content": "No!"}
FIRST = [USER, GOOD, {"role": "user", "content": "And?"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("pairs") / "model")


def pair(number: int, words: int = 1) -> dict[str, Any]:
    """A pair with answers of different lengths, unlike all others."""
    sure = " indeed" * words
    return {
        "prompt": f"What is {number} and {number * 7}?",
        "chosen": f"It is {number * 11}{sure}.",
        "rejected": f"No idea {number * 13}.",
    }


def prepared(folder: Path, model: Path, rows: Sequence[Row], **data: Any) -> Prepared:
    (folder / "rows.jsonl").write_bytes(jsonl(rows))
    return Prepared(run_config(folder, model, data, method={"objective": "dpo"}))


def learned(made: Prepared, model: Path) -> list[list[tuple[str, str]]]:
    """Of each sequence its documents, as the text before what is learned, and what is learned."""
    tokenizer, data = load_tokenizer(model), PackedDataset(made.folder, "train")
    found = []
    for index in range(len(data)):
        sequence, start, documents = data[index], 0, []
        for length in sequence.documents.tolist():
            ids, weights = (a[start : start + length] for a in (sequence.input_ids, sequence.weights))
            start += length
            answer = ids[weights == 1].tolist()
            documents.append((tokenizer.decode(ids[: np.argmax(weights)].tolist()), tokenizer.decode(answer)))
        found.append(documents)
    return found


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi?", "chosen": "Yes.", "rejected": "No!"},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "Hi?", "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "Hi?", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"chosen": "Hi? Yes.", "rejected": "Hi? No!"},
    ],
    ids=["texts", "messages", "prompt as text", "implicit", "prompt repeated", "prompt messages repeated", "one text"],
)
def test_only_the_answers_of_a_pair_are_learned(tmp_path: Path, model: Path, row: Row) -> None:
    space = " " if row["chosen"] == "Hi? Yes." else ""
    before = "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n"
    ((chosen, rejected),) = learned(prepared(tmp_path, model, [row]), model)
    assert chosen[0] == rejected[0] == before
    assert (chosen[1], rejected[1]) == (f"{space}Yes.<|im_end|>", f"{space}No!<|im_end|>")


def test_what_both_conversations_share_is_no_part_of_the_answers(tmp_path: Path, model: Path) -> None:
    ((chosen, rejected),) = learned(
        prepared(tmp_path, model, [{"chosen": [*FIRST, GOOD], "rejected": [*FIRST, BAD]}]), model
    )
    assert "Yes.<|im_end|>" in chosen[0]
    assert (chosen[1], rejected[1]) == ("Yes.<|im_end|>", "No!<|im_end|>")


def test_texts_of_a_model_without_a_template_are_joined_as_they_are(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model")
    (model / "chat_template.jinja").unlink()
    tiny_tokenizer(model, chat_template=None)
    ((chosen, rejected),) = learned(
        prepared(tmp_path, model, [{"chosen": "Q: Why?\nA: So.", "rejected": "Q: Why?\nA: Because."}]), model
    )
    assert (chosen[0], rejected[0]) == ("Q: Why?\nA:",) * 2
    assert (chosen[1], rejected[1]) == (" So.<|im_end|>", " Because.<|im_end|>")


def test_pairs_are_packed_whole_and_counted(tmp_path: Path, model: Path) -> None:
    rows = [pair(i, words=i % 9) for i in range(40)]
    made = prepared(tmp_path, model, rows, evaluationFraction=0.2, sequenceLength=256)
    sequences = learned(made, model)
    assert any(len(documents) > 2 for documents in sequences)
    for documents in sequences:
        for chosen, rejected in zip(documents[::2], documents[1::2], strict=True):
            assert chosen[0] == rejected[0]
            assert chosen[1].startswith("It is")
            assert rejected[1].startswith("No idea")
    splits = made.report["splits"]
    assert splits["train"]["pairs"] == sum(map(len, sequences)) // 2
    assert splits["train"]["pairs"] + splits["evaluation"]["pairs"] == 40 == made.report["rows"]
    assert splits["evaluation"]["pairs"] > 0


def test_a_source_seen_twice_gives_each_pair_twice(tmp_path: Path, model: Path) -> None:
    made = prepared(tmp_path, model, [pair(i) for i in range(6)], train=[{"uri": "rows.jsonl", "weight": 2}])
    documents = [document for sequence in learned(made, model) for document in sequence]
    assert all(chosen[0] == rejected[0] for chosen, rejected in zip(documents[::2], documents[1::2], strict=True))
    assert len(documents) == 24
    assert len(set(documents)) == 12


def test_a_repeated_pair_is_a_duplicate_and_one_with_another_answer_is_none(tmp_path: Path, model: Path) -> None:
    rows = [pair(1), pair(1), pair(1) | {"rejected": "Who would know such a thing?"}]
    made = prepared(tmp_path, model, rows, deduplicate="exact")
    assert made.report["splits"]["train"]["pairs"] == 2
    assert made.report["duplicates"]["exact"] == 1


def test_a_pair_that_is_too_long_is_one_as_a_whole(tmp_path: Path, model: Path) -> None:
    rows = [pair(1), pair(2, words=60)]
    dropped = prepared(tmp_path, model, rows, overlong="drop")
    assert dropped.report["splits"]["train"]["pairs"] == 1
    assert dropped.report["overlong"]["dropped"]["rows"] == 1
    cut = prepared(tmp_path, model, rows, overlong="truncate")
    assert cut.report["splits"]["train"]["pairs"] == 2
    longest = max(sum(map(len, pair)) for pair in zip(cut.documents()[::2], cut.documents()[1::2], strict=True))
    assert longest <= 128
    whole = [document[1] for sequence in learned(cut, model) for document in sequence]
    assert sum(text.endswith("<|im_end|>") for text in whole) == 3, "only the longer answer is cut"
    with pytest.raises(DataError, match="the two answers with their prompts have") as caught:
        prepared(tmp_path, model, rows, overlong="error")
    assert caught.value.where.endswith("rows.jsonl:2")


@pytest.mark.parametrize(
    ("row", "field", "what"),
    [
        ({"prompt": "a", "chosen": "b"}, "rejected", "missing"),
        ({"prompt": "a", "rejected": "b"}, "chosen", "missing"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "rejected", "the same"),
        ({"prompt": "a", "chosen": "b", "rejected": " "}, "rejected", "empty"),
        ({"chosen": "one way", "rejected": "other way"}, "prompt", "do not begin with the same words"),
        ({"chosen": "A: yes", "rejected": "A: "}, "rejected", "empty"),
        ({"chosen": [USER, GOOD], "rejected": [USER, GOOD]}, "chosen", "the answer is missing"),
        ({"chosen": [USER, GOOD], "rejected": [USER]}, "rejected[0].role", "no answer to learn"),
        ({"chosen": [USER, GOOD], "rejected": [FIRST[2], BAD]}, "chosen", "no answer to the other's prompt"),
        ({"chosen": [*FIRST, GOOD], "rejected": [USER, GOOD, USER, BAD]}, "chosen", "differ before their answers"),
        ({"chosen": [USER, GOOD], "rejected": "No!"}, "rejected", "not JSON"),
        ({"chosen": [USER, GOOD | {"weight": 0.5}], "rejected": [USER, BAD]}, "chosen[1].weight", "no weights"),
    ],
)
def test_a_pair_that_prefers_nothing_is_refused_by_field(row: Row, field: str, what: str) -> None:
    with pytest.raises(BadRow, match=what) as caught:
        check_row(row, "preference")
    assert caught.value.problem.field == field


def test_other_rows_are_refused_in_a_preference_job_and_pairs_in_others(tmp_path: Path, model: Path) -> None:
    with pytest.raises(DataError, match="objective dpo learns from preferences"):
        prepared(tmp_path, model, [{"prompt": "a", "completion": "b"}])
    (tmp_path / "rows.jsonl").write_bytes(jsonl([pair(1)]))
    with pytest.raises(DataError, match=r"set method\.objective to dpo"):
        Prepared(run_config(tmp_path, model))
