"""`workers.min` on a real Ray cluster: nodes that are told to end or die, with real workers on them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_api.run import METRICS_FILE, RunConfig
from finetune_trainer.ray_adapter import train_with_ray
from finetune_trainer.reporter import MetricsFile, read_metrics
from tests.tiny import tiny_llama
from tests.trainer.runs import documents, prepare_sequences, run_config

pytestmark = pytest.mark.timeout(300)

STEPS = 400


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Any]:
    """A head without CPUs and two nodes of one each, as pods are."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    cluster.add_node(num_cpus=0, include_dashboard=False)
    cluster.nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def test_a_node_that_is_drained_costs_no_step_and_one_worker_goes_on(cluster: Any, tmp_path: Path) -> None:
    from ray._private.worker import global_worker
    from ray.core.generated import autoscaler_pb2

    some = documents(24, seed=4)
    prepare_sequences(tmp_path / "work", [some[i : i + 1] for i in range(24)])
    run = run_config(
        tmp_path / "work",
        tiny_llama(tmp_path / "model"),
        workers={"count": 2, "min": 1},
        training={"maxSteps": STEPS},
        checkpoint={"everySteps": 10_000},
    )

    def drain() -> None:
        wait_for_step(run, 5)
        deadline = int(time.time() * 1000) + 60_000  # as `ray start` does when its pod is told to end
        reason = autoscaler_pb2.DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION
        global_worker.gcs_client.drain_node(cluster.nodes[1].node_id, reason, "preempted", deadline)

    notice = threading.Thread(target=drain)
    notice.start()
    with MetricsFile(Path(run.work) / METRICS_FILE) as metrics:
        train_with_ray(run, metrics.event, lambda: False, patience=2.0)
    notice.join()
    assert [event["worldSize"] for event in events(run, "start")] == [2, 1]
    assert [event["step"] for event in events(run, "step")] == list(range(1, STEPS + 1)), "none done twice or left out"
    assert [event["reason"] for event in events(run, "retry")] == ["a node is being taken away"]
    assert [event["reason"] for event in events(run, "end")] == ["complete"]


def wait_for_step(run: RunConfig, step: int) -> None:
    while not any(event["step"] >= step for event in events(run, "step")):
        time.sleep(0.05)


def events(run: RunConfig, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_metrics(Path(run.work) / METRICS_FILE) if event["event"] == kind]
