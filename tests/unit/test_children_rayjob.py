from __future__ import annotations

from importlib.metadata import distribution, version
from pathlib import Path
from typing import Any

import pytest

from finetune_api.stage import PROBE_VARIABLE
from finetune_operator.children.rayjob import RAY_VERSION, ray_job
from tests.unit.children_cases import EVERYTHING, JOBS, OWNER, RUNTIMES, Manifest, children, job, pod_templates, runtime


def built(spec: Any = None, on: Any = None, **more: Any) -> Manifest:
    return ray_job(OWNER, spec or job(), on or runtime(), 3, **{"start_deadline_seconds": 1800} | more)


def group(manifest: Manifest) -> Manifest:
    (only,) = manifest["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    return dict(only)


def environment(template: Manifest) -> dict[str, str]:
    return {each["name"]: each["value"] for each in template["spec"]["containers"][0]["env"]}


def test_kuberay_never_tries_again_by_itself() -> None:
    manifest = built()
    assert manifest["spec"]["backoffLimit"] == 0
    head, _ = pod_templates(manifest)
    assert head["spec"]["restartPolicy"] == "Never"
    # KubeRay copies annotations to the RayCluster, where this one keeps it from making a lost head again.
    assert manifest["metadata"]["annotations"]["ray.io/disable-provisioned-head-restart"] == "true"


def test_the_cluster_is_freed_when_no_operator_is_there() -> None:
    spec = built(active_deadline_seconds=7200)["spec"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert 0 < spec["ttlSecondsAfterFinished"] <= 600
    assert spec["preRunningDeadlineSeconds"] == 1800
    assert spec["activeDeadlineSeconds"] == 7200
    assert "activeDeadlineSeconds" not in built()["spec"]


def test_a_deadline_stays_within_the_apis_32_bits() -> None:
    spec = built(start_deadline_seconds=10**12, active_deadline_seconds=0)["spec"]
    assert spec["preRunningDeadlineSeconds"] == 2**31 - 1
    assert spec["activeDeadlineSeconds"] == 1


def test_there_is_time_for_a_checkpoint_before_a_pod_is_killed() -> None:
    for template in pod_templates(built()):
        env, grace = environment(template), template["spec"]["terminationGracePeriodSeconds"]
        assert 60 <= int(env["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]) < grace
        assert 60 <= int(env["RAY_JOB_STOP_WAIT_TIME_S"]) < grace


@pytest.mark.parametrize(
    ("variable", "file"),
    [
        ("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "_private/ray_constants.py"),
        ("RAY_JOB_STOP_WAIT_TIME_S", "dashboard/modules/job/job_supervisor.py"),
        ("RAY_USAGE_STATS_ENABLED", "_common/usage/usage_constants.py"),
        ("RAY_gcs_rpc_server_reconnect_timeout_s", "core/src/ray/raylet/raylet"),
    ],
)
def test_ray_reads_the_variables_that_its_pods_are_given(variable: str, file: str) -> None:
    assert environment(pod_templates(built())[0])[variable]
    assert variable.encode() in Path(str(distribution("ray").locate_file("ray")), file).read_bytes()


def test_kuberay_is_told_the_version_of_ray_that_the_image_has() -> None:
    assert built()["spec"]["rayClusterSpec"]["rayVersion"] == RAY_VERSION == version("ray")


def test_nobody_uses_the_cluster_without_its_token() -> None:
    assert built()["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}


def test_every_container_knows_its_attempt() -> None:
    assert {environment(template)["FINETUNE_ATTEMPT"] for template in pod_templates(built())} == {"3"}


def test_workers_are_told_what_to_ask_that_they_should_not_reach() -> None:
    address = "finetune-operator.finetune-system.svc:8081"
    head, workers = map(environment, pod_templates(built(probe_address=address)))
    assert (head.get(PROBE_VARIABLE), workers[PROBE_VARIABLE]) == (None, address)
    assert PROBE_VARIABLE not in environment(pod_templates(built())[1])


def test_no_task_runs_on_the_head() -> None:
    head = built(JOBS["on GPUs"])["spec"]["rayClusterSpec"]["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    needs = head["template"]["spec"]["containers"][0]["resources"]
    assert needs == {"requests": {"cpu": "500m", "memory": "4096Mi"}, "limits": {"memory": "4096Mi"}}


def test_the_head_opens_the_ports_that_kuberay_and_the_operator_ask() -> None:
    head, workers = pod_templates(built())
    ports = {port["name"]: port["containerPort"] for port in head["spec"]["containers"][0]["ports"]}
    assert ports == {"gcs-server": 6379, "dashboard": 8265, "progress": 8090}
    assert "ports" not in workers["spec"]["containers"][0]


def test_each_worker_holds_what_its_processes_need() -> None:
    workers = group(built(JOBS["on GPUs"], RUNTIMES["everything"]))  # 8 processes of 2.5 cores in each of 4 pods
    (container,) = workers["template"]["spec"]["containers"]
    assert container["resources"] == {
        "requests": {"cpu": "20000m", "memory": "40960Mi"},
        "limits": {"memory": "40960Mi", "example.com/npu": "8"},
    }
    assert workers["rayStartParams"] == {"num-cpus": "20", "num-gpus": "8"}
    assert (workers["replicas"], workers["minReplicas"], workers["maxReplicas"]) == (4, 2, 4)
    shared = [each for each in workers["template"]["spec"]["volumes"] if each.get("emptyDir", {}).get("medium")]
    assert shared == [{"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": "16Gi"}}]


def test_without_an_elastic_minimum_all_workers_are_needed() -> None:
    workers = group(built(job(workers={"count": 3})))
    assert (workers["replicas"], workers["minReplicas"], workers["maxReplicas"]) == (3, 3, 3)


def test_only_workers_go_to_the_nodes_with_accelerators() -> None:
    head, workers = (template["spec"] for template in pod_templates(built(on=RUNTIMES["everything"])))
    assert workers["nodeSelector"] == {"pool": "gpu"}
    assert workers["tolerations"] == [
        {"key": "pool", "operator": "Equal", "value": "gpu", "effect": "NoExecute", "tolerationSeconds": 60}
    ]
    assert "nodeSelector" not in head
    assert "tolerations" not in head


def test_kueue_queues_ray_jobs_and_clusters_and_nothing_below_them() -> None:
    key = "kueue.x-k8s.io/queue-name"
    for child in children(JOBS["with many rows"], runtime(EVERYTHING)):
        assert (key in child["metadata"]["labels"]) == (child["kind"] in ("RayJob", "RayCluster"))
        assert not any(key in template["metadata"]["labels"] for template in pod_templates(child))
