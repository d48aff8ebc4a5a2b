"""Prometheus as a pod of the lab: it scrapes what the chart's PodMonitors name and evaluates the chart's rules.

Debian builds it without Kubernetes discovery, so the lab tells it the targets over HTTP: the running pods that
a PodMonitor selects, with the labels that Prometheus Operator would give them. The scrapes pass the network policies.
"""

from __future__ import annotations

import json
import re
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Final

import yaml

from tests.api.objects import Api, Object
from tests.api.prometheus import SCRAPE_SECONDS, Prometheus
from tests.chart.helm import of_kind
from tests.cluster.kubectl import Kubectl
from tests.cluster.policies import selects
from tests.cluster.system import account, deployment, object_of

NAMESPACE: Final = "monitoring"
_NAME: Final = "prometheus"
_PORT: Final = 9090


@contextmanager
def prometheus(kubectl: Kubectl, chart: list[Object], address: str, seconds: float = 60) -> Iterator[Prometheus]:
    """Installs it in a namespace of its own, and yields it when it serves; it is asked through the API server.

    Args:
        chart: the chart's manifests, with PodMonitors and a PrometheusRule.
        address: this machine's, as pods see it.
    """
    monitors = of_kind(chart, "PodMonitor")
    with Api(kubectl.kubeconfig) as api, _discovery(api, monitors, address) as url:
        _install(api, monitors, of_kind(chart, "PrometheusRule"), url)
        api.wait_for(
            "apps/v1/Deployment", _NAME, NAMESPACE, lambda found: found["status"].get("readyReplicas") == 1, seconds
        )
        with _proxy(kubectl) as server:
            yield Prometheus(f"{server}/api/v1/namespaces/{NAMESPACE}/services/{_NAME}:{_PORT}/proxy")


@contextmanager
def _proxy(kubectl: Kubectl) -> Iterator[str]:
    """The API server on loopback, without a password."""
    with subprocess.Popen(kubectl.command("proxy", "--port=0"), stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            yield f"http://{process.stdout.readline().split()[-1]}"  # Starting to serve on ADDRESS:PORT
        finally:
            process.terminate()


def _install(api: Api, monitors: list[Object], rules: list[Object], url: str) -> None:
    every = f"{SCRAPE_SECONDS}s"
    settings = {
        "global": {"scrape_interval": every, "scrape_timeout": every, "evaluation_interval": every},
        "rule_files": ["/etc/prometheus/rules.yaml"],
        "scrape_configs": [
            {
                "job_name": monitor["metadata"]["name"],
                "honor_labels": _endpoint(monitor).get("honorLabels", False),
                "http_sd_configs": [{"url": f"{url}/{number}", "refresh_interval": every}],
            }
            for number, monitor in enumerate(monitors)
        ],
    }
    groups = [group for rule in rules for group in rule["spec"]["groups"]]
    files = {"prometheus.yaml": yaml.safe_dump(settings), "rules.yaml": yaml.safe_dump({"groups": groups})}
    container = {
        "name": _NAME,
        "image": f"localhost/{_NAME}:lab",
        "imagePullPolicy": "Never",
        "args": ["--config.file=/etc/prometheus/prometheus.yaml", "--storage.tsdb.path=/data"],
        "volumeMounts": [{"name": "config", "mountPath": "/etc/prometheus"}, {"name": "data", "mountPath": "/data"}],
        "readinessProbe": {"httpGet": {"path": "/-/ready", "port": _PORT}, "periodSeconds": 1},
    }
    volumes = [{"name": "config", "configMap": {"name": _NAME}}, {"name": "data", "emptyDir": {}}]
    for manifest in (
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}},
        *account(_NAME, NAMESPACE, []),
        object_of("v1", "ConfigMap", _NAME, NAMESPACE, data=files),
        deployment(_NAME, NAMESPACE, {"app": _NAME}, _NAME, container, volumes),
        object_of("v1", "Service", _NAME, NAMESPACE, spec={"selector": {"app": _NAME}, "ports": [{"port": _PORT}]}),
    ):
        api.apply(manifest)


@contextmanager
def _discovery(api: Api, monitors: list[Object], address: str) -> Iterator[str]:
    """Serves the targets of monitor N at URL/N, as Prometheus's HTTP discovery wants them."""
    lock = threading.Lock()  # one connection to the API server

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            with lock:
                body = json.dumps(list(_targets(api, monitors[int(self.path[1:])]))).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer((address, 0), Handler)
    thread = threading.Thread(target=server.serve_forever, name="discovery")
    thread.start()
    try:
        yield f"http://{address}:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _targets(api: Api, monitor: Object) -> Iterator[Object]:
    endpoint = _endpoint(monitor)
    where = monitor["spec"].get("namespaceSelector", {})
    names = where.get("matchNames", [monitor["metadata"]["namespace"]])
    for pod in api.list("v1/Pod"):
        metadata = pod["metadata"]
        if pod["status"]["phase"] != "Running" or not (where.get("any") or metadata["namespace"] in names):
            continue
        if not selects(monitor["spec"]["selector"], metadata.get("labels", {})):
            continue
        labels = {"namespace": metadata["namespace"], "pod": metadata["name"]}
        for each in endpoint.get("relabelings", []):
            (source,) = each["sourceLabels"]
            labels[each["targetLabel"]] = _meta(metadata["labels"])[source]
        for container in pod["spec"]["containers"]:
            for port in container.get("ports", []):
                if port.get("name") == endpoint["port"]:
                    yield {"targets": [f"{pod['status']['podIP']}:{port['containerPort']}"], "labels": labels}


def _endpoint(monitor: Object) -> Object:
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    return dict(endpoint)


def _meta(labels: dict[str, str]) -> dict[str, str]:
    """A pod's labels as relabelling rules name them."""
    plain = {re.sub(r"\W", "_", label): value for label, value in labels.items()}
    return {f"__meta_kubernetes_pod_label_{label}": value for label, value in plain.items()}
