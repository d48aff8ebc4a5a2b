"""Programs that some tests need. A machine may lack one; continuous integration may not."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Final

import pytest

# Where scripts/setup.py puts what would start a service if it were installed.
UNPACKED: Final = Path(__file__).parents[1] / ".cache" / "prometheus" / "usr" / "bin"


def program(*names: str) -> str:
    """Path of the first program that is installed. Without any the test is skipped, in CI (FINETUNE_CI=1) it fails."""
    for name in names:
        if found := shutil.which(name) or shutil.which(name, path=UNPACKED):
            return found
    message = f"none of {', '.join(names)} is installed; `make test` as root installs what apt has"
    if os.environ.get("FINETUNE_CI") == "1":
        pytest.fail(message)
    pytest.skip(message)
