"""The end of a real run: what is published is what the report talks about."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune_api.errors import GateFailed
from finetune_api.job_evaluation import Gate
from finetune_api.run import RunConfig
from finetune_trainer.finish import Price, check_gates, finish
from finetune_trainer.prepare import prepare
from tests.tiny import tiny_llama
from tests.trainer.workers import train_with_workers

SECRET = "the wording of a row"


def changed(run: RunConfig, **evaluation: Any) -> RunConfig:
    spec = run.spec
    return run.model_copy(
        update={"spec": spec.model_copy(update={"evaluation": spec.evaluation.model_copy(update=evaluation)})}
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A tiny model, tuned with LoRA by the real loop on rows that the real prepare has read."""
    folder = tmp_path_factory.mktemp("run")
    model = tiny_llama(folder / "model")
    rows = [{"prompt": f"What is {n} plus {n}? {SECRET}", "completion": f"It is {2 * n}."} for n in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = {
        "model": {"source": "model"},
        "method": {"lora": {"rank": 4}},
        "data": {
            "train": [{"uri": "rows.jsonl"}], "evaluationFraction": 0.2, "sequenceLength": 128, "deduplicate": "none",
        },
        "training": {"maxSteps": 6, "sequencesPerBatch": 2, "learningRate": 0.02, "precision": "fp32"},
        "output": {"uri": "output"},
        "evaluation": {
            "prompts": [{"prompt": "What is 3 plus 3?", "expect": ["6"]}, {"prompt": "Who are you?"}],
            "maxNewTokens": 12,
        },
    }  # fmt: skip
    run = RunConfig.model_validate(
        {"name": "sums", "uid": "u", "spec": spec, "baseDir": str(folder), "modelPath": str(model),
         "work": str(folder / "work")}
    )  # fmt: skip
    prepare(run, lambda done, total, what: None)
    train_with_workers([run], 1, folder / "store")
    (folder / "output").mkdir()
    (folder / "output" / "notes.txt").write_text("the user's own")
    return run


@pytest.fixture(scope="module")
def finished(run: RunConfig) -> dict[str, Any]:
    """report.json of the run."""
    result = finish(run, seconds={"prepare": 1.0, "train": 1000.0}, price=Price(3.6, "EUR"))
    check_gates(result)
    report: dict[str, Any] = json.loads((Path(run.base_dir) / "output/report/report.json").read_text())
    return report


def test_weights_and_report_are_published_and_nothing_else_is_touched(run: RunConfig, finished: dict[str, Any]) -> None:
    output = Path(run.base_dir) / "output"
    assert {p.name for p in output.iterdir()} == {"adapter", "merged", "report", "notes.txt"}
    assert {p.name for p in (output / "report").iterdir()} == {
        "report.html", "report.md", "report.json", "result.json",
    }  # fmt: skip
    assert json.loads((Path(run.work) / "result.json").read_text())["verdict"] == finished["verdict"]


@pytest.mark.parametrize("folder", ["merged", "adapter"])
def test_the_published_weights_say_what_the_report_says(folder: str, run: RunConfig, finished: dict[str, Any]) -> None:
    output = Path(run.base_dir) / "output" / folder
    if folder == "adapter":
        model: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(run.model_path), str(output))
    else:
        model = AutoModelForCausalLM.from_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(output)
    for prompt in finished["prompts"]:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt["prompt"]}], add_generation_prompt=True, return_tensors="pt"
        )["input_ids"]
        whole = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)
        text = tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True).strip()
        assert text == prompt["tuned"]["text"] != prompt["base"]["text"]


def test_losses_are_those_of_the_first_and_the_last_evaluation(run: RunConfig, finished: dict[str, Any]) -> None:
    lines = (Path(run.work) / "metrics.jsonl").read_text().splitlines()
    losses = [event["loss"] for event in map(json.loads, lines) if event["event"] == "evaluation"]
    figures = finished["evaluation"]
    assert (figures["lossBase"], figures["lossTuned"]) == (losses[0], losses[-1])
    assert finished["training"]["steps"] == 6 == len(finished["curves"]["loss"]["steps"])


def test_the_cost_is_the_price_for_as_long_as_the_workers_are_held(finished: dict[str, Any]) -> None:
    assert finished["cost"]["currency"] == "EUR"
    assert finished["cost"]["amount"] == pytest.approx(1.0)  # 1,000 s at 3.6 an hour


@pytest.mark.parametrize("folder", ["merged", "adapter"])
def test_the_model_card_tells_the_base_model_and_no_row_and_no_folder(
    folder: str, run: RunConfig, finished: dict[str, Any]
) -> None:
    card = (Path(run.base_dir) / "output" / folder / "README.md").read_text()
    assert "base_model: model\n" in card
    assert f"{finished['evaluation']['lossTuned']:.4f}" in card
    assert finished["manifest"]["sources"][0]["sha256"] in card
    assert SECRET not in card
    assert run.base_dir not in card


def test_a_missed_gate_keeps_the_weights_aside(run: RunConfig, finished: dict[str, Any]) -> None:
    gated = changed(run, gates=[Gate(metric="evalLoss", max=0.001)], prompts=[])
    gated = gated.model_copy(
        update={"spec": gated.spec.model_copy(update={"output": run.spec.output.model_copy(update={"uri": "gated"})})}
    )
    result = finish(gated, seconds={})
    assert result.verdict.state == "rejected"
    assert [p.name for p in (Path(run.base_dir) / "gated").iterdir()] == ["rejected"]
    with pytest.raises(GateFailed, match=r"the evaluation loss is [\d.]+, at most 0.001 was asked"):
        check_gates(result)
