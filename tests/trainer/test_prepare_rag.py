"""Retrieval-aware rows: passages in a drawn order, a share without the oracle, answers that cite what is there."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from finetune_api.errors import DataError
from finetune_trainer.prepare.rag import INSTRUCTION
from tests.tiny import tiny_llama
from tests.trainer.jobs import Prepared, jsonl, run_config

ROWS: list[dict[str, Any]] = [
    {
        "question": f"What is number {i}?",
        "oracle": f"Number {i} is {i * 7}.",
        "distractors": [f"Number {i + n} is red." for n in (200, 400, 600)],
        "answer": f"It is {i * 7}.",
    }
    for i in range(200)
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model") / "tiny")


def turns(folder: Path, model: Path, rows: list[dict[str, Any]], work: str = "work", **rag: Any) -> list[Any]:
    """Question and answer of each written document, with the passages in their order."""
    (folder / "rows.jsonl").write_bytes(jsonl(rows))
    data = {"train": [{"uri": "rows.jsonl"}], "sequenceLength": 512, "rag": rag, "deduplicate": "exact"}
    prepared = Prepared(run_config(folder, model, data, work=work))
    assert prepared.manifest.sources[0].format == "rag"
    tokenizer = AutoTokenizer.from_pretrained(model)
    found = []
    for ids in prepared.documents():
        text = tokenizer.decode(ids).removesuffix("<|im_end|>\n")
        asked, answer = text.removeprefix("<|im_start|>user\n").split("<|im_end|>\n<|im_start|>assistant\n")
        passages, question = asked.removeprefix(INSTRUCTION + "\n\n").split("\n\nQuestion: ")
        found.append((question, re.findall(r"^\[\d+\] (.*)$", passages, re.MULTILINE), answer))
    return found


def test_the_oracle_stands_anywhere_and_the_answer_cites_its_number(tmp_path: Path, model: Path) -> None:
    places = [0, 0, 0, 0]
    by_question = {row["question"]: row for row in ROWS}
    for question, passages, answer in turns(tmp_path, model, ROWS, withoutOracle=0):
        row = by_question.pop(question)
        assert sorted(passages) == sorted([row["oracle"], *row["distractors"]])
        place = passages.index(row["oracle"])
        assert answer == f"{row['answer']} [{place + 1}]"
        places[place] += 1
    assert not by_question
    assert min(places) >= 30, "each place about as often"


@pytest.mark.parametrize("share", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("unanswered", [None, "I don't know."])
def test_a_share_of_rows_loses_the_oracle(tmp_path: Path, model: Path, share: float, unanswered: str | None) -> None:
    rag: dict[str, Any] = {"withoutOracle": share} | ({"unanswered": unanswered} if unanswered else {})
    by_question = {row["question"]: row for row in ROWS}
    lost = 0
    for question, passages, answer in turns(tmp_path, model, ROWS, **rag):
        row = by_question[question]
        if row["oracle"] not in passages:
            lost += 1
            assert sorted(passages) == sorted(row["distractors"])
            assert answer == (unanswered or row["answer"]), "nothing is cited that is not there"
    assert abs(lost - share * 200) <= 25


def test_documents_with_marks_are_the_same_rows(tmp_path: Path, model: Path) -> None:
    marked = [
        {
            "question": row["question"],
            "answer": row["answer"],
            "documents": [
                {"text": row["oracle"], "oracle": True},
                *({"text": text, "title": "unused"} for text in row["distractors"]),
            ],
        }
        for row in ROWS[:20]
    ]
    expected = turns(tmp_path, model, ROWS[:20])
    (tmp_path / "rows.jsonl").write_bytes(jsonl(marked))
    data = {"train": [{"uri": "rows.jsonl", "format": "rag"}], "sequenceLength": 512, "deduplicate": "exact"}
    prepared = Prepared(run_config(tmp_path, model, data, work="marked"))
    assert len(prepared.documents()) == len(expected) == 20
    assert turns(tmp_path, model, ROWS[:20], work="again") == expected


def test_marks_in_the_answer_become_numbers(tmp_path: Path, model: Path) -> None:
    row = {
        "question": "How long, and who pays?",
        "oracle": ["Two weeks.", "The team pays."],
        "distractors": ["Red.", "Blue."],
        "answer": "Two weeks [oracle], paid by the team [oracle 2].",
    }
    ((_, passages, answer),) = turns(tmp_path, model, [row], withoutOracle=0)
    weeks, pays = passages.index("Two weeks.") + 1, passages.index("The team pays.") + 1
    assert answer == f"Two weeks [{weeks}], paid by the team [{pays}]."
    ((_, passages, answer),) = turns(tmp_path, model, [row], work="other", withoutOracle=1)
    assert sorted(passages) == ["Blue.", "Red."]
    assert answer == "Two weeks, paid by the team."


def test_a_row_whose_answer_is_in_no_passage_keeps_its_answer(tmp_path: Path, model: Path) -> None:
    row = {"question": "Who pays?", "distractors": ["Red.", "Blue."], "answer": "The passages do not say."}
    ((_, passages, answer),) = turns(tmp_path, model, [row])
    assert sorted(passages) == ["Blue.", "Red."]
    assert answer == "The passages do not say."


def test_the_order_depends_on_seed_and_row_and_not_on_other_rows(tmp_path: Path, model: Path) -> None:
    every = turns(tmp_path, model, ROWS[:50])
    fewer = turns(tmp_path, model, ROWS[49:24:-1], work="fewer")
    questions = {row["question"] for row in ROWS[25:50]}
    assert fewer == [turn for turn in every if turn[0] in questions]
    (tmp_path / "rows.jsonl").write_bytes(jsonl(ROWS[:50]))
    data = {"train": [{"uri": "rows.jsonl"}], "sequenceLength": 512, "deduplicate": "exact"}
    runs = [run_config(tmp_path, model, data, work=f"seed{s}", training={"seed": s}) for s in (0, 1)]
    assert Prepared(runs[0]).documents() != Prepared(runs[1]).documents()


def test_only_the_answer_is_learned(tmp_path: Path, model: Path) -> None:
    from finetune_trainer.dataset import PackedDataset

    (tmp_path / "rows.jsonl").write_bytes(jsonl(ROWS[:5]))
    data = {"train": [{"uri": "rows.jsonl"}], "sequenceLength": 512, "packing": False, "rag": {"withoutOracle": 0}}
    prepared = Prepared(run_config(tmp_path, model, data))
    tokenizer = AutoTokenizer.from_pretrained(model)
    dataset = PackedDataset(prepared.folder, "train")
    for index in range(5):
        sequence = dataset[index]
        learned = tokenizer.decode(sequence.input_ids[sequence.weights > 0].tolist())
        assert re.fullmatch(r"It is \d+\. \[[1-4]\]<\|im_end\|>", learned)


@pytest.mark.parametrize(
    ("change", "field", "said"),
    [
        ({"oracle": None, "distractors": None}, "documents", "no document"),
        ({"distractors": ["fine", 3]}, "distractors[1]", "a number"),
        ({"documents": [{"text": "twice"}]}, "documents", "twice"),
        ({"oracle": None, "distractors": None, "documents": ["plain"]}, "documents[0]", "not an object"),
        ({"answer": " "}, "answer", "empty"),
        ({"question": None}, "question", "null"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, model: Path, change: dict[str, Any], field: str, said: str) -> None:
    lines = [ROWS[0], ROWS[1] | change]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(DataError) as caught:
        Prepared(run_config(tmp_path, model, {"train": [{"uri": "rows.jsonl", "format": "rag"}]}))
    assert f"rows.jsonl:2: {field}" in str(caught.value)
    assert said in str(caught.value)
