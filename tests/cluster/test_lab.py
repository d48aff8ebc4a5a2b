"""The lab is a cluster: names, services, logs and network policies work between and within nodes."""

from __future__ import annotations

from functools import partial

import pytest

from tests.api.objects import Api, Object, eventually
from tests.cluster.images import OPERATOR
from tests.cluster.kubectl import Kubectl
from tests.cluster.lab import Lab

SERVE = "import http.server as h; h.test(h.SimpleHTTPRequestHandler, port=8000)"


def _pod(name: str, node: str, *command: str) -> Object:
    container = {"name": "main", "image": OPERATOR, "imagePullPolicy": "Never", "command": list(command)}
    spec = {"nodeName": node, "containers": [container], "terminationGracePeriodSeconds": 0}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": {"name": name}}, "spec": spec}


@pytest.fixture
def pods(running: Lab, api: Api, namespace: str) -> str:
    """A server on node-1 behind a Service, and a client on each node."""
    if not running.cluster.local:
        pytest.skip("is about the lab: unset FINETUNE_TEST_KUBECONFIG")
    api.create(_pod("server", "node-1", "python3", "-c", SERVE), namespace=namespace)
    for index in (1, 2):
        api.create(_pod(f"client-{index}", f"node-{index}", "sleep", "1000"), namespace=namespace)
    spec = {"selector": {"name": "server"}, "ports": [{"port": 80, "targetPort": 8000}]}
    api.create({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"}, "spec": spec}, namespace=namespace)
    for name in ("server", "client-1", "client-2"):
        api.wait_for("v1/Pod", name, namespace, lambda pod: pod["status"]["phase"] == "Running")
    return namespace


def _get(kubectl: Kubectl, namespace: str, client: str, host: str) -> bool:
    script = f"wget -q -T 2 -t 1 -O - http://{host} >/dev/null && echo yes || echo no"
    return kubectl.shell(namespace, client, script).strip() == "yes"


def test_a_service_is_reached_by_name_from_both_nodes(running: Lab, pods: str) -> None:
    kubectl = Kubectl(running.cluster.kubeconfig)
    for client in ("client-1", "client-2"):
        eventually(partial(_get, kubectl, pods, client, f"web.{pods}.svc.cluster.local"), client)
    assert "GET /" in kubectl("logs", "--namespace", pods, "server")


def test_a_network_policy_closes_what_it_does_not_list(running: Lab, api: Api, pods: str) -> None:
    kubectl = Kubectl(running.cluster.kubeconfig)
    for client in ("client-1", "client-2"):
        eventually(partial(_get, kubectl, pods, client, "web"), client)
    spec = {
        "podSelector": {"matchLabels": {"name": "server"}},
        "policyTypes": ["Ingress"],
        "ingress": [{"from": [{"podSelector": {"matchLabels": {"name": "client-2"}}}], "ports": [{"port": 8000}]}],
    }
    policy = {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"name": "one"}, "spec": spec}
    api.create(policy, namespace=pods)
    eventually(lambda: not _get(kubectl, pods, "client-1", "web"), "the closed way")
    assert _get(kubectl, pods, "client-2", "web")
    api.delete("networking.k8s.io/v1/NetworkPolicy", "one", pods)
    eventually(lambda: _get(kubectl, pods, "client-1", "web"), "the open way")
