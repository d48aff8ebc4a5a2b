"""One node: a network namespace with a containerd, a kubelet and a kube-proxy of its own."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from tests.api.cluster import Cluster, Programs
from tests.api.objects import eventually
from tests.cluster.containerd import PATH, Containerd, copy_images
from tests.cluster.network import PODS, NodeNetwork
from tests.tools.build import build

DNS: Final = "10.96.0.10"
_CGROUPS: Final = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Node:
    """A running node."""

    name: str
    network: NodeNetwork
    containerd: Containerd


def start_node(c: Cluster, programs: Programs, network: NodeNetwork, images: Path, memory: str) -> Node:
    """Starts a node that holds the images of the containerd root `images`.

    Args:
        memory: what its pods may have together, such as 6Gi; the machine's other memory is reserved.
    """
    name = f"node-{network.index}"
    folder = c.folder / name
    containerd = Containerd(folder)
    folder.mkdir()
    copy_images(images, containerd)
    containerd.start(programs, f"{name}-containerd", network.inside, network.pods)
    group = _make_cgroup(name)
    kubelet = folder / "kubelet.json"
    kubelet.write_text(json.dumps(_kubelet(folder, containerd, group, memory)))
    tools = build("node")
    programs.start(
        f"{name}-kubelet",
        [
            *network.inside,
            tools / "kubelet",
            f"--config={kubelet}",
            f"--kubeconfig={c.user(f'system:node:{name}')}",
            f"--hostname-override={name}",
            f"--node-ip={network.address}",
            f"--root-dir={folder / 'kubelet'}",
            f"--cert-dir={folder / 'certificates'}",
        ],
        PATH,
    )
    programs.start(
        f"{name}-kube-proxy",
        [
            *network.inside,
            tools / "kube-proxy",
            f"--kubeconfig={c.user('system:kube-proxy')}",
            f"--hostname-override={name}",
            "--proxy-mode=nftables",
            f"--cluster-cidr={PODS}",
            "--conntrack-max-per-core=0",
            "--bind-address=127.0.0.1",
        ],
        PATH,
    )
    return Node(name, network, containerd)


def _make_cgroup(name: str) -> str:
    """A cgroup of the node's own in every hierarchy: two kubelets would take each other's pods for strangers."""
    for hierarchy in _CGROUPS.iterdir():
        if (hierarchy / "cgroup.procs").exists() and not hierarchy.is_symlink():
            (hierarchy / "lab" / name).mkdir(parents=True, exist_ok=True)
            if hierarchy.name == "cpuset":
                for group in (hierarchy / "lab", hierarchy / "lab" / name):
                    for file in ("cpuset.cpus", "cpuset.mems"):
                        (group / file).write_text((hierarchy / file).read_text())
    return f"/lab/{name}"


def remove_cgroups() -> None:
    """Ends what runs in the cgroups of the nodes, and removes them."""
    for hierarchy in _CGROUPS.iterdir():
        top = hierarchy / "lab"
        if top.is_dir() and not hierarchy.is_symlink():
            groups = sorted((path for path in top.rglob("*") if path.is_dir()), reverse=True)
            eventually(partial(_all_emptied, groups), f"{top} to be empty")
            for group in (*groups, top):
                group.rmdir()


def _all_emptied(groups: Sequence[Path]) -> bool:
    left = [group for group in groups if not _emptied(group)]
    return not left


def _emptied(group: Path) -> bool:
    left = [int(line) for line in (group / "cgroup.procs").read_text().split()]
    for process in left:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    return not left


def _kubelet(folder: Path, containerd: Containerd, group: str, memory: str) -> dict[str, object]:
    resolv = folder / "resolv.conf"
    resolv.write_text("nameserver 127.0.0.1\n")  # of pods that ask for the node's own
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "address": "0.0.0.0",
        "authentication": {"anonymous": {"enabled": True}, "webhook": {"enabled": False}},
        "authorization": {"mode": "AlwaysAllow"},  # the network is the lab's alone
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": group,
        "clusterDNS": [DNS],
        "clusterDomain": "cluster.local",
        "containerRuntimeEndpoint": f"unix://{containerd.socket}",
        "evictionHard": {"memory.available": "100Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
        "failCgroupV1": False,
        "failSwapOn": False,
        "imageGCHighThresholdPercent": 100,
        "imageGCLowThresholdPercent": 99,
        "nodeStatusUpdateFrequency": "4s",
        "podLogsDir": str(folder / "pod-logs"),
        "resolvConf": str(resolv),
        "systemReserved": {"memory": f"{_reserved(memory)}Mi"},
        "enforceNodeAllocatable": ["pods"],
        "volumePluginDir": str(folder / "volume-plugins"),
    }


def _reserved(memory: str) -> int:
    total = int(next(line for line in Path("/proc/meminfo").read_text().splitlines() if "MemTotal" in line).split()[1])
    return total // 1024 - int(memory.removesuffix("Gi")) * 1024 - 100
