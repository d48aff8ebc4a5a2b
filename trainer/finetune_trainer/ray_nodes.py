"""The nodes of the Ray cluster that this process is connected to, as `elastic` asks for them."""

from __future__ import annotations

from collections.abc import Set

import ray
from ray._private.state import state

from finetune_api.job import Workers


def draining() -> Set[str]:
    """Nodes whose pods were told to end."""
    return set(state.get_draining_nodes())


class RayNodes:
    """Nodes for the processes of `workers`. A node that Ray drains (its pod was told to end) has no room any more."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers

    def room(self) -> int:
        leaving = draining()
        there = (n["Resources"] for n in ray.nodes() if n["Alive"] and n["NodeID"] not in leaving)
        return sum(self._processes(resources) for resources in there)

    def leaving(self) -> Set[str]:
        return draining()

    def _processes(self, resources: dict[str, float]) -> int:
        fits = int(resources.get("CPU", 0.0) / self._workers.cpus_each)
        return min(fits, int(resources.get("GPU", 0.0))) if self._workers.gpus_each else fits
