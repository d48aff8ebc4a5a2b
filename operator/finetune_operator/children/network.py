"""The NetworkPolicy of a job's pods: nothing gets in or out but what is listed here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from finetune_api.runtime import Egress, FinetuneRuntimeSpec
from finetune_api.stage import PROGRESS_PORT
from finetune_operator.children.labels import labels
from finetune_operator.children.names import network_policy_name
from finetune_operator.children.owner import Manifest, Owner, child_metadata
from finetune_operator.children.rayjob import DASHBOARD_PORT, METRICS_PORT

_NAMESPACE_NAME: Final = "kubernetes.io/metadata.name"
_KUBERAY: Final = {"app.kubernetes.io/component": "kuberay-operator"}  # in its chart and in its manifests
_DNS_PORT: Final = 53


def network_policy(
    owner: Owner, runtime: FinetuneRuntimeSpec, operator_namespace: str, scraper_namespaces: Sequence[str] = ()
) -> Manifest | None:
    """The NetworkPolicy of all pods of a job; None when the runtime wants none.

    Pods of the same job reach each other. From outside come our operator and scrapers, beside it or in
    `scraper_namespaces`, for progress and metrics, and KubeRay for the dashboard, whose requests need the cluster's
    token. Pods reach DNS and what the runtime lists: not the API server, not the cloud's metadata address, no other
    tenant.
    """
    if not runtime.network_policy.enabled:
        return None
    same = {"podSelector": {"matchLabels": labels(owner.name)}}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": child_metadata(owner, runtime, network_policy_name(owner.name)),
        "spec": same
        | {
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [
                {"from": [same]},
                {
                    "from": [_namespace(name) for name in (operator_namespace, *scraper_namespaces)],
                    "ports": _ports("TCP", PROGRESS_PORT, METRICS_PORT),
                },
                {
                    "from": [{"namespaceSelector": {}, "podSelector": {"matchLabels": _KUBERAY}}],
                    "ports": _ports("TCP", DASHBOARD_PORT),
                },
            ],
            "egress": [
                {"to": [same]},
                {
                    "to": [_namespace("kube-system")],
                    "ports": [*_ports("UDP", _DNS_PORT), *_ports("TCP", _DNS_PORT)],
                },
                *map(_allowed, runtime.network_policy.egress),
            ],
        },
    }


def _allowed(egress: Egress) -> Manifest:
    rule: Manifest = {"to": [{"ipBlock": {"cidr": egress.cidr}}]}
    return rule | ({"ports": _ports("TCP", *egress.ports)} if egress.ports else {})


def _namespace(name: str) -> Manifest:
    return {"namespaceSelector": {"matchLabels": {_NAMESPACE_NAME: name}}}


def _ports(protocol: str, *numbers: int) -> list[Manifest]:
    return [{"protocol": protocol, "port": number} for number in numbers]
