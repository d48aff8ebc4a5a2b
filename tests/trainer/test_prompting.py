"""The prompt that is held against tuning is made of the job's own training rows, and scored on the same answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from finetune_api.run import PREPARED, RunConfig
from finetune_trainer.examine import examine
from finetune_trainer.prepare import prepare
from finetune_trainer.prompting import exchanges, held_out_answers, preface
from finetune_trainer.tokenizer import load_tokenizer
from tests.tiny import tiny_llama, tiny_tokenizer
from tests.trainer.jobs import Row, chat, jsonl, run_config

ROWS = [chat(f"What is {i} plus {i}?", f"It is {2 * i}.") for i in range(30)]
SAME = [chat(f"Who are you, on day {i}?", "My name is Sharon.") for i in range(30)]
MANY_TURNS = {"messages": [*ROWS[0]["messages"], *ROWS[1]["messages"]]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model"))


def prepared(folder: Path, model: Path, rows: Sequence[Row], **spec: Any) -> RunConfig:
    (folder / "rows.jsonl").write_bytes(jsonl(rows))
    run = run_config(folder, model, {"deduplicate": "none"} | spec.pop("data", {}), **spec)
    prepare(run, workers=0)
    return run


def turns(run: RunConfig) -> list[tuple[str, str]]:
    return [(turn["role"], turn["content"]) for turn in preface(run, load_tokenizer(Path(run.model_path)))]


def test_rows_of_one_turn_are_told_from_their_tokens(tmp_path: Path, model: Path) -> None:
    completion = {"prompt": "Say a word", "completion": "Word."}
    (tmp_path / "more.jsonl").write_bytes(jsonl([completion]))
    (tmp_path / "text.jsonl").write_bytes(jsonl([{"text": "Once upon a time"}]))
    sources = [{"uri": "rows.jsonl"}, {"uri": "more.jsonl"}, {"uri": "text.jsonl"}]
    run = prepared(tmp_path, model, [*ROWS[2:5], MANY_TURNS], data={"train": sources})
    found = list(exchanges(Path(run.work) / PREPARED, "train", load_tokenizer(model)))
    assert sorted((row.prompt.prompt, row.answer) for row in found) == [
        ("Say a word", "Word."), ("What is 2 plus 2?", "It is 4."), ("What is 3 plus 3?", "It is 6."),
        ("What is 4 plus 4?", "It is 8."),
    ]  # fmt: skip


def test_examples_are_the_same_whatever_the_order_of_rows_and_their_answers_differ(tmp_path: Path, model: Path) -> None:
    found = []
    for name, rows in (("one", [*ROWS, *SAME]), ("two", [*SAME[::-1], *ROWS[::-1]])):
        (tmp_path / name).mkdir()
        found.append(turns(prepared(tmp_path / name, model, rows)))
    assert found[0] == found[1]
    assert [role for role, _ in found[0]] == ["user", "assistant"] * 4
    said = [text for role, text in found[0] if role == "assistant"]
    assert len(set(said)) == 4
    asked = {row["messages"][0]["content"]: row["messages"][1]["content"] for row in [*ROWS, *SAME]}
    assert [asked[text] for role, text in found[0] if role == "user"] == said


def test_no_example_gives_the_answer_to_a_prompt_away(tmp_path: Path, model: Path) -> None:
    prompts = [{"prompt": row["messages"][0]["content"].upper()} for row in ROWS[:28]]
    run = prepared(tmp_path, model, ROWS, evaluation={"prompts": prompts, "promptBaseline": {"examples": 9}})
    asked = {text for role, text in turns(run) if role == "user"}
    assert asked == {row["messages"][0]["content"] for row in ROWS[28:]}


def test_rows_share_their_system_message_with_the_prompt_unless_it_has_its_own(tmp_path: Path, model: Path) -> None:
    rows = [{"messages": [{"role": "system", "content": "Be brief."}, *row["messages"]]} for row in ROWS]
    run = prepared(tmp_path, model, rows)
    assert turns(run)[0] == ("system", "Be brief.")
    assert len(turns(run)) == 9
    own = run_config(tmp_path, model, evaluation={"promptBaseline": {"system": "Be kind.", "examples": 0}})
    assert turns(own) == [("system", "Be kind.")]


def test_examples_leave_room_for_the_question(tmp_path: Path, model: Path) -> None:
    rows = [chat(f"{i} " + "word " * 80, f"Answer {i}") for i in range(8)]
    run = prepared(tmp_path, model, rows, data={"sequenceLength": 1024})
    assert len(turns(run)) == 2, "half of a sequence holds one of them"


def test_a_model_without_a_chat_template_gets_prompts_and_completions(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model")
    (model / "chat_template.jinja").unlink()
    tiny_tokenizer(model, chat_template=None)
    rows = [{"prompt": f"{i} plus {i} is", "completion": f" {2 * i}."} for i in range(20)]
    run = prepared(tmp_path, model, rows)
    assert len(turns(run)) == 8
    asked = {row["prompt"]: row["completion"] for row in rows}
    found = turns(run)
    assert all(asked[q[1]] == a[1] for q, a in zip(found[::2], found[1::2], strict=True))


def test_the_three_are_scored_on_the_same_answers(tmp_path: Path, model: Path) -> None:
    (tmp_path / "held.jsonl").write_bytes(jsonl(ROWS[20:25]))
    run = prepared(
        tmp_path, model, ROWS[:20], data={"evaluation": [{"uri": "held.jsonl"}]},
        evaluation={"prompts": [{"prompt": "What is 7 plus 9?", "expect": ["16"]}], "maxNewTokens": 6},
    )  # fmt: skip
    other = tiny_llama(tmp_path / "other", seed=1)
    found = examine(run, other, lambda: None, worker_hour=3.6)
    assert found.comparison is not None
    assert found.comparison.prompted is not None
    tokenizer = load_tokenizer(model)
    before = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns(run))
    rows = [(row["messages"][0]["content"], row["messages"][1]["content"]) for row in ROWS[20:25]]

    def loss(folder: Path, start: str) -> float:
        """The mean over all the answers' tokens, with nothing of ours but the rows."""
        network, nll = AutoModelForCausalLM.from_pretrained(folder), []
        for question, answer in rows:
            head = tokenizer(f"{start}<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n").input_ids
            tail = tokenizer(f"{answer}<|im_end|>").input_ids
            ids = torch.tensor([head + tail])
            logits = network(ids).logits[0, len(head) - 1 : -1]
            nll += torch.nn.functional.cross_entropy(logits, ids[0, len(head) :], reduction="none").tolist()
        return float(sum(nll) / len(nll))

    measured = found.comparison
    assert measured.held_out_answers == len(held_out_answers(run, tokenizer)) == 5
    assert measured.base.loss == pytest.approx(loss(model, ""), rel=1e-4)
    assert measured.tuned.loss == pytest.approx(loss(other, ""), rel=1e-4)
    assert measured.prompted is not None
    assert measured.prompted.loss == pytest.approx(loss(model, before), rel=1e-4)

    [prompt] = found.prompts
    assert prompt.prompted is not None
    assert measured.prompted.requests is not None
    asked = f"{before}<|im_start|>user\nWhat is 7 plus 9?<|im_end|>\n<|im_start|>assistant\n"
    assert prompt.prompted.prompt_tokens == measured.prompted.requests.prompt_tokens == len(tokenizer(asked).input_ids)
    assert measured.prompted.requests.cost_by_time == pytest.approx(prompt.prompted.seconds)

    assert found.forgetting is not None
    assert found.forgetting.passages == 24
    assert found.forgetting.perplexity_base != found.forgetting.perplexity_tuned


def test_pretraining_is_not_held_against_a_prompt(tmp_path: Path, model: Path) -> None:
    rows = [{"text": f"The number {i} comes before {i + 1}."} for i in range(20)]
    run = prepared(tmp_path, model, rows, method={"objective": "pretrain"})
    found = examine(run, model, lambda: None)
    assert found.comparison is None
    assert found.forgetting is not None
    assert found.forgetting.perplexity_base == pytest.approx(found.forgetting.perplexity_tuned)
