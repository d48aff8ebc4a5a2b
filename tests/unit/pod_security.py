"""The restricted Pod Security profile as a check of a pod's spec.

After https://kubernetes.io/docs/concepts/security/pod-security-standards/ (Kubernetes 1.34, Linux pods). The API tier
asks the real admission plugin; this one also sees what only a rare job or runtime makes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

Value = dict[str, Any]

VOLUMES: Final = frozenset(
    {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
)
_HOST_NAMESPACES: Final = ("hostNetwork", "hostPID", "hostIPC")
_HOOKS: Final = ("livenessProbe", "readinessProbe", "startupProbe")


def violations(pod: Value) -> list[str]:
    """What the profile forbids in this PodSpec, as `where: what`."""
    return [*_of_pod(pod), *(found for container in containers(pod) for found in _of_container(pod, container))]


def containers(pod: Value) -> list[Value]:
    """All containers of a pod, also those that end before the others start."""
    return [*pod.get("initContainers", []), *pod["containers"], *pod.get("ephemeralContainers", [])]


def _of_pod(pod: Value) -> Iterator[str]:
    yield from (f"pod: {name}" for name in _HOST_NAMESPACES if pod.get(name))
    security = pod.get("securityContext", {})
    if security.get("sysctls"):
        yield "pod: sysctls"
    if security.get("runAsUser") == 0:
        yield "pod: runs as root"
    for volume in pod.get("volumes", []):
        kinds = volume.keys() - {"name"}
        if len(kinds) != 1 or not kinds <= VOLUMES:
            yield f"volume {volume['name']}: {', '.join(sorted(kinds)) or 'no kind'}"


def _of_container(pod: Value, container: Value) -> Iterator[str]:
    of_pod, security, name = pod.get("securityContext", {}), container.get("securityContext", {}), container["name"]
    both = of_pod | security
    if security.get("privileged"):
        yield f"{name}: privileged"
    if security.get("allowPrivilegeEscalation") is not False:
        yield f"{name}: may gain privileges"
    if both.get("runAsNonRoot") is not True or both.get("runAsUser") == 0:
        yield f"{name}: may run as root"
    if both.get("seccompProfile", {}).get("type") not in ("RuntimeDefault", "Localhost"):
        yield f"{name}: no seccomp profile"
    capabilities = security.get("capabilities", {})
    if "ALL" not in capabilities.get("drop", []) or set(capabilities.get("add", [])) - {"NET_BIND_SERVICE"}:
        yield f"{name}: keeps capabilities"
    if security.get("procMount", "Default") != "Default":
        yield f"{name}: procMount"
    if any("hostPort" in port for port in container.get("ports", [])):
        yield f"{name}: hostPort"
    if any("host" in probe for hook in _HOOKS for probe in container.get(hook, {}).values() if isinstance(probe, dict)):
        yield f"{name}: probes another host"
