"""The lab's network: a bridge in this network namespace, and for each node a namespace of its own behind it.

    this namespace   bridge 10.99.0.1, where control plane and storage listen
    node i           10.99.0.10+i, its pods 10.244.i.0/24, each behind a veth of its own and routed by the node

It needs a network namespace that nobody else uses (`make e2e` brings it), and goes with it.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final

GATEWAY: Final = "10.99.0.1"
SERVICES: Final = "10.96.0.0/16"
PODS: Final = "10.244.0.0/16"
_BRIDGE: Final = "lab0"
_NAMESPACES: Final = Path("/run/netns")


@dataclass(frozen=True)
class NodeNetwork:
    """Addresses of node `index`, from 1."""

    index: int

    @property
    def address(self) -> str:
        return f"10.99.0.{10 + self.index}"

    @property
    def pods(self) -> str:
        return f"10.244.{self.index}.0/24"

    @property
    def inside(self) -> list[str]:
        """Before a command: it runs in the node's network. Not `ip netns exec`, which hides the cgroups."""
        return ["nsenter", f"--net={_NAMESPACES / self._name}", "--"]

    @property
    def _name(self) -> str:
        return f"node-{self.index}"


def make_bridge() -> None:
    """Makes the bridge. Fails in a network namespace that has one, or that is not the caller's to use."""
    run("mkdir", "-p", str(_NAMESPACES))
    # Namespaces made from here on are seen from here only.
    run("mount", "-t", "tmpfs", "tmpfs", str(_NAMESPACES))
    run("ip", "link", "set", "lo", "up")
    run("ip", "link", "add", _BRIDGE, "type", "bridge")
    run("ip", "address", "add", f"{GATEWAY}/24", "dev", _BRIDGE)
    run("ip", "link", "set", _BRIDGE, "up")
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")


def make_node(index: int, others: list[NodeNetwork]) -> NodeNetwork:
    """Makes node `index`'s namespace with routes to and from the `others`."""
    node = NodeNetwork(index)
    name = f"node-{index}"
    run("ip", "netns", "add", name)
    run("ip", "link", "add", f"lab-{index}", "type", "veth", "peer", "name", "eth0", "netns", name)
    run("ip", "link", "set", f"lab-{index}", "master", _BRIDGE, "up")
    for command in (
        ["ip", "link", "set", "lo", "up"],
        ["ip", "address", "add", f"{node.address}/24", "dev", "eth0"],
        ["ip", "link", "set", "eth0", "up"],
        ["ip", "route", "add", "default", "via", GATEWAY],
        ["sysctl", "-qw", "net.ipv4.ip_forward=1"],
    ):
        run(*node.inside, *command)
    run("ip", "route", "add", node.pods, "via", node.address)
    for other in others:
        run(*node.inside, "ip", "route", "add", other.pods, "via", other.address)
        run(*other.inside, "ip", "route", "add", node.pods, "via", node.address)
    return node


def run(*command: str) -> str:
    """Runs a command to its end; its output.

    Raises:
        RuntimeError: it failed; what it said is in the message.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.returncode}: {(done.stderr or done.stdout).strip()}")
    return done.stdout
