"""install.yaml, which puts the operator into a cluster: definitions, rights and a Deployment.

python -m finetune_operator.install manifests/install.yaml
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import yaml

from finetune_api.crd import KINDS, manifest_yaml
from finetune_operator import rights
from finetune_operator.rights import Right
from finetune_operator.settings import Settings

Manifest = dict[str, Any]

NAME: Final = "finetune-operator"
NAMESPACE: Final = Settings.operator_namespace
IMAGE: Final = f"registry.example.com/finetune/operator:{importlib.metadata.version('finetune')}"
REPLICAS: Final = 2
_RBAC: Final = "rbac.authorization.k8s.io"
_LABELS: Final = {"app.kubernetes.io/name": NAME}
_HEADER: Final = """\
# Generated from operator/finetune_operator/install.py by `make generate`. Do not edit.
# kubectl apply --server-side -f install.yaml: see docs/install.md.
"""


def manifests() -> list[Manifest]:
    """Everything but the resource definitions, in the order in which it is applied."""
    subject = {"kind": "ServiceAccount", "name": NAME, "namespace": NAMESPACE}
    return [
        _namespace(),
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": _metadata(NAME, NAMESPACE)},
        _role("ClusterRole", NAME, rights.IN_JOB_NAMESPACES),
        _binding("ClusterRoleBinding", NAME, "ClusterRole", subject),
        _role("ClusterRole", f"{NAME}-cluster", rights.IN_CLUSTER),
        _binding("ClusterRoleBinding", f"{NAME}-cluster", "ClusterRole", subject),
        _role("Role", NAME, rights.IN_OWN_NAMESPACE, NAMESPACE),
        _binding("RoleBinding", NAME, "Role", subject, NAMESPACE),
        # `admin` takes up what `edit` has, and `edit` what `view` has.
        _role("ClusterRole", "finetune-editor", rights.EDITORS, into="edit"),
        _role("ClusterRole", "finetune-viewer", rights.VIEWERS, into="view"),
        _role("ClusterRole", "finetune-runtime-reader", rights.RUNTIME_READERS),
        _disruption_budget(),
        _service(),
        _deployment(),
    ]


def install_yaml() -> str:
    """The whole file; the same text each time."""
    namespace, *rest = map(_text, manifests())
    definitions = [manifest_yaml(kind) for kind in KINDS]
    return _HEADER + "---\n".join([namespace, *definitions, *rest])


def _metadata(name: str, namespace: str | None = None, labels: Mapping[str, str] | None = None) -> Manifest:
    where = {"namespace": namespace} if namespace else {}
    return {"name": name, **where, "labels": {**_LABELS, **(labels or {})}}


def _namespace() -> Manifest:
    level = {f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "warn")}
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": _metadata(NAMESPACE, labels=level)}


def _role(
    kind: str, name: str, allowed: Sequence[Right], namespace: str | None = None, into: str | None = None
) -> Manifest:
    labels = {f"{_RBAC}/aggregate-to-{into}": "true"} if into else {}
    return {
        "apiVersion": f"{_RBAC}/v1",
        "kind": kind,
        "metadata": _metadata(name, namespace, labels),
        "rules": [right.rule() for right in allowed],
    }


def _binding(kind: str, name: str, role: str, subject: Manifest, namespace: str | None = None) -> Manifest:
    return {
        "apiVersion": f"{_RBAC}/v1",
        "kind": kind,
        "metadata": _metadata(name, namespace),
        "roleRef": {"apiGroup": _RBAC, "kind": role, "name": name},
        "subjects": [subject],
    }


def _disruption_budget() -> Manifest:
    # Not minAvailable: with one replica that would keep a node from being drained for ever.
    spec = {
        "maxUnavailable": 1,
        "selector": {"matchLabels": dict(_LABELS)},
        "unhealthyPodEvictionPolicy": "AlwaysAllow",
    }
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": _metadata(NAME, NAMESPACE),
        "spec": spec,
    }


def _service() -> Manifest:
    """An address that does not change, for trainings to ask: they should not reach it."""
    spec = {
        "selector": dict(_LABELS),
        "ports": [{"name": "health", "port": _port(Settings.health_bind_address), "targetPort": "health"}],
    }
    return {"apiVersion": "v1", "kind": "Service", "metadata": _metadata(NAME, NAMESPACE), "spec": spec}


def _deployment() -> Manifest:
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": _metadata(NAME, NAMESPACE),
        "spec": {
            "replicas": REPLICAS,
            "selector": {"matchLabels": dict(_LABELS)},
            "template": {"metadata": {"labels": dict(_LABELS)}, "spec": _pod()},
        },
    }


def _pod() -> Manifest:
    return {
        "containers": [_container()],
        "enableServiceLinks": False,  # a Service's name would become variables that look like settings
        "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
        "serviceAccountName": NAME,
        "terminationGracePeriodSeconds": 30,
        "topologySpreadConstraints": [
            {
                "labelSelector": {"matchLabels": dict(_LABELS)},
                "matchLabelKeys": ["pod-template-hash"],
                "maxSkew": 1,
                "topologyKey": "kubernetes.io/hostname",
                "whenUnsatisfiable": "ScheduleAnyway",
            }
        ],
    }


def _container() -> Manifest:
    ports = {"metrics": Settings.metrics_bind_address, "health": Settings.health_bind_address}
    return {
        "name": "operator",
        "image": IMAGE,
        "command": ["finetune", "operator"],
        "args": [f"--probe-address={NAME}.{NAMESPACE}.svc:{_port(Settings.health_bind_address)}"],
        "ports": [{"name": name, "containerPort": _port(address)} for name, address in ports.items()],
        "livenessProbe": _probe("/healthz"),
        "readinessProbe": _probe("/readyz"),
        # CPU has no limit: a throttled leader may lose its Lease.
        "resources": {"requests": {"cpu": "100m", "memory": "512Mi"}, "limits": {"memory": "512Mi"}},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        },
    }


def _port(address: str) -> int:
    return int(address.rpartition(":")[2])


def _probe(path: str) -> Manifest:
    return {"httpGet": {"path": path, "port": "health"}, "periodSeconds": 10, "timeoutSeconds": 5}


def _text(manifest: Manifest) -> str:
    return yaml.safe_dump(manifest, sort_keys=False, default_flow_style=None, width=120)


if __name__ == "__main__":
    Path(sys.argv[1]).parent.mkdir(parents=True, exist_ok=True)
    Path(sys.argv[1]).write_text(install_yaml(), encoding="utf-8")
