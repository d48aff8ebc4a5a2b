"""Prepare as pods run it that need several workers: a real Ray cluster, disks of their own, a real S3 server."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_api.errors import TooManyRows
from tests.s3 import S3Server, s3_server
from tests.tiny import tiny_llama
from tests.trainer.jobs import chats, jsonl
from tests.trainer.pods import Pods, run_config

pytestmark = pytest.mark.timeout(300)

SPEC: dict[str, Any] = {
    "model": {"source": "s3://bucket/model"},
    "data": {
        "train": [{"uri": "s3://bucket/rows.jsonl"}, {"uri": "s3://bucket/more"}],
        "evaluationFraction": 0.1,
        "sequenceLength": 128,
    },
    "training": {"maxSteps": 4},
    "output": {"uri": "s3://bucket/out"},
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    model = tiny_llama(tmp_path_factory.mktemp("base") / "model")
    with s3_server(tmp_path_factory.mktemp("s3")) as running:
        bucket = running.root / "bucket"
        shutil.copytree(model, bucket / "model")
        rows = chats(500)
        (bucket / "rows.jsonl").write_bytes(jsonl([*rows[:300], *rows[:20]]))
        (bucket / "more").mkdir()
        (bucket / "more" / "a.jsonl").write_bytes(jsonl(rows[300:]))
        yield running


@pytest.fixture(scope="module")
def alone(server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one pod makes of the rows."""
    pods = Pods(tmp_path_factory.mktemp("alone"), run_config(SPEC, "s3://bucket/work/alone"), server.environment)
    code, output = pods.stage("prepare", "prepare")
    assert code == 0, output
    return prepared(server.root / "bucket/work/alone")


def prepared(work: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (work / "prepared").iterdir()}


def test_several_workers_leave_the_bytes_of_one_and_no_key(
    server: S3Server, alone: dict[str, bytes], tmp_path: Path
) -> None:
    work = server.root / "bucket/work/many"
    stale = work / "prepare.exchange/tokens-000000-00000"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"of a pod that was killed")
    pods = Pods(tmp_path / "pods", run_config(SPEC, "s3://bucket/work/many"), server.environment)
    with pods.ray_cluster(workers=2):
        pods.environment("prepare")
        code, output = pods.stage("prepare", "prepare", **pods.joining("prepare", 2))
        assert code == 0, output
        assert prepared(work) == alone
        assert not stale.exists()
        report = pods.report("prepare")
        assert report.plan
        assert report.plan.total_steps == 4
        assert report.manifest_sha256
        assert not list((pods.folder / "prepare").rglob("*.arrow")), "shards go where they stay"
        said = pods.everything_written() + output.encode()
    assert server.environment["AWS_SECRET_ACCESS_KEY"].encode() not in said


def test_bad_rows_are_named_and_nothing_counts_as_prepared(server: S3Server, tmp_path: Path) -> None:
    bucket = server.root / "bucket"
    (bucket / "bad.jsonl").write_bytes(jsonl(chats(40)) + b'{"messages": []}\n')
    spec = SPEC | {"data": SPEC["data"] | {"train": [{"uri": "s3://bucket/bad.jsonl"}]}}
    pods = Pods(tmp_path / "pods", run_config(spec, "s3://bucket/work/bad"), server.environment)
    with pods.ray_cluster(workers=1):
        pods.environment("prepare")
        code, output = pods.stage("prepare", "prepare", **pods.joining("prepare", 1))
    assert code == 3, output
    failure = pods.report("prepare").failure
    assert failure
    assert failure.reason == "UserData"
    assert "bad.jsonl:41" in failure.message
    assert not (bucket / "work/bad/prepared/manifest.json").exists()
    assert not (bucket / "work/bad/prepare.exchange").exists()


@pytest.mark.parametrize(("share", "wanted"), [(1, None), (2, 2), (7, 7)])
def test_more_rows_than_one_pod_prepares_are_asked_workers_for(
    server: S3Server, tmp_path: Path, share: int, wanted: int | None
) -> None:
    bucket = server.root / "bucket"
    size = (bucket / "rows.jsonl").stat().st_size + (bucket / "more/a.jsonl").stat().st_size
    run = run_config(SPEC, f"s3://bucket/work/asks-{share}").model_copy(update={"prepare_bytes": -(-size // share)})
    pods = Pods(tmp_path / "pods", run, server.environment)
    code, output = pods.stage("prepare", "prepare")
    assert code == (TooManyRows.exit_code if wanted else 0), output
    assert pods.report("prepare").workers == wanted
    assert (bucket / f"work/asks-{share}").exists() == (wanted is None), "nothing is begun"
