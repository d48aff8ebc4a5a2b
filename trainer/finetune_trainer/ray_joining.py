"""A machine beside a Ray cluster joins it, as a node without cores, whose driver hands work to the others."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Final

import ray

from finetune_api.errors import FinetuneError
from finetune_trainer.ray_cluster import connected

_STORE_BYTES: Final = 256 << 20  # for a few numbers of each row; tokens do not come here
_JOIN_SECONDS: Final = 600.0  # that a head that was lost may take to be there again
_WORKERS_SECONDS: Final = 300.0  # that workers are waited for; those that come later join in
_PAUSE_SECONDS: Final = 2.0
_END_SECONDS: Final = 10.0
_STARTED: Final = b"Ray runtime started"


@contextlib.contextmanager
def joined(head: str, workers: int, node_address: str | None, tick: Callable[[], None]) -> Iterator[None]:
    """This process is a driver of the cluster at `head`; on leaving, its node leaves too.

    Args:
        head: host:port.
        workers: nodes with cores that are waited for.
        node_address: this machine's, where Ray would find another one.
        tick: called while this waits; may raise.

    Raises:
        FinetuneError: the head does not answer, or no worker comes.
    """
    node = _started(head, node_address, tick)
    try:
        with connected(head, node_address):
            _wait_for(workers, tick)
            yield
    finally:
        _end(node)


def _started(head: str, node_address: str | None, tick: Callable[[], None]) -> subprocess.Popen[bytes]:
    end = time.monotonic() + _JOIN_SECONDS
    while True:
        tick()
        node = _start(head, node_address)
        if node is not None:
            return node
        if time.monotonic() > end:
            raise FinetuneError(
                f"the Ray cluster at {head} does not answer", where="prepare", hint="its head pod's log may say why"
            )
        time.sleep(_PAUSE_SECONDS)


def _start(head: str, node_address: str | None) -> subprocess.Popen[bytes] | None:
    """`ray start`; None when it ended without a node."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", f"--address={head}", "--num-cpus=0", "--block"]
    command += [f"--object-store-memory={_STORE_BYTES}", "--disable-usage-stats"]
    command += [f"--node-ip-address={node_address}"] if node_address else []
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    for line in process.stdout:
        if _STARTED in line:
            threading.Thread(target=process.stdout.read, name="ray-node", daemon=True).start()  # a full pipe blocks it
            return process
    process.wait()
    return None


def _wait_for(workers: int, tick: Callable[[], None]) -> None:
    end = time.monotonic() + _WORKERS_SECONDS
    while (there := sum(node["Alive"] and node["Resources"].get("CPU", 0) > 0 for node in ray.nodes())) < workers:
        tick()
        if time.monotonic() > end:
            if there:
                return
            raise FinetuneError(
                "no worker has joined the Ray cluster", where="prepare", hint="its pods' events and logs may say why"
            )
        time.sleep(_PAUSE_SECONDS)


def _end(node: subprocess.Popen[bytes]) -> None:
    node.terminate()
    try:
        node.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        node.kill()
        node.wait()
