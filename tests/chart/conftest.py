"""Tools of this tier: a machine that cannot build them skips its tests, continuous integration may not."""

from __future__ import annotations

import os
import subprocess

import pytest

from tests.tools.build import build


@pytest.fixture(scope="session", autouse=True)
def tools() -> None:
    for module in ("helm", "kube-score", "prometheus-operator"):
        try:
            build(module)
        except (FileNotFoundError, subprocess.CalledProcessError) as error:
            message = f"tests/tools/{module} does not build: {error}"
            if os.environ.get("FINETUNE_CI") == "1":
                pytest.fail(message)
            pytest.skip(message)
