"""What a team's pods can reach and do, asked from inside the cluster while a job trains."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.api.objects import Object, Refused
from tests.cluster.images import OPERATOR
from tests.cluster.service import Service

HEAD_PORTS = {"Ray's control store": 6379, "the dashboard": 8265, "progress": 8090, "Ray's metrics": 8080}
_CONNECT = "import socket,sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 2).close(); print('yes')"


def _pod(name: str, labels: dict[str, str], **changes: object) -> Object:
    context = {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "runAsNonRoot": True,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    container = {
        "name": "main",
        "image": OPERATOR,
        "imagePullPolicy": "Never",
        "command": ["sleep", "600"],
        "securityContext": context,
    }
    spec = {"containers": [container], "terminationGracePeriodSeconds": 0, "automountServiceAccountToken": False}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": labels}, "spec": spec | changes}


@pytest.fixture(scope="module")
def neighbour(installed: Service) -> Iterator[str]:
    """A pod that is of no job, in the namespace of the job."""
    installed.api.create(_pod("neighbour", {}), namespace=installed.namespace)
    installed.api.wait_for(
        "v1/Pod", "neighbour", installed.namespace, lambda pod: pod["status"]["phase"] == "Running", 60
    )
    yield "neighbour"
    installed.api.delete("v1/Pod", "neighbour", installed.namespace)


@pytest.fixture(scope="module")
def worker(installed: Service, long_job: str) -> str:
    return installed.pods(long_job, "ray.io/node-type", "worker")[0]


@pytest.fixture(scope="module")
def head(installed: Service, long_job: str) -> str:
    """The head's address."""
    (name,) = installed.pods(long_job, "ray.io/node-type", "head")
    return str(installed.api.get("v1/Pod", name, installed.namespace)["status"]["podIP"])


def _reaches(installed: Service, pod: str, host: str, port: int) -> bool:
    script = f'python3 -c "{_CONNECT}" {host} {port} 2>/dev/null || echo no'
    return installed.kubectl.shell(installed.namespace, pod, script).strip() == "yes"


@pytest.mark.parametrize(
    "changes", [{"hostNetwork": True}, {"hostPID": True}, {"volumes": [{"name": "host", "hostPath": {"path": "/"}}]}]
)
def test_the_restricted_namespace_refuses_what_our_pods_do_not_need(installed: Service, changes: Object) -> None:
    with pytest.raises(Refused, match="violates PodSecurity"):
        installed.api.create(_pod("escape", {}, **changes), namespace=installed.namespace)


@pytest.mark.parametrize("what", HEAD_PORTS)
def test_a_neighbour_reaches_nothing_of_a_job_that_the_jobs_own_pods_reach(
    installed: Service, neighbour: str, worker: str, head: str, what: str
) -> None:
    assert _reaches(installed, worker, head, HEAD_PORTS[what])
    assert not _reaches(installed, neighbour, head, HEAD_PORTS[what])


def test_a_worker_reaches_its_storage_and_neither_the_api_server_nor_another_namespace(
    installed: Service, worker: str, neighbour: str
) -> None:
    places = {"API server": ("kubernetes.default", 443), "another namespace": ("prometheus.monitoring", 9090)}
    for name, (host, number) in places.items():
        assert _reaches(installed, neighbour, host, number), f"{name}: nothing listens there"
        assert not _reaches(installed, worker, host, number), name
    assert _reaches(installed, worker, installed.lab.address, int(installed.s3.endpoint.rpartition(":")[2]))


def test_the_dashboard_wants_the_clusters_token(installed: Service, worker: str, head: str) -> None:
    ask = f"wget -q -S -T 5 -t 1 -O - http://{head}:8265/api/jobs/ 2>&1 || true"
    assert "401" in installed.kubectl.shell(installed.namespace, worker, ask)


def test_keys_are_files_and_there_is_no_token_of_the_api_server(installed: Service, worker: str) -> None:
    shell = installed.kubectl.shell
    environment = shell(installed.namespace, worker, "tr '\\0' '\\n' < /proc/1/environ; env")
    for secret in (installed.s3.environment["AWS_ACCESS_KEY_ID"], installed.s3.environment["AWS_SECRET_ACCESS_KEY"]):
        assert secret not in environment
        found = shell(installed.namespace, worker, f"grep -rl {secret} /etc/finetune /run/secrets 2>/dev/null || true")
        assert found.strip(), "the keys are nowhere"
    assert shell(installed.namespace, worker, "ls /var/run/secrets/kubernetes.io 2>/dev/null || true") == ""


def test_a_pod_may_not_write_to_its_image_and_is_nobody(installed: Service, worker: str) -> None:
    said = installed.kubectl.shell(installed.namespace, worker, "id -u; touch /opt/finetune/x 2>&1 || true")
    assert said.splitlines()[0] != "0"
    assert "Read-only file system" in said or "Permission denied" in said
