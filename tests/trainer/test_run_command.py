"""`finetune run` as a person types it: real Ray workers, a tiny model, signals to real processes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import pytest
import urllib3
import yaml

from finetune_trainer.reporter import read_metrics
from tests.ports import free_port
from tests.tiny import tiny_llama

pytestmark = pytest.mark.timeout(400)

FINETUNE = Path(sys.executable).with_name("finetune")
STEPS = 200
JOB: dict[str, Any] = {
    "apiVersion": "finetune.dev/v1alpha1",
    "kind": "FinetuneJob",
    "metadata": {"name": "sums"},
    "spec": {
        "model": {"source": "./model"},
        "method": {"tuning": "lora", "lora": {"rank": 4, "dropout": 0.1}},
        "data": {"train": [{"uri": "./rows.jsonl"}], "evaluationFraction": 0.1, "sequenceLength": 64},
        "training": {"maxSteps": STEPS, "sequencesPerBatch": 4, "precision": "fp32"},
        "deepspeed": {"zeroStage": 2},
        "workers": {"count": 2},
        "checkpoint": {"everySteps": 50},
        "output": {"uri": "./output"},
        "tracking": {"kind": "tensorboard"},
        "evaluation": {"prompts": [{"prompt": "What is 2 plus 2?"}], "maxNewTokens": 8},
    },
}


class Project:
    """A folder as a user has it: a job file beside its rows and its model."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        self.file = folder / "job.yaml"
        self.work = folder / "runs" / "sums"
        self.mark = uuid.uuid4().hex
        shutil.copytree(model, folder / "model")
        rows = [{"prompt": f"What is {n} plus {n}?", "completion": f"It is {2 * n}."} for n in range(96)]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.write(JOB)

    def write(self, job: dict[str, Any]) -> None:
        self.file.write_text(yaml.safe_dump(job))

    def start(self, *options: str) -> subprocess.Popen[str]:
        """`finetune run job.yaml` in a process group of its own, as a shell starts it."""
        return subprocess.Popen(
            [FINETUNE, "run", "job.yaml", *options],
            cwd=self.folder,
            env=os.environ | {"FINETUNE_TEST_MARK": self.mark},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, *options: str) -> tuple[int, str]:
        process = self.start(*options)
        output, _ = process.communicate()
        return process.returncode, output

    def processes(self) -> dict[int, str]:
        """Every process that descends from this project's runs, by pid, with its command line."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark.encode() in (entry / "environ").read_bytes():
                    found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
        return found

    def steps(self) -> list[int]:
        return [event["step"] for event in read_metrics(self.work / "metrics.jsonl") if event["event"] == "step"]

    def wait_for_step(self, step: int, process: subprocess.Popen[str]) -> None:
        while max(self.steps(), default=0) < step:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.05)

    def weights(self) -> bytes:
        return (self.folder / "output" / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture
def project(tmp_path: Path, model: Path) -> Project:
    return Project(tmp_path, model)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, model: Path) -> tuple[Project, str]:
    project = Project(tmp_path_factory.mktemp("undisturbed"), model)
    code, output = project.run()
    assert code == 0, output
    return project, output


def test_a_run_leaves_weights_and_a_report(undisturbed: tuple[Project, str]) -> None:
    project, output = undisturbed
    assert project.steps() == list(range(1, STEPS + 1))
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= _names(project.folder / "output" / "merged")
    assert {"report.html", "report.md", "report.json"} <= _names(project.work)
    (curves,) = (project.work / "tracking" / "tensorboard").iterdir()
    assert curves.read_bytes().count(b"train/loss") == STEPS
    assert "✓ train" in output
    assert "Traceback" not in output
    assert project.processes() == {}


def test_the_report_of_a_finished_run_can_be_written_again(undisturbed: tuple[Project, str]) -> None:
    work = undisturbed[0].work
    before = (work / "report.html").read_bytes()
    (work / "report.html").unlink()
    subprocess.run([FINETUNE, "report", work], check=True, capture_output=True)
    assert (work / "report.html").read_bytes() == before


def test_without_a_terminal_the_output_has_no_control_codes(undisturbed: tuple[Project, str]) -> None:
    assert not re.search(r"\x1b|\r", undisturbed[1])


def test_ctrl_c_checkpoints_and_the_same_command_goes_on_to_the_same_weights(
    project: Project, undisturbed: tuple[Project, str]
) -> None:
    process = project.start()
    project.wait_for_step(2, process)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate()
    assert process.returncode == 130, output
    assert "The same command goes on from there" in output
    assert project.processes() == {}
    reached = project.steps()[-1]
    assert reached < STEPS

    code, output = project.run()
    assert code == 0, output
    assert project.steps() == list(range(1, STEPS + 1)), "no step was done twice or left out"
    assert project.weights() == undisturbed[0].weights()


def test_a_run_serves_its_progress_and_sigterm_checkpoints_too(project: Project) -> None:
    port = free_port()
    process = project.start("--metrics-port", str(port))
    project.wait_for_step(2, process)
    progress = urllib3.request("GET", f"http://127.0.0.1:{port}/progress").json()
    assert progress["state"] == "training"
    assert progress["step"] >= 1
    assert progress["totalSteps"] == STEPS
    assert b"finetune_train_tokens_per_second " in urllib3.request("GET", f"http://127.0.0.1:{port}/metrics").data
    os.kill(process.pid, signal.SIGTERM)
    output, _ = process.communicate()
    assert process.returncode == 130, output
    assert [entry.name for entry in (project.work / "checkpoints").glob(f"step-*{project.steps()[-1]}")]
    assert project.processes() == {}


def test_a_killed_worker_is_replaced_and_the_weights_are_the_same(
    project: Project, undisturbed: tuple[Project, str]
) -> None:
    process = project.start()
    project.wait_for_step(60, process)
    workers = [pid for pid, command in project.processes().items() if "RayTrainWorker" in command]
    os.kill(workers[0], signal.SIGKILL)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    events = [event["event"] for event in read_metrics(project.work / "metrics.jsonl")]
    assert events.count("retry") == 1
    assert project.weights() == undisturbed[0].weights()
    assert project.processes() == {}


@pytest.mark.parametrize("whole", [False, True], ids=["driver", "all processes"])
def test_after_sigkill_the_same_command_goes_on_to_the_same_weights(
    project: Project, undisturbed: tuple[Project, str], whole: bool
) -> None:
    process = project.start()
    project.wait_for_step(60, process)
    for pid in list(project.processes()) if whole else [process.pid]:
        os.kill(pid, signal.SIGKILL)
    process.wait()
    while project.processes():  # they notice by themselves that the driver is gone
        time.sleep(0.1)
    code, output = project.run()
    assert code == 0, output
    starts = [e for e in read_metrics(project.work / "metrics.jsonl") if e["event"] == "start"]
    assert starts[-1]["resumedFromStep"] >= 50
    assert project.weights() == undisturbed[0].weights()


def test_a_job_that_changed_is_not_mixed_with_the_checkpoints_of_the_old_one(
    undisturbed: tuple[Project, str], tmp_path: Path
) -> None:
    project = undisturbed[0]
    changed = json.loads(json.dumps(JOB))
    changed["spec"]["method"]["lora"]["rank"] = 8
    other = project.folder / "changed.yaml"
    other.write_text(yaml.safe_dump(changed))
    result = subprocess.run(
        [FINETUNE, "run", other, "--work-dir", project.work],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert "spec.method is not what this run began with" in result.stderr
    assert "--fresh" in result.stderr


def test_a_bad_row_ends_the_run_before_any_worker_starts(project: Project) -> None:
    with (project.folder / "rows.jsonl").open("a") as rows:
        rows.write('{"prompt": "no completion"}\n')
    code, output = project.run()
    assert code == 3
    assert "rows.jsonl:97" in output
    assert not (project.work / "metrics.jsonl").exists()


def test_fresh_does_not_empty_a_folder_that_is_no_run(project: Project) -> None:
    code, output = project.run("--work-dir", ".", "--fresh")
    assert code == 2
    assert "this folder holds something else" in output
    assert {"job.yaml", "rows.jsonl", "model"} <= _names(project.folder)


def test_a_second_run_in_the_same_folder_is_refused(project: Project) -> None:
    import fcntl

    project.work.mkdir(parents=True)
    with (project.work / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, output = project.run()
    assert code == 5
    assert "another run works in this folder" in output


def _names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}
