from __future__ import annotations

from finetune_api.run import RunConfig
from finetune_operator.children.config import run_config_map
from finetune_operator.children.names import prepare_cluster_name
from finetune_operator.children.prepare import prepare_cluster, prepare_job
from tests.unit.children_cases import EVERYTHING, OWNER, RUNTIMES, Manifest, job, pod_templates, runtime


def environment(manifest: Manifest) -> dict[str, str]:
    (template,) = pod_templates(manifest)
    return {each["name"]: each["value"] for each in template["spec"]["containers"][0]["env"]}


def test_one_pod_needs_no_cluster() -> None:
    for workers in (None, 1):
        manifest = prepare_job(OWNER, job(), runtime(), workers)
        assert "FINETUNE_PREPARE_HEAD" not in environment(manifest)
        assert manifest == prepare_job(OWNER, job(), runtime(), None)


def test_the_jobs_pod_finds_its_cluster_and_the_clusters_token() -> None:
    manifest, name = prepare_job(OWNER, job(), runtime(), 3), prepare_cluster_name(OWNER.name)
    assert environment(manifest)["FINETUNE_PREPARE_HEAD"] == f"{name}-head-svc:6379"  # as KubeRay names the Service
    assert environment(manifest)["RAY_AUTH_MODE"] == "token"
    (template,) = pod_templates(manifest)
    (mount,) = [each for each in template["spec"]["containers"][0]["volumeMounts"] if each["name"] == "ray-token"]
    assert environment(manifest)["RAY_AUTH_TOKEN_PATH"] == f"{mount['mountPath']}/auth_token"
    assert {"name": "ray-token", "secret": {"secretName": name}} in template["spec"]["volumes"]


def test_the_workers_have_the_cores_and_the_driver_has_their_memory() -> None:
    on = RUNTIMES["everything"]
    (driver,) = pod_templates(prepare_job(OWNER, job(), on, 5))
    assert driver["spec"]["containers"][0]["resources"]["requests"] == {"cpu": "1000m", "memory": "5120Mi"}
    cluster = prepare_cluster(OWNER, job(), on, 5)
    (group,) = cluster["spec"]["workerGroupSpecs"]
    assert (group["replicas"], group["rayStartParams"]) == (5, {"num-cpus": "3"})
    worker = group["template"]["spec"]
    assert worker["containers"][0]["resources"]["requests"] == {"cpu": "2500m", "memory": "5120Mi"}
    assert "nodeSelector" not in worker, "accelerators' nodes are not for rows"
    assert "tolerations" not in worker
    assert cluster["spec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert cluster["spec"]["authOptions"] == {"mode": "token"}


def test_a_lost_head_is_made_again_and_the_cluster_is_no_attempt() -> None:
    cluster = prepare_cluster(OWNER, job(), runtime(), 2)
    assert "ray.io/disable-provisioned-head-restart" not in cluster["metadata"]["annotations"]
    for metadata in (cluster["metadata"], *(template["metadata"] for template in pod_templates(cluster))):
        assert metadata["labels"]["finetune.dev/stage"] == "prepare"
        assert "finetune.dev/attempt" not in metadata["labels"]


def asked(on: object, workers: int | None) -> int | None:
    manifest = run_config_map(OWNER, job(), on, "prepare", None, workers)  # type: ignore[arg-type]
    return RunConfig.model_validate_json(manifest["data"]["run.json"]).prepare_bytes


def test_a_pod_may_ask_for_workers_only_where_nobody_has_said_how_many() -> None:
    assert asked(runtime(), None) == 32 << 30
    assert asked(runtime(resources={"prepareBytes": "512Mi"}), None) == 512 << 20
    assert asked(runtime(), 1) is None
    assert asked(runtime(), 7) is None
    assert asked(runtime(limits={"maxWorkers": 1}), None) is None, "there would be none to be had"
    third = run_config_map(OWNER, job(), runtime(EVERYTHING), 3, "PEM")
    assert RunConfig.model_validate_json(third["data"]["run.json"]).prepare_bytes is None
