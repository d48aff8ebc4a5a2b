from __future__ import annotations

from typing import Any

import pytest

from finetune_operator.children.network import network_policy
from tests.unit.children_cases import EVERYTHING, OWNER, Manifest, runtime

POLICY = network_policy(OWNER, runtime(EVERYTHING), "finetune-system", ["monitoring"])
SAME_JOB = {"finetune.dev/job": "support-chat", "finetune.dev/stage": "train"}
NAME = "kubernetes.io/metadata.name"


def reached(rules: list[Manifest], side: str, peer: Manifest, protocol: str = "TCP") -> set[int | str]:
    """Ports that the rules open for a peer: `labels` and `namespace` of a pod, or a `cidr`. '*' is every port."""
    found: set[int | str] = set()
    for rule in rules:
        if any(_matches(each, peer) for each in rule[side]):
            found |= {port["port"] for port in rule.get("ports", []) if port["protocol"] == protocol}
            found |= set() if "ports" in rule else {"*"}
    return found


def _matches(rule: Manifest, peer: Manifest) -> bool:
    if "ipBlock" in rule or "cidr" in peer:
        return bool(rule.get("ipBlock", {}).get("cidr") == peer.get("cidr", ""))
    namespaces, pods = rule.get("namespaceSelector"), rule.get("podSelector", {})
    in_namespace = peer["namespace"] == OWNER.namespace if namespaces is None else _selected(namespaces, peer)
    return bool(in_namespace and pods.get("matchLabels", {}).items() <= peer["labels"].items())


def _selected(selector: Manifest, peer: Manifest) -> bool:
    return bool(selector.get("matchLabels", {}).items() <= {NAME: peer["namespace"]}.items())


@pytest.mark.parametrize(
    ("peer", "ports"),
    [
        ({"namespace": "team-a", "labels": SAME_JOB}, {"*"}),
        ({"namespace": "team-a", "labels": {"finetune.dev/job": "another"}}, set()),
        ({"namespace": "team-b", "labels": SAME_JOB}, set()),
        ({"namespace": "finetune-system", "labels": {}}, {8090, 8080}),
        ({"namespace": "monitoring", "labels": {}}, {8090, 8080}),
        ({"namespace": "ray", "labels": {"app.kubernetes.io/component": "kuberay-operator"}}, {8265}),
        ({"namespace": "ray", "labels": {}}, set()),
        ({"cidr": "0.0.0.0/0"}, set()),
    ],
)
def test_who_gets_into_a_pod(peer: Manifest, ports: set[Any]) -> None:
    assert POLICY
    assert reached(POLICY["spec"]["ingress"], "from", peer) == ports


@pytest.mark.parametrize(
    ("peer", "ports"),
    [
        ({"namespace": "team-a", "labels": SAME_JOB}, {"*"}),
        ({"namespace": "kube-system", "labels": {"k8s-app": "kube-dns"}}, {53}),
        ({"namespace": "team-b", "labels": SAME_JOB}, set()),
        ({"namespace": "default", "labels": {}}, set()),
        ({"cidr": "10.20.0.0/16"}, {9000}),
        ({"cidr": "10.30.0.1/32"}, {"*"}),
        ({"cidr": "169.254.169.254/32"}, set()),
    ],
)
def test_where_a_pod_gets_to(peer: Manifest, ports: set[Any]) -> None:
    assert POLICY
    assert reached(POLICY["spec"]["egress"], "to", peer) == ports


def test_everything_else_is_closed_for_all_pods_of_the_job() -> None:
    assert POLICY
    assert POLICY["spec"]["policyTypes"] == ["Ingress", "Egress"]
    assert POLICY["spec"]["podSelector"] == {"matchLabels": {"finetune.dev/job": "support-chat"}}


def test_an_admin_who_has_policies_of_his_own_can_turn_ours_off() -> None:
    assert network_policy(OWNER, runtime(networkPolicy={"enabled": False}), "finetune-system") is None
