"""An operator of its own, in a namespace of its own, behind a proxy: `with behind_proxy(cluster, folder) as behind`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from finetune_operator.client import FIELD_MANAGER
from tests.api import jobs
from tests.api.cluster import Cluster
from tests.api.objects import Api, Object, fresh_namespace
from tests.api.operator import Operator, operator
from tests.api.proxy import Proxy


@dataclass(frozen=True)
class Behind:
    """What belongs to one operator; `api` is the test's own way to the API server, past the proxy."""

    api: Api
    namespace: str
    proxy: Proxy
    op: Operator

    def job(self, name: str) -> Object:
        return self.api.get(jobs.JOB_KIND, name, self.namespace)

    def status(self, name: str) -> Object:
        """A job's status; empty until there is one."""
        return dict(self.job(name).get("status") or {})


@contextmanager
def behind_proxy(cluster: Cluster, folder: Path) -> Iterator[Behind]:
    """A running operator; its log and kubeconfig go to `folder`, which is made."""
    folder.mkdir()
    with Api(cluster.kubeconfig) as api, fresh_namespace(api) as namespace, Proxy(cluster.url, cluster.ca) as proxy:
        kubeconfig = proxy.kubeconfig(folder / "kubeconfig", cluster.token("admin"))
        with operator(cluster, folder, namespace, kubeconfig=kubeconfig) as op:
            yield Behind(api, namespace, proxy, op)


def made_by_operators(cluster: Cluster) -> Mapping[str, Sequence[Object]]:
    """By namespace, all that operators have made but events and Leases, by the API server's own record."""
    made: dict[str, list[Object]] = defaultdict(list)
    for event in cluster.audited():
        about, good = event.get("objectRef") or {}, event["responseStatus"]["code"] == 201
        if good and event["userAgent"] == FIELD_MANAGER and about["resource"] not in ("events", "leases"):
            # A patch that made something has no content here; that it is there at all makes a comparison fail.
            made[about.get("namespace", "")].append(event.get("requestObject") or about)
    return made
