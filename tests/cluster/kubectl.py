"""kubectl, for what needs more than a request: logs and commands in pods, and what a user types."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.tools.build import build


@dataclass(frozen=True)
class Kubectl:
    """kubectl as the user of a kubeconfig."""

    kubeconfig: Path

    def __call__(self, *arguments: str, seconds: float = 60) -> str:
        """What it prints.

        Raises:
            RuntimeError: it fails; what it said is in the message.
        """
        command = self.command(*arguments)
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds)
        if done.returncode:
            raise RuntimeError(f"kubectl {' '.join(arguments)}: {done.returncode}: {done.stderr.strip()}")
        return done.stdout

    def command(self, *arguments: str) -> list[str]:
        """The command line."""
        return [str(build("kubernetes") / "kubectl"), f"--kubeconfig={self.kubeconfig}", *arguments]

    def shell(self, namespace: str, pod: str, script: str, seconds: float = 60) -> str:
        """What a shell in the pod prints."""
        return self("exec", "--namespace", namespace, pod, "--", "sh", "-c", script, seconds=seconds)
