"""Who may do what: the one table that install.yaml's roles and the reference page are made from.

A right stands here because a line of the operator needs it; a test asserts that nothing else is allowed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from finetune_operator.client import (
    CONFIG_MAPS,
    EVENTS,
    FINETUNE_JOBS,
    FINETUNE_RUNTIMES,
    JOBS,
    LEASES,
    NAMESPACES,
    NETWORK_POLICIES,
    NODES,
    PODS,
    RAY_CLUSTERS,
    RAY_JOBS,
    WORKLOADS,
    Resource,
)
from finetune_operator.settings import Settings


@dataclass(frozen=True)
class Right:
    """Verbs on a resource, and what for.

    Attributes:
        part: subresource, such as status.
        names: the only objects meant; empty: all.
    """

    resource: Resource
    verbs: tuple[str, ...]
    why: str
    part: str = ""
    names: tuple[str, ...] = ()

    @property
    def target(self) -> str:
        """The resource as RBAC calls it."""
        return f"{self.resource.plural}/{self.part}" if self.part else self.resource.plural

    def rule(self) -> dict[str, Any]:
        """As a rule of a Role or ClusterRole."""
        rule: dict[str, Any] = {
            "apiGroups": [self.resource.group],
            "resources": [self.target],
            "verbs": list(self.verbs),
        }
        return rule | ({"resourceNames": list(self.names)} if self.names else {})


_WRITE: Final = ("create", "delete", "deletecollection", "patch", "update")
_READ: Final = ("get", "list", "watch")

# Where jobs are. Bound in every namespace, or only in those that --namespaces names.
IN_JOB_NAMESPACES: Final[Sequence[Right]] = (
    Right(FINETUNE_JOBS, _READ, "follows jobs; looks again before it makes an attempt"),
    Right(FINETUNE_JOBS, ("delete",), "`ttlAfterFinished`"),
    Right(FINETUNE_JOBS, ("patch",), "the one status patch of a reconcile", part="status"),
    Right(RAY_JOBS, ("list", "watch", "create", "delete"), "attempts"),
    Right(RAY_JOBS, ("patch",), "takes KubeRay's finalizer off an attempt that does not end in bounded time"),
    Right(
        RAY_CLUSTERS,
        ("list", "watch", "create", "delete"),
        "prepares many rows; ends the cluster of an attempt that does not end",
    ),
    Right(JOBS, ("list", "watch", "create", "delete"), "prepares rows, reads a result from storage"),
    Right(PODS, ("list", "watch"), "phases, exit codes and termination messages"),
    Right(PODS, ("delete",), "pods of an attempt that does not end in bounded time, such as those of a dead node"),
    Right(CONFIG_MAPS, ("get", "create", "patch", "delete"), "a stage's run.json and certificates"),
    Right(NETWORK_POLICIES, ("get", "create", "patch"), "closes the job's pods off"),
    Right(EVENTS, ("list", "create"), "reads why something is stuck; tells what became of a job"),
    Right(WORKLOADS, ("list",), "Kueue's words on why a job waits"),
)
IN_CLUSTER: Final[Sequence[Right]] = (
    Right(FINETUNE_RUNTIMES, ("list", "watch"), "what the admin allows"),
    Right(NAMESPACES, ("get",), "labels, for `spec.namespaces` of a runtime"),
    Right(NODES, ("get",), "whether the node of a lost pod is gone or not ready"),
)
IN_OWN_NAMESPACE: Final[Sequence[Right]] = (
    Right(LEASES, ("create",), "leader election; RBAC cannot name what is not there yet"),
    Right(LEASES, ("get", "patch"), "leader election", names=(Settings.lease_name,)),
    Right(CONFIG_MAPS, ("get",), "certificates of the storage (`storage.caBundle` of a runtime)"),
)
EDITORS: Final[Sequence[Right]] = (
    Right(FINETUNE_JOBS, (*_READ, *_WRITE), "jobs of their namespaces, without the status"),
)
VIEWERS: Final[Sequence[Right]] = (Right(FINETUNE_JOBS, _READ, "jobs of their namespaces"),)
RUNTIME_READERS: Final[Sequence[Right]] = (
    Right(FINETUNE_RUNTIMES, _READ, "which runtimes there are, with prices and limits"),
)
