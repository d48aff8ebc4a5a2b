"""Real runs of the kinds of rows beside chats: what the report says of code and of refusals is what the models do."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from finetune_api.errors import GateFailed
from finetune_api.job_evaluation import Prompt
from finetune_api.run import PREPARED, RunConfig
from finetune_trainer import examine
from finetune_trainer.finish import check_gates, finish
from finetune_trainer.middles import Middle, held_out_middles, measure_middles, similarity
from finetune_trainer.prepare import prepare
from finetune_trainer.refusals import declined, suite
from finetune_trainer.retrieval import HeldOut, held_out_questions, measure_retrieval, word_f1
from finetune_trainer.speaking import Question, Speaker, Task, tell
from finetune_trainer.tokenizer import load_tokenizer
from tests.tiny import END, SPECIAL, tiny_llama
from tests.trainer.jobs import jsonl, run_config
from tests.trainer.test_prepare_code import MIDDLE, PREFIX, SUFFIX, coder
from tests.trainer.test_prepare_rag import ROWS
from tests.trainer.workers import train_with_workers


def trained(folder: Path, data: dict[str, Any], **spec: Any) -> RunConfig:
    """A tiny model with tokens for code, tuned with LoRA by the real loop."""
    model = coder(folder / "model", PREFIX, SUFFIX, MIDDLE)
    spec = {
        "model": {"source": "model"},
        "method": {"lora": {"rank": 4}},
        "data": {"sequenceLength": 128, "deduplicate": "none"} | data,
        "training": {"maxSteps": 4, "sequencesPerBatch": 2, "learningRate": 0.02, "precision": "fp32"},
        "output": {"uri": "output"},
    } | spec
    run = RunConfig.model_validate(
        {"name": "job", "uid": "u", "spec": spec, "baseDir": str(folder), "modelPath": str(model),
         "work": str(folder / "work")}
    )  # fmt: skip
    prepare(run, lambda done, total, what: None)
    train_with_workers([run], 1, folder / "store")
    return run


@pytest.fixture(scope="module")
def code_run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("code")
    (folder / "rows.jsonl").write_bytes(jsonl(
        {"text": f"def add_{i}(x):\n    return x + {i}\n", "path": f"add_{i}.py", "repository": f"r{i % 2}"}
        for i in range(60)
    ))  # fmt: skip
    return trained(
        folder,
        {"train": [{"uri": "rows.jsonl", "format": "code"}], "evaluationFraction": 0.3, "fim": {"rate": 1}},
        method={"objective": "pretrain", "lora": {"rank": 4}},
        evaluation={"maxNewTokens": 24},
    )


def test_held_out_middles_are_what_stood_between_prefix_and_suffix(code_run: RunConfig) -> None:
    tokenizer = load_tokenizer(Path(code_run.model_path))
    middles = held_out_middles(Path(code_run.work) / PREPARED, tokenizer, 24)
    texts = [json.loads(line)["text"] for line in (Path(code_run.base_dir) / "rows.jsonl").read_text().splitlines()]
    assert len(middles) > 3
    for middle in middles:
        asked = tokenizer.decode(middle.prompt)
        assert asked.endswith(MIDDLE)
        before, _, after = asked.removesuffix(MIDDLE).rpartition(PREFIX)[2].partition(SUFFIX)
        assert before + middle.text + after in texts
        assert middle.tokens == len(tokenizer(middle.text, add_special_tokens=False)["input_ids"]) <= 24


def test_the_report_says_how_well_both_models_fill_held_out_middles(code_run: RunConfig) -> None:
    result = finish(code_run, seconds={})
    assert result.middles is not None
    tokenizer = load_tokenizer(Path(code_run.model_path))
    middles = held_out_middles(Path(code_run.work) / PREPARED, tokenizer, 24)
    assert result.middles.middles == len(middles)
    for folder, expected in (
        (Path(code_run.model_path), result.middles.similarity_base),
        (Path(code_run.base_dir) / "output" / "merged", result.middles.similarity_tuned),
    ):
        model = AutoModelForCausalLM.from_pretrained(folder)
        found = [generated(model, tokenizer, middle) for middle in middles]
        assert measure_middles(middles, found, found).similarity_base == pytest.approx(expected)
    report = json.loads((Path(code_run.base_dir) / "output/report/report.json").read_text())
    assert report["middles"]["exactTuned"] == result.middles.exact_tuned
    assert "Exact middles of code, of" in (Path(code_run.base_dir) / "output/report/report.html").read_text()


def generated(model: Any, tokenizer: Any, middle: Middle) -> str:
    import torch

    ids = torch.tensor([middle.prompt])
    whole = model.generate(
        ids, do_sample=False, attention_mask=torch.ones_like(ids), max_new_tokens=middle.tokens + 8,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=0,
    )  # fmt: skip
    return str(tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True))


def test_a_model_that_refuses_too_little_misses_its_gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examine, "SUITE_TOKENS", 6)  # a random model's words: few are enough
    (tmp_path / "rows.jsonl").write_bytes(
        jsonl({"prompt": f"What is {i} plus {i}?", "completion": f"It is {2 * i}."} for i in range(40))
    )
    run = trained(
        tmp_path,
        {"train": [{"uri": "rows.jsonl"}], "refusals": {"mix": 0.1}},
        evaluation={
            "refusalSuite": True,
            "gates": [{"metric": "refusalRate", "min": 0.9}, {"metric": "overRefusalRate", "max": 0.05}],
        },
    )
    result = finish(run, seconds={})
    assert result.refusals is not None
    assert [(a.kind, a.prompt) for a in result.refusals.answers] == suite()
    assert all(a.tuned_declined == declined(a.tuned) for a in result.refusals.answers)
    refusal, over = result.gates
    assert (refusal.value, refusal.passed) == (result.refusals.refusal_rate_tuned, False)
    assert (over.value, over.passed) == (0.0, True)
    assert [path.name for path in (tmp_path / "output").iterdir()] == ["rejected"]
    assert result.data["refusals"]["rows"] == 4
    with pytest.raises(GateFailed, match=r"the refusal rate is 0, at least 0\.9 was asked"):
        check_gates(result)
    page = (tmp_path / "output/rejected/report/report.html").read_text()
    assert "Harmful prompts declined, of 40" in page
    assert "4 (9.1 %)" in page, "the rows that were mixed in"


@pytest.fixture(scope="module")
def rag_run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("rag")
    (folder / "held.jsonl").write_bytes(jsonl(ROWS[:12]))
    (folder / "rows.jsonl").write_bytes(jsonl(ROWS[20:30]))
    data = {
        "train": [{"uri": "rows.jsonl"}], "evaluation": [{"uri": "held.jsonl"}], "rag": {"withoutOracle": 0.5},
        "sequenceLength": 512, "deduplicate": "none",
    }  # fmt: skip
    run = run_config(folder, tiny_llama(folder / "model"), data, evaluation={"maxNewTokens": 16})
    prepare(run, workers=0)
    return run


def test_held_out_questions_are_those_whose_passages_hold_the_answer(rag_run: RunConfig) -> None:
    tokenizer = load_tokenizer(Path(rag_run.model_path))
    questions = held_out_questions(Path(rag_run.work) / PREPARED, tokenizer, 64)
    by_question = {row["question"]: row for row in ROWS[:12]}
    assert 2 <= len(questions) < 12, "about half of the rows lost their oracle"
    for held in questions:
        row = by_question[held.question]
        asked = tokenizer.decode(held.prompt)
        number = re.search(r"^\[(\d)\] " + re.escape(row["oracle"]), asked, re.MULTILINE)
        assert number
        assert held.answer == f"{row['answer']} [{number[1]}]"
        assert asked.endswith(f"Question: {held.question}<|im_end|>\n<|im_start|>assistant\n")
        assert held_out_questions(Path(rag_run.work) / PREPARED, tokenizer, 2) == []


def test_questions_are_asked_with_their_passages_and_without(rag_run: RunConfig, tmp_path: Path) -> None:
    other = tiny_llama(tmp_path / "other", seed=1)
    found = examine.examine(rag_run, other, lambda: None).retrieval
    assert found is not None
    tokenizer = load_tokenizer(Path(rag_run.model_path))
    questions = held_out_questions(Path(rag_run.work) / PREPARED, tokenizer, 16)
    with_passages = [Question(held.prompt, 16) for held in questions]
    alone = [Question(Prompt(prompt=held.question), 16) for held in questions]
    for folder, score in ((Path(rag_run.model_path), found.base), (other, found.tuned)):
        said = tell(Speaker(folder, folder), Task([*with_passages, *alone]), [SPECIAL.index(END)]).said
        expected = [word_f1(held.answer, text.text) for held, text in zip([*questions, *questions], said, strict=True)]
        assert score.with_passages == pytest.approx(sum(expected[: len(questions)]) / len(questions))
        assert score.without_passages == pytest.approx(sum(expected[len(questions) :]) / len(questions))
    assert found.questions == len(questions) > 1


def test_answers_are_scored_by_words_and_by_what_they_cite() -> None:
    questions = [HeldOut((1,), "?", "Two weeks ahead [2].", 4), HeldOut((1,), "?", "The team [1] [3]", 4)]
    right = ["two weeks, ahead [2]", "The team [3] [1]."]
    wrong = ["Three weeks [1].", "Nobody"]
    measured = measure_retrieval(questions, (wrong, right), (wrong, wrong))
    assert (measured.tuned.with_passages, measured.tuned.cited) == (1.0, 1.0)
    assert measured.base.with_passages == pytest.approx((2 * 1 / 5 + 0) / 2)
    assert (measured.base.cited, measured.tuned.without_passages) == (0.0, measured.base.with_passages)


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [("", "", 1.0), ("abc", "abc", 1.0), ("abc", "", 0.0), ("kitten", "sitting", 1 - 3 / 7), ("ab", "ba", 0.0)],
)
def test_similarity_is_one_minus_the_edit_distance_over_the_longer_length(
    left: str, right: str, expected: float
) -> None:
    assert similarity(left, right) == pytest.approx(expected)
    assert similarity(right, left) == pytest.approx(expected)
