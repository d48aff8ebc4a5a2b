"""The children as the real API server and the real KubeRay take them; no pod runs, so its status is written here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from finetune_api.job import FinetuneJobSpec
from finetune_api.runtime import FinetuneRuntimeSpec
from finetune_operator.children.owner import Owner
from tests.api.cluster import Cluster
from tests.api.dashboards import Dashboards
from tests.api.objects import Api, Object, Refused, eventually
from tests.unit.api_cases import JOB, RUNTIME, changed
from tests.unit.children_cases import EVERYTHING, children
from tests.unit.pod_security import violations

RAY_JOB, RAY_CLUSTER, POD = "ray.io/v1/RayJob", "ray.io/v1/RayCluster", "v1/Pod"
LONGEST = "a" * 47
RESTRICTED = {"pod-security.kubernetes.io/enforce": "restricted"}


@pytest.fixture
def restricted(api: Api) -> Iterator[str]:
    """A namespace that refuses every pod outside of the restricted profile."""
    made = api.create(
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"generateName": "r-", "labels": RESTRICTED}}
    )
    name: str = made["metadata"]["name"]
    try:
        api.wait_for("v1/ServiceAccount", "default", name)
        yield name
    finally:
        api.delete("v1/Namespace", name)


@pytest.fixture
def dashboards(local_cluster: Cluster) -> Iterator[Dashboards]:
    with Dashboards(local_cluster.ray_proxy_port) as dashboards:
        yield dashboards


def make(api: Api, namespace: str, *, runtime: Object = RUNTIME, **job: Any) -> list[Object]:
    """Creates a job and all its children; the API server has filled in the job's defaults."""
    stored = api.create(
        changed(JOB, {path.replace("__", "."): value for path, value in job.items()}), namespace=namespace
    )
    spec = FinetuneJobSpec.model_validate(stored["spec"])
    on = FinetuneRuntimeSpec.model_validate(api.create(runtime, dry_run=True)["spec"])
    owner = Owner(stored["metadata"]["name"], namespace, stored["metadata"]["uid"])
    made = children(spec, on, owner)
    for child in made:
        api.create(child)
    return made


def ray_job_of(made: list[Object]) -> str:
    (name,) = [child["metadata"]["name"] for child in made if child["kind"] == "RayJob"]
    return str(name)


def pods_of(api: Api, namespace: str, **labels: str) -> list[Object]:
    return api.list(POD, namespace, {f"finetune.dev/{key}": value for key, value in labels.items()})


def training_pods(api: Api, namespace: str, count: int) -> list[Object]:
    def ask() -> list[Object]:
        found = pods_of(api, namespace, stage="train")
        return found if len(found) == count else []

    return eventually(ask, f"{count} training pods", state=lambda: api.list(RAY_CLUSTER, namespace))


def report(api: Api, pod: Object, phase: str, **state: object) -> None:
    """What a kubelet would say: all containers of the pod are in this state."""
    names = [container["name"] for container in pod["spec"]["containers"]]
    running = phase == "Running"
    status = {
        "phase": phase,
        "podIP": "127.0.0.1",
        "podIPs": [{"ip": "127.0.0.1"}],
        "conditions": [{"type": kind, "status": str(running)} for kind in ("PodScheduled", "Ready")],
        "containerStatuses": [
            {"name": name, "image": "", "imageID": "", "ready": running, "restartCount": 0, "state": state}
            for name in names
        ],
    }
    api.patch(POD, pod["metadata"]["name"], pod["metadata"]["namespace"], {"status": status}, status=True)


def run(api: Api, namespace: str, made: list[Object], pods: int = 2) -> Object:
    """Brings a RayJob as far as KubeRay has submitted its driver."""
    for pod in training_pods(api, namespace, pods):
        report(api, pod, "Running", running={})
    return until(api, namespace, made, lambda status: status.get("jobStatus") == "PENDING")


def until(api: Api, namespace: str, made: list[Object], holds: Callable[[Object], object]) -> Object:
    """The RayJob's status as soon as `holds` of it does."""
    found = api.wait_for(RAY_JOB, ray_job_of(made), namespace, lambda job: holds(job.get("status", {})), seconds=60)
    return dict(found["status"])


