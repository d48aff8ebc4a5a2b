"""`kubectl finetune` as a person types it, and jobs for it to show."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from tests.api.objects import Api
from tests.tools.build import build
from tests.unit.api_cases import JOB

KIND: Final = f"{JOB['apiVersion']}/{JOB['kind']}"
NAME: Final = "support-chat"
SECONDS: Final = 60  # that a command may take on a busy machine; one is usual
Run = Callable[..., subprocess.CompletedProcess[str]]
MakeJob = Callable[..., dict[str, Any]]


def environment() -> dict[str, str]:
    """Where kubectl finds the plugin, and nothing that says which cluster is meant."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("KUBE", "FINETUNE"))}
    return kept | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "TZ": "UTC"}


def command(kubeconfig: Path, namespace: str, *arguments: str) -> list[str]:
    """The command line, for the real kubectl."""
    program, *rest = arguments
    flags = ["--kubeconfig", str(kubeconfig), *(["-n", namespace] if namespace else [])]
    return [str(build("kubernetes") / "kubectl"), "finetune", program, *flags, *rest]


def run(
    kubeconfig: Path, namespace: str, *arguments: str, user: Path | None = None, where: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end, with no terminal; as another `user` and in another namespace where they are named."""
    done = subprocess.run(
        command(user or kubeconfig, namespace if where is None else where, *arguments),
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env=environment(),
        stdin=subprocess.DEVNULL,
    )
    assert "Traceback" not in done.stderr
    return done


def make_job(api: Api, namespace: str, name: str = NAME, status: dict[str, Any] | None = None) -> dict[str, Any]:
    """Makes a job, and writes what the operator would have into its status."""
    api.create(JOB | {"metadata": {"name": name}}, namespace=namespace)
    return api.patch(KIND, name, namespace, {"status": status or {}}, status=True)
