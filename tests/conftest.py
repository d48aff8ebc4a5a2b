"""The environment that every test and the processes it starts share: no hub, no telemetry, no GPU by accident."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

# Before anything imports the libraries that read these.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "MPLBACKEND": "Agg",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
}
# Several workers share a few cores: more threads each would only wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")


@pytest.fixture(autouse=True)
def _own_environment() -> Iterator[None]:
    """Gives each test the environment as it found it: libraries set RANK and the like for processes started later."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ |= before
