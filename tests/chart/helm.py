"""Helm on the chart: `template(values)` renders it, `helm(…)` runs any command."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final

import yaml

from tests.tools.build import build

CHART: Final = Path(__file__).parents[2] / "charts" / "finetune-operator"
MATRIX: Final = sorted((Path(__file__).parent / "values").glob("*.yaml"))
NAMESPACE: Final = "finetune-system"
SERVED: Final = ("ray.io/v1/RayJob", "monitoring.coreos.com/v1/PodMonitor")  # what a cluster is taken to have

Object = dict[str, Any]


class HelmError(Exception):
    """Helm ended with an error; the message is what it said."""


def helm(*arguments: str | Path, values: Mapping[str, Any] | Path | None = None, kubeconfig: Path | None = None) -> str:
    """Output of a command of Helm's.

    Raises:
        HelmError: it failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [_binary(), *map(str, arguments)]
        if isinstance(values, Mapping):
            path = Path(folder) / "values.yaml"
            path.write_text(json.dumps(values))
            values = path
        if values:
            command.append(f"--values={values}")
        if kubeconfig:
            command.append(f"--kubeconfig={kubeconfig}")
        homes = {"HOME": folder} | {f"HELM_{name}_HOME": folder for name in ("CACHE", "CONFIG", "DATA")}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=homes)
    if done.returncode:
        raise HelmError(done.stderr)
    return done.stdout


def template(
    values: Mapping[str, Any] | Path | None = None, *, served: Sequence[str] = SERVED, chart: Path = CHART
) -> list[Object]:
    """The manifests that the chart makes of values.

    Raises:
        HelmError: it refuses them.
    """
    known = [f"--api-versions={each}" for each in served]
    where = (f"--namespace={NAMESPACE}", "--kube-version=1.34.4")
    text = helm("template", "finetune", chart, *where, *known, values=values)
    return [each for each in yaml.safe_load_all(text) if each]


def of_kind(manifests: Sequence[Object], kind: str) -> list[Object]:
    """Those of a kind."""
    return [each for each in manifests if each["kind"] == kind]


def pods(manifests: Sequence[Object]) -> Iterator[Object]:
    """The pods' specs."""
    for each in manifests:
        if each["kind"] == "Pod":
            yield each["spec"]
        elif each["kind"] in ("Deployment", "Job"):
            yield each["spec"]["template"]["spec"]


@cache
def _binary() -> str:
    return str(build("helm") / "helm")
