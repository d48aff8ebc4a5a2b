"""A containerd of a node's own, and how images get into it without a registry."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.api.cluster import Programs
from tests.cluster.network import run

PAUSE: Final = "localhost/pause:lab"
PATH: Final = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
_SNAPSHOTS: Final = "io.containerd.snapshotter.v1.overlayfs"
CONTENT: Final = "io.containerd.content.v1.content"


@dataclass(frozen=True)
class Containerd:
    """Where a containerd has its files."""

    folder: Path

    @property
    def socket(self) -> Path:
        # A socket's whole path may have 107 characters.
        return Path("/run") / f"lab-{self.folder.name}" / "containerd.sock"

    @property
    def root(self) -> Path:
        return self.folder / "containerd"

    def ctr(self, *arguments: str) -> str:
        """Runs containerd's own client."""
        return run("ctr", "--address", str(self.socket), "--namespace", "k8s.io", *arguments)

    def start(self, programs: Programs, name: str, inside: Sequence[str] = (), pods: str = "10.244.0.0/24") -> None:
        """Starts it and waits until it answers."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.socket.parent.mkdir(parents=True, exist_ok=True)
        config = self.folder / "containerd.toml"
        config.write_text(_config(self))
        _write_cni(self.folder / "cni", pods)
        programs.start(name, [*inside, "containerd", "--config", str(config)], PATH)
        programs.wait(lambda: self.socket.exists() and self._answers(), name)

    def _answers(self) -> bool:
        command = ["ctr", "--address", str(self.socket), "version"]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0


def copy_images(seed: Path, containerd: Containerd) -> None:
    """Gives a containerd that is not running the images of another: files as hard links, since none is written to."""
    containerd.root.mkdir(parents=True)
    for part in seed.iterdir():
        target = containerd.root / part.name
        if part.name in (_SNAPSHOTS, CONTENT):
            run("cp", "--archive", "--link", str(part), str(target))
            for database in part.glob("*.db"):  # these are written to
                (target / database.name).unlink()
                shutil.copy2(database, target / database.name)
        elif part.is_dir():
            shutil.copytree(part, target, symlinks=True)


def _config(containerd: Containerd) -> str:
    folder = containerd.folder
    return f"""
version = 2
root = "{containerd.root}"
state = "{containerd.socket.parent}/state"
oom_score = 0
[grpc]
  address = "{containerd.socket}"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{PAUSE}"
  disable_apparmor = true
  restrict_oom_score_adj = true
  stream_server_address = "127.0.0.1"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "{folder}/cni"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        SystemdCgroup = false
"""


def _write_cni(folder: Path, pods: str) -> None:
    """Each pod behind a veth of its own, routed: what pods on one node send each other passes its rules too."""
    folder.mkdir(exist_ok=True)
    ptp = {
        "type": "ptp",
        "ipam": {
            "type": "host-local",
            "dataDir": str(folder / "leases"),
            "ranges": [[{"subnet": pods}]],
            "routes": [{"dst": "0.0.0.0/0"}],
        },
    }
    config = {
        "cniVersion": "0.4.0",
        "name": "lab",
        "plugins": [ptp, {"type": "portmap", "capabilities": {"portMappings": True}}],
    }
    (folder / "10-lab.conflist").write_text(json.dumps(config))
