"""Starts the ranks of one benchmark run on this machine and measures them from outside."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Usage:
    """What a run cost: wall seconds from start to exit, and the ranks' memory in bytes.

    peak_bytes: the sum of the ranks' peaks of resident memory, libraries that they share counted once for each.
    peak_shared_bytes: the highest sum of their proportional shares (PSS), sampled twice a second: libraries count once.
    """

    seconds: float
    peak_bytes: int
    peak_shared_bytes: int


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_ranks(command: list[str], world_size: int, log: Path) -> Usage:
    """Runs `command` once per rank with torchrun's environment, one thread each, and waits.

    Raises:
        RuntimeError: a rank failed; the message names `log`, where the output of all ranks is.
    """
    port = _free_port()
    started = time.perf_counter()
    peak = 0
    with log.open("wb") as output:
        ranks = []
        for rank in range(world_size):
            environment = os.environ | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "LOCAL_WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
                "DS_ACCELERATOR": "cpu",
                "HF_HUB_OFFLINE": "1",
                "TOKENIZERS_PARALLELISM": "false",
            }
            ranks.append(subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT))
        failed = False
        sampler = _Sampler([process.pid for process in ranks])
        sampler.start()
        for process in ranks:
            # wait4 and not wait(): it reports this process's own peak memory.
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            peak += usage.ru_maxrss * 1024
            if process.returncode != 0 and not failed:
                failed = True
                for other in ranks:
                    if other.returncode is None:
                        other.terminate()
    if failed:
        raise RuntimeError("a rank failed; its last words:\n" + log.read_text(errors="replace")[-4000:])
    sampler.join()
    return Usage(time.perf_counter() - started, peak, sampler.peak)


class _Sampler(threading.Thread):
    """Reads the processes' proportional set sizes until the last of them has ended."""

    def __init__(self, pids: list[int]) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self._pids = pids

    def run(self) -> None:
        while total := sum(map(_proportional_bytes, self._pids)):
            self.peak = max(self.peak, total)
            time.sleep(0.5)


def _proportional_bytes(pid: int) -> int:
    """PSS of a process; 0 when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
