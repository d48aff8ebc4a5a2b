"""The pods of a job without Kubernetes: the image's commands, a Ray cluster of several nodes, and a disk for each.

Nodes are `ray start` processes on loopback addresses of their own. What distinguishes a pod's file system is given by
environment variables, so nothing is shared but the storage.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import urllib3
from urllib3.exceptions import HTTPError

from finetune_api.run import RunConfig
from finetune_api.stage import ProgressReport, StageReport
from tests.ports import free_port

FINETUNE = Path(sys.executable).with_name("finetune")
RAY = Path(sys.executable).with_name("ray")


class Pods:
    """The pods of one job.

    Attributes:
        folder: everything that the pods write on their disks.
        run_file: what the operator mounts.
    """

    def __init__(self, folder: Path, run: RunConfig, environment: Mapping[str, str]) -> None:
        self.folder, self.run_file = folder, folder / "run.json"
        folder.mkdir(exist_ok=True)
        self.run_file.write_text(run.model_dump_json(exclude_none=True))
        self.progress_port, self._ray_port = free_port(), free_port()
        self._network = f"127.0.{random.randrange(1, 255)}"  # of its own: nodes have ports that are always the same
        self._token = uuid.uuid4().hex
        self._environment = os.environ | dict(environment)
        self._ray = Path(tempfile.mkdtemp(prefix="ray-"))  # its sockets' paths are too long below the tests' folder

    def environment(self, pod: str) -> dict[str, str]:
        """What a pod's processes see."""
        disk = self.folder / pod
        disk.mkdir(exist_ok=True)
        (disk / "log").touch()
        return dict(self._environment) | {
            "FINETUNE_SCRATCH": str(disk / "scratch"),
            "FINETUNE_TERMINATION_LOG": str(disk / "termination-log"),
            "FINETUNE_OUTPUT": str(disk / "log"),
            "FINETUNE_PROGRESS_PORT": str(self.progress_port),
            "FINETUNE_ATTEMPT": "1",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self._token,
            "RAY_ADDRESS": f"{self._network}.2:{self._ray_port}",
        }

    def stage(self, name: str, pod: str, **more: str) -> tuple[int, str]:
        """Runs `finetune NAME --run` as a pod's command; its exit code and output."""
        process = self.start(name, pod, **more)
        output, _ = process.communicate()
        return process.returncode, output

    def start(self, name: str, pod: str, **more: str) -> subprocess.Popen[str]:
        """Starts `finetune NAME --run` in a pod."""
        return subprocess.Popen(
            [FINETUNE, name, "--run", self.run_file],
            env=self.environment(pod) | more,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def report(self, pod: str) -> StageReport:
        """A pod's termination message, as the operator reads it."""
        content = (self.folder / pod / "termination-log").read_bytes()
        assert len(content) <= 4096
        return StageReport.model_validate_json(content, by_alias=True, by_name=False)

    def log(self, pod: str) -> str:
        """A pod's log."""
        return (self.folder / pod / "log").read_text()

    def progress(self) -> ProgressReport:
        """What the head answers, as the operator reads it."""
        answer = urllib3.request("GET", f"http://127.0.0.1:{self.progress_port}/progress", timeout=5, retries=False)
        return ProgressReport.model_validate_json(answer.data, by_alias=True, by_name=False)

    def wait_for_step(self, step: int, driver: subprocess.Popen[str]) -> None:
        """Until the head says that so many steps are done."""
        while True:
            assert driver.poll() is None, driver.communicate()[0]
            with suppress(OSError, HTTPError):
                report = self.progress()
                if report.state == "training" and report.step >= step:
                    return
            time.sleep(0.05)

    def kill_a_rank(self) -> None:
        """Ends a process that trains, as the kernel would."""
        for process in psutil.process_iter(["cmdline"]):
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                trains = "RayTrainWorker" in " ".join(process.info["cmdline"] or [])
                if trains and process.environ().get("FINETUNE_SCRATCH", "").startswith(str(self.folder)):
                    process.kill()
                    return
        raise AssertionError("no process trains")

    def empty_disks(self) -> None:
        """Takes from every pod what it has, as when it comes again on another node."""
        for scratch in self.folder.glob("*/scratch"):
            shutil.rmtree(scratch)

    @contextmanager
    def ray_cluster(self, workers: int) -> Iterator[None]:
        """A head without CPUs, `workers` nodes of one CPU: pods head, worker-0 …; gone when the block is left."""
        nodes = []
        try:
            options = ["--head", f"--port={self._ray_port}", "--include-dashboard=false", f"--temp-dir={self._ray}"]
            nodes.append(self._node("head", f"{self._network}.2", options, 0))
            for number in range(workers):
                address = [f"--address={self._network}.2:{self._ray_port}"]
                nodes.append(self._node(f"worker-{number}", f"{self._network}.{number + 3}", address, 1))
            yield
        finally:
            _end(nodes)
            shutil.move(self._ray, self.folder / "ray")

    def joining(self, pod: str, workers: int) -> dict[str, str]:
        """What the pod that prepares sees besides, when a cluster of so many workers does it."""
        token = self.folder / pod / "auth_token"
        token.write_text(self._token)
        return {
            "FINETUNE_PREPARE_HEAD": f"{self._network}.2:{self._ray_port}",
            "FINETUNE_PREPARE_WORKERS": f"{workers}",
            "FINETUNE_ADDRESS": f"{self._network}.200",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": "",
            "RAY_AUTH_TOKEN_PATH": str(token),
        }

    def _node(self, pod: str, address: str, options: list[str], cpus: int) -> subprocess.Popen[bytes]:
        environment = self.environment(pod)
        del environment["RAY_ADDRESS"]
        options = [*options, f"--num-cpus={cpus}", f"--node-ip-address={address}", "--object-store-memory=100000000"]
        options += ["--min-worker-port=0", "--max-worker-port=0"]  # any: its own range may hold ports of ours
        process = subprocess.Popen(
            [RAY, "start", *options, "--block"],
            env=environment,
            stdout=(self.folder / pod / "ray.out").open("wb"),
            stderr=subprocess.STDOUT,
        )
        end = time.monotonic() + 60
        while b"started" not in (self.folder / pod / "ray.out").read_bytes():
            assert process.poll() is None, (self.folder / pod / "ray.out").read_text()
            assert time.monotonic() < end, (self.folder / pod / "ray.out").read_text()
            time.sleep(0.1)
        return process

    def everything_written(self) -> bytes:
        """All that lies on the pods' disks, to be searched."""
        folders = (self.folder, self._ray)
        return b"\n".join(path.read_bytes() for f in folders for path in sorted(f.rglob("*")) if path.is_file())


def _end(nodes: list[subprocess.Popen[bytes]]) -> None:
    processes = []
    for node in nodes:
        processes += [psutil.Process(node.pid), *psutil.Process(node.pid).children(recursive=True)]
        node.send_signal(signal.SIGTERM)
    _, left = psutil.wait_procs(processes, timeout=10)
    for process in left:
        process.kill()
    psutil.wait_procs(left, timeout=10)


def run_config(spec: Mapping[str, Any], work: str, uid: str = "0123abcd-pods") -> RunConfig:
    """What the operator writes for a job."""
    return RunConfig.model_validate_json(
        json.dumps(
            {"name": "job", "uid": uid, "spec": spec, "base_dir": "/", "model_path": "/scratch/model", "work": work}
        )
    )
