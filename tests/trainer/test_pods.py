"""The three commands that pods run, as pods run them: disks of their own, a real Ray cluster, a real S3 server."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import urllib3

from finetune_api.result import Result
from tests.s3 import S3Server, s3_server
from tests.tiny import tiny_llama
from tests.trainer.pods import Pods, run_config

pytestmark = pytest.mark.timeout(300)

STEPS = 40
SPEC: dict[str, Any] = {
    "model": {"source": "s3://bucket/model"},
    "method": {"tuning": "lora", "lora": {"rank": 4}},
    "data": {"train": [{"uri": "s3://bucket/rows.jsonl"}], "evaluationFraction": 0.1, "sequenceLength": 64},
    "training": {"maxSteps": STEPS, "sequencesPerBatch": 4, "precision": "fp32"},
    "deepspeed": {"zeroStage": 2},
    "workers": {"count": 2},
    "checkpoint": {"everySteps": 10},
    "output": {"uri": "s3://bucket/out"},
    "tracking": {"kind": "tensorboard"},
    "evaluation": {"prompts": [{"prompt": "What is 2 plus 2?"}], "maxNewTokens": 8},
}
WORK = "s3://bucket/work/job"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    model = tiny_llama(tmp_path_factory.mktemp("base") / "model")
    with s3_server(tmp_path_factory.mktemp("s3")) as running:
        bucket = running.root / "bucket"
        shutil.copytree(model, bucket / "model")
        rows = [{"prompt": f"What is {n} plus {n}?", "completion": f"It is {2 * n}."} for n in range(96)]
        (bucket / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        yield running


@dataclass(frozen=True)
class Whole:
    """A job that went through all stages, with its cluster still there."""

    pods: Pods
    bucket: Path
    codes: dict[str, tuple[int, str]]


@pytest.fixture(scope="module")
def whole(server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Whole]:
    pods = Pods(tmp_path_factory.mktemp("pods"), run_config(SPEC, WORK), server.environment)
    codes = {"prepare": pods.stage("prepare", "prepare")}
    with pods.ray_cluster(workers=2):
        codes["train"] = pods.stage("train", "head")
        codes["result"] = pods.stage("result", "result")
        yield Whole(pods, server.root / "bucket", codes)


def test_prepare_leaves_shards_under_the_work_prefix_and_says_what_the_run_needs(whole: Whole) -> None:
    code, output = whole.codes["prepare"]
    assert code == 0, output
    manifest = (whole.bucket / "work/job/prepared/manifest.json").read_bytes()
    report = whole.pods.report("prepare")
    assert report.failure is None
    assert report.manifest_sha256 == hashlib.sha256(manifest).hexdigest()
    assert report.plan
    assert report.plan.total_steps == STEPS
    assert (whole.bucket / "work/job/prepared/train-00000.arrow").exists()
    assert not list((whole.pods.folder / "prepare").rglob("*.safetensors")), "rows need no weights"


def test_training_publishes_weights_from_the_pod_that_has_them(whole: Whole) -> None:
    code, output = whole.codes["train"]
    assert code == 0, output
    assert (whole.bucket / "out/adapter/adapter_model.safetensors").exists()
    assert (whole.bucket / "out/merged/config.json").exists()
    assert (whole.bucket / "out/report/report.html").exists()
    result = Result.model_validate_json((whole.bucket / "work/job/result.json").read_bytes())
    assert result.training.steps == STEPS
    assert result.training.world_size == 2
    steps = [json.loads(line) for line in (whole.bucket / "work/job/metrics.jsonl").read_text().splitlines()]
    assert [event["step"] for event in steps if event["event"] == "step"] == list(range(1, STEPS + 1))
    assert not list((whole.pods.folder / "head").rglob("*.safetensors")), "the head holds no weights"
    (curves,) = (whole.bucket / "work/job/tracking/tensorboard").iterdir()
    assert curves.read_bytes().count(b"train/loss") == STEPS


def test_every_worker_pod_has_its_own_copy_of_model_and_rows(whole: Whole) -> None:
    for pod in ("worker-0", "worker-1"):
        scratch = whole.pods.folder / pod / "scratch"
        assert (scratch / "model" / "model.safetensors").exists()
        assert (scratch / "work" / "prepared" / "manifest.json").exists()


def test_the_head_goes_on_answering_when_its_driver_has_ended(whole: Whole) -> None:
    report = whole.pods.progress()
    assert report.state == "finished"
    assert report.step == report.total_steps == STEPS
    assert report.result
    assert report.result.uri == "s3://bucket/out"
    assert report.result.report == "s3://bucket/out/report/report.html"
    metrics = urllib3.request("GET", f"http://127.0.0.1:{whole.pods.progress_port}/metrics").data
    assert b"finetune_train_step 40.0" in metrics


def test_the_stage_result_reads_the_same_from_storage(whole: Whole) -> None:
    code, output = whole.codes["result"]
    assert code == 0, output
    assert whole.pods.report("result").result == whole.pods.progress().result


def test_the_log_of_a_worker_pod_has_its_ranks_lines(whole: Whole) -> None:
    logs = [whole.pods.log(f"worker-{number}") for number in (0, 1)]
    assert {log[:9] for log in logs} == {"[rank 0] ", "[rank 1] "}
    assert f"step {STEPS}/{STEPS}" in whole.pods.log("head")


def test_credentials_are_written_nowhere(whole: Whole, server: S3Server) -> None:
    secret = server.environment["AWS_SECRET_ACCESS_KEY"].encode()
    assert secret not in whole.pods.everything_written()
    assert secret not in b"".join(output.encode() for _, output in whole.codes.values())
    assert not [path for path in whole.bucket.rglob("*") if path.is_file() and secret in path.read_bytes()]


def test_attempts_that_were_stopped_and_killed_end_in_the_same_weights(whole: Whole, server: S3Server) -> None:
    """Each attempt begins on empty disks: what it goes on from is in the bucket."""
    spec = SPEC | {"output": {"uri": "s3://bucket/again"}}
    pods = Pods(whole.pods.folder / "again", run_config(spec, "s3://bucket/work/again"), server.environment)
    assert pods.stage("prepare", "prepare")[0] == 0
    with pods.ray_cluster(workers=2):
        driver = pods.start("train", "head")
        pods.wait_for_step(3, driver)
        driver.send_signal(signal.SIGTERM)
        output, _ = driver.communicate()
        assert driver.returncode == 130, output
        assert pods.progress().state == "stopped"
        reached = pods.progress().step
        pods.empty_disks()

        driver = pods.start("train", "head", FINETUNE_ATTEMPT="2")
        pods.wait_for_step(reached + 1, driver)
        pods.kill_a_rank()
        output, _ = driver.communicate()
        assert driver.returncode == 6, output
        report = pods.progress()
        assert (report.attempt, report.state) == (2, "failed")
        assert report.failure
        assert report.failure.reason == "Unknown", "the cluster knows better who killed it"
        pods.empty_disks()

        code, output = pods.stage("train", "head", FINETUNE_ATTEMPT="3")
        assert code == 0, output
        assert pods.progress().state == "finished"
    events = [json.loads(line) for line in (whole.bucket / "work/again/metrics.jsonl").read_text().splitlines()]
    starts = [event["resumedFromStep"] for event in events if event["event"] == "start"]
    assert starts[0] is None
    assert starts[1] == reached
    assert {event["step"] for event in events if event["event"] == "step"} == set(range(1, STEPS + 1))
    name = "adapter/adapter_model.safetensors"
    assert (whole.bucket / "again" / name).read_bytes() == (whole.bucket / "out" / name).read_bytes()
