"""What every cluster has in it: DNS and KubeRay, as pods."""

from __future__ import annotations

from typing import Any, Final

from tests.api.cluster import KUBERAY_FLAGS
from tests.api.objects import Api, Object
from tests.cluster.node import DNS

KUBERAY_NAMESPACE: Final = "kuberay"
_COREFILE: Final = """
.:53 {
    errors
    ready
    kubernetes cluster.local
    cache 5
}
"""


def install_system(api: Api, seconds: float = 120) -> None:
    """Installs DNS and KubeRay, and returns when they serve."""
    for manifest in (*_dns(), *_kuberay()):
        api.apply(manifest)
    for name, namespace in (("coredns", "kube-system"), ("kuberay-operator", KUBERAY_NAMESPACE)):
        api.wait_for(
            "apps/v1/Deployment", name, namespace, lambda found: found["status"].get("readyReplicas") == 1, seconds
        )


def _dns() -> list[Object]:
    labels = {"k8s-app": "kube-dns"}
    rules = [
        {"apiGroups": [""], "resources": ["endpoints", "services", "pods", "namespaces"], "verbs": ["list", "watch"]},
        {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["list", "watch"]},
    ]
    ports = [{"name": "dns", "port": 53, "protocol": "UDP"}, {"name": "dns-tcp", "port": 53, "protocol": "TCP"}]
    container = {
        "name": "coredns",
        "image": "localhost/coredns:lab",
        "imagePullPolicy": "Never",
        "args": ["-conf", "/etc/coredns/Corefile"],
        "volumeMounts": [{"name": "config", "mountPath": "/etc/coredns"}],
        "readinessProbe": {"httpGet": {"path": "/ready", "port": 8181}, "periodSeconds": 1},
    }
    volumes = [{"name": "config", "configMap": {"name": "coredns"}}]
    return [
        *account("coredns", "kube-system", rules),
        object_of("v1", "ConfigMap", "coredns", "kube-system", data={"Corefile": _COREFILE}),
        deployment("coredns", "kube-system", labels, "coredns", container, volumes),
        object_of(
            "v1", "Service", "kube-dns", "kube-system", spec={"clusterIP": DNS, "selector": labels, "ports": ports}
        ),
    ]


def _kuberay() -> list[Object]:
    container = {
        "name": "kuberay-operator",
        "image": "localhost/kuberay:lab",
        "imagePullPolicy": "Never",
        "args": list(KUBERAY_FLAGS),
    }
    labels = {"app.kubernetes.io/component": "kuberay-operator"}
    everything = [{"apiGroups": ["*"], "resources": ["*"], "verbs": ["*"]}]
    return [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": KUBERAY_NAMESPACE}},
        *account("kuberay-operator", KUBERAY_NAMESPACE, everything),
        deployment("kuberay-operator", KUBERAY_NAMESPACE, labels, "kuberay-operator", container, []),
    ]


def account(name: str, namespace: str, rules: list[Object]) -> list[Object]:
    """A service account with these rights in the whole cluster."""
    subject = {"kind": "ServiceAccount", "name": name, "namespace": namespace}
    role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": name}
    return [
        object_of("v1", "ServiceAccount", name, namespace),
        object_of("rbac.authorization.k8s.io/v1", "ClusterRole", name, rules=rules),
        object_of("rbac.authorization.k8s.io/v1", "ClusterRoleBinding", name, subjects=[subject], roleRef=role),
    ]


def deployment(
    name: str, namespace: str, labels: dict[str, str], account: str, container: Object, volumes: list[Object]
) -> Object:
    """A Deployment of one pod."""
    pod = {"serviceAccountName": account, "containers": [container], "volumes": volumes}
    spec = {"selector": {"matchLabels": labels}, "template": {"metadata": {"labels": labels}, "spec": pod}}
    return object_of("apps/v1", "Deployment", name, namespace, spec=spec)


def object_of(version: str, kind: str, name: str, namespace: str = "", **fields: Any) -> Object:
    """A manifest; without a namespace, of a kind that has none."""
    metadata = {"name": name} | ({"namespace": namespace} if namespace else {})
    return {"apiVersion": version, "kind": kind, "metadata": metadata, **fields}
