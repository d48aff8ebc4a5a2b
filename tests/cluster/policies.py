"""Enforces NetworkPolicies on the lab's nodes with nftables.

It stands in for a cluster's own: none of Calico, Cilium, kube-router and kube-network-policies can be built from the
registries that tests may use. It reads the real objects and real pods from the API server and filters in the kernel
what each node forwards: ingress and egress, pod, namespace and address selectors, numbered ports; no named ports, port
ranges or exceptions of address blocks, and says so by failing when it meets one.
"""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.api.objects import Api, Object
from tests.cluster.network import NodeNetwork

_SECONDS: Final = 0.5
_TABLE: Final = "inet policies"


@dataclass(frozen=True)
class _Pod:
    address: str
    namespace: str
    labels: dict[str, str]


class Policies(threading.Thread):
    """Keeps the rules of all nodes as the API server's objects are, until it is stopped."""

    def __init__(self, kubeconfig: Path, networks: Sequence[NodeNetwork]) -> None:
        super().__init__(name="policies", daemon=True)
        self._kubeconfig, self._networks = kubeconfig, networks
        self._stopped = threading.Event()
        self._written = ""

    def stop(self) -> None:
        """Ends it; the rules stay."""
        self._stopped.set()
        self.join()

    def run(self) -> None:
        with Api(self._kubeconfig) as api:
            while not self._stopped.wait(_SECONDS):
                rules = ruleset(
                    api.list("networking.k8s.io/v1/NetworkPolicy"), api.list("v1/Pod"), api.list("v1/Namespace")
                )
                if rules != self._written:
                    for network in self._networks:
                        command = [*network.inside, "nft", "-f", "-"]
                        subprocess.run(command, input=rules, text=True, check=True)
                    self._written = rules


def ruleset(policies: Sequence[Object], pods: Sequence[Object], namespaces: Sequence[Object]) -> str:
    """What `nft -f -` is given: a pod that a policy selects may do only what one of its policies lists."""
    there = [
        _Pod(pod["status"]["podIP"], pod["metadata"]["namespace"], pod["metadata"].get("labels", {}))
        for pod in pods
        if pod["status"].get("podIP") and not pod["spec"].get("hostNetwork")
    ]
    labels = {n["metadata"]["name"]: n["metadata"].get("labels", {}) for n in namespaces}
    chains: dict[str, list[str]] = {}
    for policy in sorted(policies, key=lambda p: (p["metadata"]["namespace"], p["metadata"]["name"])):
        spec, namespace = policy["spec"], policy["metadata"]["namespace"]
        for pod in there:
            if pod.namespace != namespace or not selects(spec.get("podSelector", {}), pod.labels):
                continue
            for direction, own, other, peers in (
                ("Ingress", "daddr", "saddr", "from"),
                ("Egress", "saddr", "daddr", "to"),
            ):
                if direction in spec.get("policyTypes", ["Ingress"]):
                    rules = chains.setdefault(f"ip {own} {pod.address}", [])
                    for rule in spec.get(direction.lower()) or []:
                        rules += _allowed(rule, peers, other, there, namespace, labels)
    lines = [f"table {_TABLE}", f"delete table {_TABLE}", f"table {_TABLE} {{"]
    jumps = []
    for number, (match, rules) in enumerate(sorted(chains.items())):
        lines += [f" chain c{number} {{", *(f"  {rule} return" for rule in sorted(set(rules))), "  drop", " }"]
        jumps.append(f"  {match} jump c{number}")
    lines += [" chain forward {", "  type filter hook forward priority 10;", "  ct state established,related accept"]
    return "\n".join([*lines, *jumps, " }", "}"]) + "\n"


def _allowed(
    rule: Object, key: str, other: str, pods: Sequence[_Pod], namespace: str, labels: dict[str, dict[str, str]]
) -> Iterator[str]:
    ports = [f"{port.get('protocol', 'TCP').lower()} dport {int(port['port'])} " for port in rule.get("ports") or []]
    if any("endPort" in port for port in rule.get("ports") or []):
        raise NotImplementedError("a range of ports in a NetworkPolicy")
    for peer in rule.get(key) or [{"ipBlock": {"cidr": "0.0.0.0/0"}}]:
        for address in _addresses(peer, pods, namespace, labels):
            for port in ports or [""]:
                yield f"ip {other} {address} {port}".rstrip()


def _addresses(peer: Object, pods: Iterable[_Pod], namespace: str, labels: dict[str, dict[str, str]]) -> Iterator[str]:
    if "ipBlock" in peer:
        if peer["ipBlock"].get("except"):
            raise NotImplementedError("an exception of an address block in a NetworkPolicy")
        if ":" not in peer["ipBlock"]["cidr"]:  # the lab's pods have no IPv6
            yield peer["ipBlock"]["cidr"]
        return
    for pod in pods:
        if "namespaceSelector" in peer:
            inside = selects(peer["namespaceSelector"], labels.get(pod.namespace, {}))
        else:
            inside = pod.namespace == namespace
        if inside and selects(peer.get("podSelector", {}), pod.labels):
            yield pod.address


def selects(selector: Object, labels: dict[str, str]) -> bool:
    """Whether a label selector, as Kubernetes' objects have them, takes these labels."""
    wanted = selector.get("matchLabels") or {}
    return all(labels.get(key) == value for key, value in wanted.items()) and all(
        _holds(expression, labels) for expression in selector.get("matchExpressions") or []
    )


def _holds(expression: Object, labels: dict[str, str]) -> bool:
    key, values = expression["key"], expression.get("values") or []
    match expression["operator"]:
        case "Exists":
            return key in labels
        case "DoesNotExist":
            return key not in labels
        case "In":
            return labels.get(key) in values
        case "NotIn":
            return labels.get(key) not in values
    raise NotImplementedError(f"{expression['operator']} in a selector")
