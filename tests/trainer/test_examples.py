"""The examples as their READMEs tell them, whole but short: a tiny model in the place of the real one, few steps."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_api.files import load_job
from finetune_api.run import PREPARED
from finetune_trainer import ray_adapter  # before Ray, which reads its settings when it is imported
from finetune_trainer.dataset import PackedDataset
from finetune_trainer.manifest import REPORT_FILE
from finetune_trainer.pipeline import finish_stage, open_run, prepare_stage, train_stage
from finetune_trainer.progress import Display
from finetune_trainer.tokenizer import load_tokenizer
from tests.tiny import tiny_llama

EXAMPLES = Path(__file__).parents[2] / "examples"
STEPS = 3
_MADE = ("model", "data", "output", "runs", "__pycache__")

pytestmark = pytest.mark.timeout(400)
with_ray = pytest.mark.usefixtures("cluster")


def _model(folder: Path) -> None:
    """A tiny Llama with the tokens that the example with code gives another meaning."""
    tiny_llama(folder, vocabulary=1024)
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    for content in ("<issue_start>", "<issue_comment>", "<issue_closed>"):
        entry = tokenizer["added_tokens"][0] | {"id": max(tokenizer["model"]["vocab"].values()) + 1, "content": content}
        tokenizer["model"]["vocab"][content] = entry["id"]
        tokenizer["added_tokens"].append(entry)
    file.write_text(json.dumps(tokenizer))


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """One Ray for all the runs: starting it takes longer than most of what they do."""
    import ray
    from ray.cluster_utils import Cluster

    assert ray_adapter
    cluster = Cluster(True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()
    cluster.shutdown()


def _ran(name: str, tmp_path: Path, answer: int) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """The folder of the run, its data report and its result; answers have up to `answer` tokens."""
    folder = tmp_path / name
    shutil.copytree(EXAMPLES / name, folder, ignore=shutil.ignore_patterns(*_MADE))
    _model(folder / "model")
    if (folder / "chat_template.jinja").exists():
        shutil.copyfile(folder / "chat_template.jinja", folder / "model" / "chat_template.jinja")
    for script in ("make_model.py", "make_data.py"):
        if (folder / script).exists():
            subprocess.run([sys.executable, script, script[5:-3]], cwd=folder, check=True)
    job = yaml.safe_load((folder / "job.yaml").read_text())
    spec = job["spec"]
    spec["data"]["sequenceLength"] *= 4  # the tiny tokenizer's tokens are short
    spec["training"]["maxSteps"] = STEPS
    spec.setdefault("evaluation", {})["maxNewTokens"] = answer
    (folder / "job.yaml").write_text(yaml.safe_dump(job))

    work, display = folder / "runs", Display()
    with open_run(folder / "job.yaml", work, fresh=False) as run:  # what `finetune run` does, in this process
        train_stage(run, prepare_stage(run, display, lambda: False), display, lambda: False)
        finish_stage(run, None, display, lambda: False)

    result = json.loads((folder / "output" / "report" / "result.json").read_bytes())
    assert result["training"]["steps"] == STEPS
    assert result["evaluation"]["lossBase"] != result["evaluation"]["lossTuned"]
    assert result["forgetting"]["perplexityBase"] != result["forgetting"]["perplexityTuned"]
    assert "Base against tuned" in (folder / "output" / "report" / "report.md").read_text()
    return work, json.loads((work / PREPARED / REPORT_FILE).read_bytes()), result


@with_ray
def test_calls_of_tools_are_learned_at_their_weight(tmp_path: Path) -> None:
    work, report, result = _ran("03-tools", tmp_path, 8)
    assert report["splits"]["train"]["documents"] > 150
    assert report["splits"]["evaluation"]["documents"] > 10
    tokenizer, first = load_tokenizer(tmp_path / "03-tools" / "model"), PackedDataset(work / PREPARED, "train")[0]
    assert set(first.weights.tolist()) == {0, 1, 2}
    double = tokenizer.decode(first.input_ids[first.weights == 2])
    assert double.startswith('<call>{"name":')
    calls = tokenizer.decode(first.input_ids).count("<call>")
    assert double.count("<call>") == double.count("</call><|im_end|>") == calls
    assert [each["topic"] for each in result["prompts"]] == ["Calls"] * 4 + ["No call"] * 2
    assert result["comparison"]["examples"] > 0


@with_ray
def test_code_is_one_repository_with_middles_held_out(tmp_path: Path) -> None:
    _, report, result = _ran("04-code", tmp_path, 150)
    assert report["splits"]["train"]["documents"] > 30
    assert result["middles"]["middles"] >= 2


@with_ray
def test_texts_are_split_and_learned_whole(tmp_path: Path) -> None:
    _, report, _ = _ran("05-pretrain", tmp_path, 8)
    assert report["splits"]["train"]["maskedShare"] < 0.01
    assert report["splits"]["evaluation"]["documents"] >= 3


@with_ray
def test_held_out_questions_are_asked_with_their_passages_and_without(tmp_path: Path) -> None:
    _, report, result = _ran("06-retrieval", tmp_path, 150)
    assert report["splits"]["train"]["documents"] > 100
    assert result["retrieval"]["questions"] >= 5


@with_ray
def test_completions_are_learned_without_their_prompts(tmp_path: Path) -> None:
    work, report, result = _ran("07-completion", tmp_path, 8)
    assert report["splits"]["train"]["documents"] > 300
    tokenizer, first = load_tokenizer(tmp_path / "07-completion" / "model"), PackedDataset(work / PREPARED, "train")[0]
    asked, learned = (tokenizer.decode(first.input_ids[where]) for where in (first.weights == 0, first.weights == 1))
    assert asked.count("Summary:") == learned.count("<|im_end|>") == len(first.documents)
    assert "Summary:" not in learned
    assert result["comparison"]["heldOutAnswers"] > 0


@pytest.mark.parametrize("job", sorted(EXAMPLES.glob("*/job.yaml")), ids=lambda path: path.parent.name)
def test_every_example_is_a_valid_job_and_tells_its_commands(job: Path) -> None:
    load_job(job)
    readme = (job.parent / "README.md").read_text()
    commands = re.findall(r"^    (?:\S*/)?python (\S+)", readme, re.MULTILINE)
    assert any(command.endswith("make_data.py") for command in commands), commands
    assert re.search(r"^    (?:\S*/)?finetune run \S*job\.yaml", readme, re.MULTILINE)
    assert job.parent.name in (EXAMPLES / "README.md").read_text()
