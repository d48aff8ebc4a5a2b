"""A process that the memory monitor of Ray ends is out of memory, whatever it was doing: a real one really kills."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from finetune_api.errors import HostMemoryFull
from finetune_api.run import ERROR_LOG, RunConfig
from finetune_trainer.pods.report import failure_of
from finetune_trainer.ray_adapter import train_with_ray
from finetune_trainer.reporter import Reporter
from tests.tiny import tiny_llama
from tests.trainer.runs import documents, prepare_sequences, run_config

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def node() -> Iterator[Callable[[float], str]]:
    """Starts a node of one CPU beside a head without any; its monitor finds memory full every so many seconds."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    with ExitStack() as stack:
        stack.callback(cluster.shutdown)
        cluster.add_node(num_cpus=0, include_dashboard=False)

        def start(seconds: float) -> str:
            full = {
                "RAY_memory_usage_threshold": "0.0001",
                "RAY_memory_monitor_refresh_ms": str(int(1000 * seconds)),
            }
            node_id: str = cluster.add_node(num_cpus=1, env_vars=full).node_id
            ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
            stack.callback(ray.shutdown)
            return node_id

        yield start


@pytest.mark.parametrize("seconds", [0.25, 15.0], ids=["as it starts", "as it trains"])
def test_a_worker_that_is_killed_for_memory_is_said_to_be(
    node: Callable[[float], str], tmp_path: Path, seconds: float
) -> None:
    prepare_sequences(tmp_path / "work", [[document] for document in documents(12, seed=4)])
    model = tiny_llama(tmp_path / "model")
    run = run_config(tmp_path / "work", model, workers={"count": 1}, training={"maxSteps": 1_000_000})
    node(seconds)
    with pytest.raises(HostMemoryFull, match=r"memory of its node or pod was full: [\d.]+GB of [\d.]+GB") as raised:
        train_with_ray(run, lambda event: None, lambda: False)
    assert failure_of(raised.value).reason == "OutOfHostMemory"
    assert "low on memory" in (Path(run.work) / ERROR_LOG).read_text(), "Ray's words with the largest processes"


def test_so_is_the_finish(node: Callable[[float], str], tmp_path: Path) -> None:
    from finetune_trainer.ray_cluster import work_on

    run = run_config(tmp_path / "work", tmp_path / "model", workers={"count": 1})
    with pytest.raises(HostMemoryFull):
        work_on(node(1.0), sleep, run, lambda event: None, lambda: False)


def sleep(run: RunConfig, reporter: Reporter, should_stop: Callable[[], Any]) -> None:
    """Work that does not end by itself."""
    import time

    time.sleep(600)
