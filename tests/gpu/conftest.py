"""The tier that needs an NVIDIA GPU: `pytest tests/gpu`. On other machines every test says why it was skipped."""

from __future__ import annotations

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.path.parent.name == "gpu":
                item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU on this machine"))
