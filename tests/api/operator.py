"""The operator as a process of its own: `with operator(cluster, folder, namespaces) as op: …`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import urllib3

from tests.api.cluster import TIED, Cluster
from tests.api.objects import eventually
from tests.ports import free_port

QUICK: Final = {"progress-interval": "1s", "progress-timeout": "2s", "request-timeout": "5s"}


class Operator:
    """`finetune operator` with these flags; its log is kept over restarts."""

    def __init__(self, kubeconfig: Path, log: Path, flags: Sequence[str]) -> None:
        self.log = log
        self._health = f"127.0.0.1:{free_port()}"
        self._command = [
            *(*TIED, sys.executable, "-m", "finetune_api", "operator", f"--kubeconfig={kubeconfig}"),
            *(f"--health-bind-address={self._health}", "--metrics-bind-address=127.0.0.1:0", *flags),
        ]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None, "it was never started"
        return self._process.pid

    def start(self, *, wait: bool = True) -> None:
        """Starts it, and returns when it is ready."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        if wait:
            eventually(self.ready, "the operator to be ready", 60, lambda: self.log_text[-2000:])

    def ready(self) -> bool:
        """Whether it says so.

        Raises:
            RuntimeError: it has ended.
        """
        if (code := self.poll()) is not None:
            raise RuntimeError(f"the operator ended with {code}:\n{self.log_text[-4000:]}")
        return self._says_ok("readyz")

    def healthy(self) -> bool:
        """Whether Kubernetes would let it live."""
        return self._says_ok("healthz")

    def _says_ok(self, page: str) -> bool:
        try:
            return urllib3.request("GET", f"http://{self._health}/{page}", timeout=2, retries=False).status == 200
        except urllib3.exceptions.HTTPError:
            return False

    def poll(self) -> int | None:
        """Its exit code; None while it runs."""
        return None if self._process is None else self._process.poll()

    def signal(self, number: int) -> None:
        """Sends it a signal, such as SIGSTOP."""
        os.kill(self.pid, number)

    def stop(self) -> int:
        """Ends it with SIGTERM; answers with its exit code."""
        assert self._process is not None, "it was never started"
        self._process.terminate()
        try:
            return self._process.wait(30)
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    def kill(self) -> None:
        """Ends it at once, even if it is stopped (SIGSTOP)."""
        if self._process:
            self._process.kill()
            self._process.wait()

    def restart(self) -> None:
        """Kills it and starts it again."""
        self.kill()
        self.start()

    @property
    def log_text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def tracebacks(self) -> list[str]:
        """Lines of the log with an error that was not foreseen."""
        signs = ("Traceback", '"level": "error"', '"level": "critical"')
        return [line for line in self.log_text.splitlines() if any(sign in line for sign in signs)]


@contextmanager
def operator(
    cluster: Cluster,
    folder: Path,
    *namespaces: str,
    kubeconfig: Path | None = None,
    flags: Mapping[str, str] | None = None,
) -> Iterator[Operator]:
    """A running operator for jobs in some namespaces; without any: in all.

    Args:
        folder: where its log goes.
        kubeconfig: whose rights it has; the admin's if it is not given.
        flags: more settings, such as {"start-deadline": "10s"}; {"leader-elect": ""} is --leader-elect.
    """
    folder.mkdir(parents=True, exist_ok=True)
    chosen = {**QUICK, **(flags or {})}
    words = [f"--{key}={value}" if value else f"--{key}" for key, value in chosen.items()]
    if "leader-elect" not in chosen:
        words.append("--no-leader-elect")
    started = Operator(
        kubeconfig or cluster.kubeconfig, folder / "operator.log", [*words, f"--namespaces={','.join(namespaces)}"]
    )
    try:
        started.start()
        yield started
    finally:
        started.kill()
