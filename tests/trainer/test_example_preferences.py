"""The example with preferences as its README tells it, with a tiny model in the place of the real one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from finetune_trainer.reporter import read_metrics
from tests.tiny import tiny_llama

EXAMPLE = Path(__file__).parents[2] / "examples" / "02-preferences"
FINETUNE = Path(sys.executable).with_name("finetune")

pytestmark = pytest.mark.timeout(400)


def test_the_example_runs_and_its_report_compares_both_models(tmp_path: Path) -> None:
    folder = tmp_path / "example"
    shutil.copytree(EXAMPLE, folder, ignore=shutil.ignore_patterns("model", "data", "output", "runs", "__pycache__"))
    tiny_llama(folder / "model")
    subprocess.run([sys.executable, "make_data.py", "data"], cwd=folder, check=True)
    job = (folder / "job.yaml").read_text()
    # The tiny model's tokens are short, and it starts from nothing.
    for given, other in (
        ("sequenceLength: 256", "sequenceLength: 768"),
        ("learningRate: 2.0e-4", "learningRate: 5.0e-3"),
        ("maxNewTokens: 48", "maxNewTokens: 8"),
    ):
        assert given in job
        job = job.replace(given, other)
    (folder / "job.yaml").write_text(job)

    done = subprocess.run(
        [FINETUNE, "run", "job.yaml"],
        cwd=folder, env=os.environ | {"DS_ACCELERATOR": "cpu"}, capture_output=True, text=True,
    )  # fmt: skip

    assert done.returncode == 0, done.stdout + done.stderr
    work = folder / "runs" / "preferences"
    result = json.loads((work / "result.json").read_bytes())
    preference = result["evaluation"]["preference"]
    assert preference["pairs"] == result["data"]["splits"]["evaluation"]["pairs"] > 0
    assert preference["rewardAccuracy"] == 1
    assert preference["rewardMargin"] > 0.1
    assert result["evaluation"]["perplexityTuned"] is None
    assert result["evaluation"]["lossTuned"] < result["evaluation"]["lossBase"] == pytest.approx(0.6931, abs=1e-2)
    assert f"Of {preference['pairs']} held-out pairs" in result["verdict"]["sentence"]
    assert "Chosen answer likelier" in (work / "report.html").read_text()
    steps = [event for event in read_metrics(work / "metrics.jsonl") if event["event"] == "step"]
    assert steps[-1]["rewardMargin"] > steps[0]["rewardMargin"]
