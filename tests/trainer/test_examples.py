"""The examples' data and jobs, with a tiny model in the place of the real one, as far as the end of prepare."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from finetune_api.files import load_job
from finetune_api.run import PREPARED, RunConfig
from finetune_trainer.dataset import PackedDataset
from finetune_trainer.manifest import REPORT_FILE
from finetune_trainer.middles import held_out_middles
from finetune_trainer.prepare import prepare
from finetune_trainer.retrieval import held_out_questions
from finetune_trainer.tokenizer import load_tokenizer
from tests.tiny import tiny_tokenizer

EXAMPLES = Path(__file__).parents[2] / "examples"
_MADE = ("model", "data", "output", "runs", "__pycache__")


def prepared(name: str, tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """The example's folder and its data report; sequences are longer, for the tiny tokenizer's tokens are short."""
    folder = tmp_path / name
    shutil.copytree(EXAMPLES / name, folder, ignore=shutil.ignore_patterns(*_MADE))
    model = tiny_tokenizer(folder / "model", vocabulary=1024)
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    for content in ("<issue_start>", "<issue_comment>", "<issue_closed>"):
        entry = tokenizer["added_tokens"][0] | {"id": max(tokenizer["model"]["vocab"].values()) + 1, "content": content}
        tokenizer["model"]["vocab"][content] = entry["id"]
        tokenizer["added_tokens"].append(entry)
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    (model / "config.json").write_text(json.dumps({"model_type": "llama", "max_position_embeddings": 8192}))
    (model / "model.safetensors").write_bytes(b"")
    if (folder / "chat_template.jinja").exists():
        shutil.copyfile(folder / "chat_template.jinja", model / "chat_template.jinja")
    for script in ("make_model.py", "make_data.py"):
        if (folder / script).exists():
            subprocess.run([sys.executable, script, script[5:-3]], cwd=folder, check=True)
    job = load_job(folder / "job.yaml")
    data = job.spec.data.model_copy(update={"sequence_length": 4 * job.spec.data.sequence_length})
    run = RunConfig(
        name=name,
        uid="u",
        spec=job.spec.model_copy(update={"data": data}),
        base_dir=str(folder),
        model_path=str(model),
        work=str(folder / "work"),
    )
    prepare(run, workers=0)
    return folder, json.loads((folder / "work" / PREPARED / REPORT_FILE).read_bytes())


def test_calls_of_tools_are_learned_at_their_weight(tmp_path: Path) -> None:
    folder, report = prepared("03-tools", tmp_path)
    assert report["splits"]["train"]["documents"] > 150
    assert report["splits"]["evaluation"]["documents"] > 10
    tokenizer, first = load_tokenizer(folder / "model"), PackedDataset(folder / "work" / PREPARED, "train")[0]
    assert set(first.weights.tolist()) == {0, 1, 2}
    double = tokenizer.decode(first.input_ids[first.weights == 2])
    assert double.startswith('<call>{"name":')
    calls = tokenizer.decode(first.input_ids).count("<call>")
    assert double.count("<call>") == double.count("</call><|im_end|>") == calls


def test_code_is_one_repository_with_middles_held_out(tmp_path: Path) -> None:
    folder, report = prepared("04-code", tmp_path)
    assert report["splits"]["train"]["documents"] > 30
    middles = held_out_middles(folder / "work" / PREPARED, load_tokenizer(folder / "model"), 1500)
    assert len(middles) >= 2


def test_texts_are_split_and_learned_whole(tmp_path: Path) -> None:
    _, report = prepared("05-pretrain", tmp_path)
    assert report["splits"]["train"]["maskedShare"] < 0.01
    assert report["splits"]["evaluation"]["documents"] >= 3


def test_held_out_questions_have_their_passages(tmp_path: Path) -> None:
    folder, report = prepared("06-retrieval", tmp_path)
    assert report["splits"]["train"]["documents"] > 100
    questions = held_out_questions(folder / "work" / PREPARED, load_tokenizer(folder / "model"), 400)
    assert len(questions) >= 5
    assert all(question.question.startswith("What does `") for question in questions)


@pytest.mark.parametrize("job", sorted(EXAMPLES.glob("*/job.yaml")), ids=lambda path: path.parent.name)
def test_every_example_is_a_valid_job_and_tells_its_commands(job: Path) -> None:
    load_job(job)
    readme = (job.parent / "README.md").read_text()
    assert "make_data.py" in readme
    assert "job.yaml" in readme
    assert job.parent.name in (EXAMPLES / "README.md").read_text()