@pytest.mark.parametrize("runtime", [RUNTIME, EVERYTHING], ids=["least", "everything"])
def test_a_restricted_namespace_takes_every_pod_that_a_job_leads_to(api: Api, restricted: str, runtime: Object) -> None:
    if "serviceAccountName" in runtime["spec"]:
        name = runtime["spec"]["serviceAccountName"]
        api.create({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name}}, namespace=restricted)
        priority = {"apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass", "metadata": {"name": "batch"}}
        api.apply(priority | {"value": 1})
    many = {"spec__workers": {"count": 2, "gpusEach": 2}, "spec__data__prepare": {"workers": 2}}
    make(api, restricted, runtime=runtime, metadata__name=LONGEST, **many)

    def all_pods() -> list[Object]:
        found = pods_of(api, restricted, job=LONGEST)
        return found if len(found) == 8 else []

    what = "prepare and result, and twice head and two workers"
    pods = eventually(all_pods, what, state=lambda: api.list("v1/Event", restricted))
    for pod in pods:
        assert violations(pod["spec"]) == []
        assert pod["spec"]["automountServiceAccountToken"] is False
        assert not any("projected" in volume for volume in pod["spec"]["volumes"])
    kinds = sorted((each["metadata"]["labels"]["finetune.dev/stage"], role(each)) for each in pods)
    ray = ["head", "worker", "worker"]
    assert kinds == [("prepare", each) for each in ["", *ray]] + [("result", "")] + [("train", each) for each in ray]
    attempts = {
        each["metadata"]["labels"].get("finetune.dev/attempt") for each in pods_of(api, restricted, stage="train")
    }
    assert attempts == {"3"}


def role(pod: Object) -> str:
    return str(pod["metadata"]["labels"].get("ray.io/node-type", ""))


@pytest.mark.parametrize(
    ("said", "deployment", "reason"),
    [("SUCCEEDED", "Complete", None), ("FAILED", "Failed", "AppFailed"), ("STOPPED", "Complete", None)],
)
def test_kuberay_submits_the_driver_once_and_says_how_it_ended(
    api: Api, namespace: str, dashboards: Dashboards, said: str, deployment: str, reason: str | None
) -> None:
    made = make(api, namespace)
    status = run(api, namespace, made)
    assert status["jobDeploymentStatus"] == "Running"
    submitted = [each for each in dashboards.requests if each.method == "POST" and namespace in each.host]
    assert [each.body["entrypoint"] for each in submitted] == ["finetune train --run /etc/finetune/run.json"]
    assert all(each.token.startswith("Bearer ") for each in dashboards.requests)

    dashboards.say(status["jobId"], "RUNNING")
    until(api, namespace, made, lambda status: status.get("jobStatus") == "RUNNING")
    dashboards.say(status["jobId"], said)
    ended = until(api, namespace, made, lambda status: status.get("endTime"))
    assert (ended["jobStatus"], ended["jobDeploymentStatus"], ended.get("reason")) == (said, deployment, reason)


def test_a_head_that_is_lost_is_not_made_again(api: Api, namespace: str, dashboards: Dashboards) -> None:
    made = make(api, namespace)
    status = run(api, namespace, made)
    (head,) = [pod for pod in pods_of(api, namespace, stage="train") if role(pod) == "head"]
    terminated = {"exitCode": 137, "reason": "OOMKilled"}
    report(api, head, "Failed", terminated=terminated)
    cluster = api.wait_for(
        RAY_CLUSTER, status["rayClusterName"], namespace, lambda found: head_is(found, "HeadPodNotFound")
    )
    assert [
        role(pod) for pod in pods_of(api, namespace, stage="train") if "deletionTimestamp" not in pod["metadata"]
    ] == ["worker"]
    assert cluster["status"]["state"] == "ready"  # KubeRay's word for it: only the condition tells
    assert api.get(RAY_JOB, ray_job_of(made), namespace)["status"]["jobDeploymentStatus"] == "Running"


def head_is(cluster: Object, reason: str) -> bool:
    conditions = cluster.get("status", {}).get("conditions", [])
    return any((each["type"], each["reason"]) == ("HeadPodReady", reason) for each in conditions)


def test_a_job_that_is_deleted_takes_everything_with_it(api: Api, namespace: str, dashboards: Dashboards) -> None:
    made = make(api, namespace)
    status = run(api, namespace, made)
    api.delete("finetune.dev/v1alpha1/FinetuneJob", JOB["metadata"]["name"], namespace)
    for child in made:
        api.wait_gone(f"{child['apiVersion']}/{child['kind']}", child["metadata"]["name"], namespace)
    api.wait_gone(RAY_CLUSTER, status["rayClusterName"], namespace)
    eventually(
        lambda: all("deletionTimestamp" in pod["metadata"] for pod in pods_of(api, namespace)), "the end of all pods"
    )
    stops = [each.path for each in dashboards.requests if each.path.endswith("/stop")]
    assert f"/api/jobs/{status['jobId']}/stop" in stops


def test_a_child_that_is_there_is_neither_made_twice_nor_touched(api: Api, namespace: str) -> None:
    for child in make(api, namespace):
        with pytest.raises(Refused) as refused:
            api.create(child)
        assert (refused.value.status, refused.value.reason) == (409, "AlreadyExists")
        if child["kind"] in ("ConfigMap", "NetworkPolicy"):
            applied = [api.apply(child)["metadata"]["resourceVersion"] for _ in range(2)]
            assert len(set(applied)) == 1
