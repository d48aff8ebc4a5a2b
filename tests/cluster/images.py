"""The images that the lab's pods run, built without a registry: buildah over a base that debootstrap makes.

Everything is kept in .cache/images and made again only when what goes into it changes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from tests import require
from tests.api.cluster import Programs
from tests.cluster.containerd import CONTENT, PAUSE, Containerd, copy_images
from tests.tools.build import ROOT, build

OPERATOR: Final = "localhost/finetune-operator:lab"
TRAINER: Final = "localhost/finetune-trainer:lab"
BASE: Final = "localhost/finetune-base:bookworm"
_CACHE: Final = ROOT / ".cache" / "images"
_PACKAGES: Final = ("ca-certificates", "procps", "python3", "python3-venv", "wget")
_UNUSED: Final = (
    "usr/share/doc",
    "usr/share/i18n",
    "usr/share/locale",
    "usr/share/man",
    "var/cache/apt",
    "var/lib/apt/lists",
)
_NAME: Final = "org.opencontainers.image.ref.name"
_CERTIFICATES: Final = "/etc/ssl/certs"


def containerd_images() -> Path:
    """A containerd's root that holds all images; built first if need be.

    Raises:
        subprocess.CalledProcessError: an image does not build.
    """
    _CACHE.mkdir(parents=True, exist_ok=True)
    with (_CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        identities = _build_all()
        key = hashlib.sha256("".join(f"{name} {identity}\n" for name, identity in sorted(identities.items())).encode())
        seed = _CACHE / f"containerd-{key.hexdigest()[:16]}"
        if not seed.is_dir():
            before = list(_CACHE.glob("containerd-*"))
            _import(list(identities), before[0] if before else None, seed)
            for old in before:
                shutil.rmtree(old)
    return seed


def _build_all() -> dict[str, str]:
    """Builds every image; the identity of each by its name."""
    if not _buildah("images", "--quiet", "--filter", f"reference={BASE}"):
        _build_base()
    certificates = ["--volume", f"{_CERTIFICATES}:{_CERTIFICATES}:ro"]  # a company's own authority too
    for target, name in (("operator", OPERATOR), ("trainer", TRAINER)):
        arguments = ["--build-arg", f"BASE={BASE}", "--build-arg", "ACCELERATOR=cpu"]
        _buildah(
            "bud",
            "--isolation=chroot",
            "--layers",
            *certificates,
            *arguments,
            "--target",
            target,
            "--tag",
            name,
            str(ROOT),
        )
    programs = {
        "coredns": build("coredns") / "coredns",
        "kuberay": build("kuberay") / "ray-operator",
        "prometheus": Path(require.program("prometheus")),
    }
    names = [OPERATOR, TRAINER, PAUSE, *(_binary(name, program) for name, program in programs.items())]
    with tempfile.TemporaryDirectory() as scratch:
        Path(scratch, "Dockerfile").write_text(f'FROM {BASE}\nENTRYPOINT ["sleep", "infinity"]\n')
        _buildah("bud", "--layers", "--tag", PAUSE, scratch)
    return {name: _buildah("inspect", "--type=image", "--format={{.FromImageID}}", name) for name in names}


def _binary(tool: str, program: Path) -> str:
    """An image of a program of the test tools; Debian's need its C library."""
    name = f"localhost/{tool}:lab"
    with tempfile.TemporaryDirectory() as scratch:
        shutil.copy2(program, Path(scratch, "program"))
        Path(scratch, "Dockerfile").write_text(f'FROM {BASE}\nCOPY program /program\nENTRYPOINT ["/program"]\n')
        _buildah("bud", "--layers", "--timestamp=0", "--tag", name, scratch)
    return name


def _build_base() -> None:
    with tempfile.TemporaryDirectory(dir=_CACHE) as scratch:
        folder = Path(scratch, "base")
        command = ["debootstrap", "--variant=minbase", f"--include={','.join(_PACKAGES)}", "bookworm", str(folder)]
        subprocess.run([*command, _mirror()], check=True, stdout=subprocess.DEVNULL)
        for unused in _UNUSED:
            shutil.rmtree(folder / unused, ignore_errors=True)
        container = _buildah("from", "scratch")
        _buildah("copy", "--quiet", container, str(folder), "/")
        _buildah("commit", "--quiet", "--rm", container, BASE)


def _mirror() -> str:
    """Where this machine has its Debian packages from."""
    sources = [Path("/etc/apt/sources.list"), *Path("/etc/apt/sources.list.d").glob("*")]
    found = [
        match[1]
        for path in sources
        if path.is_file()
        for match in re.finditer(r"^(?:URIs:|deb(?: \[.*\])?)\s+(\S+/debian/?)(?:\s|$)", path.read_text(), re.MULTILINE)
    ]
    return found[0] if found else "http://deb.debian.org/debian"


def _import(names: Sequence[str], before: Path | None, seed: Path) -> None:
    """Makes `seed` out of the root `before`: only what that lacks is written and unpacked."""
    with tempfile.TemporaryDirectory(dir=_CACHE) as scratch:
        containerd = Containerd(Path(scratch, "seed"))
        programs = Programs(Path(scratch))
        if before:
            copy_images(before, containerd)
        try:
            containerd.start(programs, "containerd")
            for name in names:
                archive = Path(scratch, "image.tar")
                _archive(name, archive, there=containerd.root / CONTENT / "blobs" / "sha256")
                containerd.ctr("images", "import", str(archive))
        finally:
            programs.stop()
            shutil.rmtree(containerd.socket.parent)
        containerd.root.replace(seed)


def _archive(name: str, archive: Path, there: Path) -> None:
    """Writes an image as an OCI archive without the blobs that the folder `there` has."""
    layout = _CACHE / "oci"
    _buildah("push", "--quiet", "--disable-compression", name, f"oci:{layout}:{name}")
    index = json.loads((layout / "index.json").read_bytes())
    found = next(m for m in index["manifests"] if m.get("annotations", {}).get(_NAME) == name)
    found["annotations"]["io.containerd.image.name"] = name
    manifest = json.loads(_blob(layout, found).read_bytes())
    with tarfile.open(archive, "w") as tar:
        for file, content in (
            ("oci-layout", {"imageLayoutVersion": "1.0.0"}),
            ("index.json", index | {"manifests": [found]}),
        ):
            written = archive.with_name(file)
            written.write_text(json.dumps(content))
            tar.add(written, file)
        for part in (found, manifest["config"], *manifest["layers"]):
            blob = _blob(layout, part)
            if not (there / blob.name).exists():
                tar.add(blob, f"blobs/sha256/{blob.name}")


def _blob(layout: Path, descriptor: dict[str, str]) -> Path:
    return layout / "blobs" / "sha256" / descriptor["digest"].removeprefix("sha256:")


def _buildah(*arguments: str) -> str:
    store = ["--root", str(_CACHE / "storage"), "--runroot", str(_CACHE / "run"), "--storage-driver", "overlay"]
    done = subprocess.run(["buildah", *store, *arguments], check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout.strip()


if __name__ == "__main__":
    print(containerd_images())
