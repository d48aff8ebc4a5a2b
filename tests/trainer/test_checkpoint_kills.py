"""SIGKILL at twenty moments of one run, on two machines that share a bucket only: it goes on, to the same bytes."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_api.job import Checkpoint
from finetune_api.run import CHECKPOINTS, EXPORT, RunConfig
from finetune_trainer.reporter import read_metrics
from tests.s3 import S3Server, s3_server
from tests.tiny import tiny_llama
from tests.trainer.lives import Machines, end, wait_for
from tests.trainer.runs import documents, prepare_sequences, run_config

pytestmark = pytest.mark.timeout(500)

STEPS = 60
MARKER = "complete.json"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        (server.root / "work").mkdir()
        yield server


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("kills")
    some = documents(50, seed=11)
    prepare_sequences(folder / "work", [some[i : i + 2] for i in range(0, 50, 2)])
    return run_config(
        folder / "work",
        tiny_llama(folder / "model"),
        training={"maxSteps": STEPS, "precision": "bf16", "schedule": "cosine"},
        deepspeed={"zeroStage": 2},
        checkpoint={"everySteps": 3, "keep": 2},
    )


@pytest.fixture(scope="module")
def undisturbed(run: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    machines = Machines(tmp_path_factory.mktemp("undisturbed"), run, 2)
    # Without a bucket both would have to share a disk: no checkpoint but the last.
    (tmp_path := Path(machines.runs[0].work) / "alone").mkdir()
    assert end(machines.begin({}, f"file://{tmp_path}")) == [0, 0]
    return weights(machines)


def weights(machines: Machines) -> dict[str, bytes]:
    folder = Path(machines.runs[0].work) / EXPORT
    found = {path.name: path.read_bytes() for path in folder.rglob("*.safetensors")}
    assert found
    return found


class Moments:
    """Conditions for the next kill, drawn from a seeded generator; each sees files only, as another process may."""

    def __init__(self, machines: Machines, remote: Path) -> None:
        self.machines, self.remote = machines, remote
        self.local = Path(machines.runs[-1].work) / CHECKPOINTS
        self.export = Path(machines.runs[0].work) / EXPORT

    def next(self, kind: str) -> Callable[[], bool]:
        if kind == "step":
            goal = len(self.lines()) + 2 + random.randrange(5)
            return lambda: len(self.lines()) >= goal
        if kind == "write":
            before = set(self.local.glob("*/*"))
            return lambda: bool(set(self.local.glob("*/*")) - before)
        if kind == "upload":
            before = set(self.remote.glob("*/shard-*"))
            return lambda: bool(set(self.remote.glob("*/shard-*")) - before)
        if kind == "marker":
            before = set(self.remote.glob(f"*/{MARKER}"))
            return lambda: bool(set(self.remote.glob(f"*/{MARKER}")) - before)
        assert kind == "export"
        events = len(self.lines())
        return lambda: any(event["event"] == "export" for event in self.lines()[events:])

    def lines(self) -> list[dict[str, Any]]:
        return read_metrics(self.machines.metrics)

    def good(self) -> int | None:
        """Step of the newest checkpoint in the bucket of which every file is as its marker says."""
        best = None
        for marker in self.remote.glob(f"*/{MARKER}"):
            content = json.loads(marker.read_bytes())
            files = content["files"].items()
            if all(hashlib.sha256((marker.parent / n).read_bytes()).hexdigest() == f["sha256"] for n, f in files):
                best = max(best or 0, content["step"])
        return best


def test_a_run_that_is_killed_twenty_times_ends_with_the_bytes_of_one_that_was_not(
    run: RunConfig, undisturbed: dict[str, bytes], server: S3Server, tmp_path: Path
) -> None:
    random.seed(20)
    machines = Machines(tmp_path, run, 2)
    moments = Moments(machines, server.root / "work" / "run" / CHECKPOINTS)
    kinds = ["step", "write", "upload", "marker"] * 4
    random.shuffle(kinds)
    killed = []
    for kind in [*kinds, "export", "export", "export", "export"]:
        good, starts = moments.good(), len(resumed(machines))
        workers = machines.begin(server.environment, "s3://work/run")
        if wait_for(moments.next(kind), workers):
            time.sleep(random.random() * (0.3 if kind == "export" else 0.03))
            victims = random.choice([workers, workers[:1], workers[1:]])
            for victim in victims:
                victim.kill()
            killed.append(kind)
        codes = end(workers)
        assert 0 not in codes or kind == "export", (kind, codes)
        for step in resumed(machines)[starts:]:  # none when it was killed while it fetched the checkpoint
            assert step == good, f"after {killed}"
        if random.random() < 0.3:  # the machine is gone, and another one has its place
            shutil.rmtree(Path(machines.runs[1].work) / CHECKPOINTS, ignore_errors=True)
    assert len(killed) == 20, killed
    assert end(machines.begin(server.environment, "s3://work/run")) == [0, 0]
    assert weights(machines) == undisturbed
    assert moments.good() == STEPS
    left = sorted(path.name for path in moments.remote.iterdir())
    assert len(left) <= 2, "what the killed left unfinished is gone"


def test_one_worker_that_is_told_to_end_makes_all_upload_a_checkpoint_and_leave(
    run: RunConfig, server: S3Server, tmp_path: Path
) -> None:
    machines = Machines(tmp_path, run, 2)
    moments = Moments(machines, server.root / "work" / "told" / CHECKPOINTS)
    workers = machines.begin(server.environment, "s3://work/told", checkpoint=Checkpoint(every_steps=1000))
    assert wait_for(lambda: any(event["event"] == "step" for event in moments.lines()), workers)
    workers[1].terminate()
    assert end(workers) == [0, 0]
    last = moments.lines()[-1]
    assert (last["event"], last["reason"]) == ("end", "interrupted")
    assert moments.good() == last["step"], "no step is lost"


def resumed(machines: Machines) -> list[int | None]:
    return [event["resumedFromStep"] for event in read_metrics(machines.metrics) if event["event"] == "start"]
