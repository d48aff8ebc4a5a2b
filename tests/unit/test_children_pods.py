from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_operator.children.config import run_config_map
from finetune_operator.children.pods import environment
from tests.unit.api_cases import RUNTIME, changed
from tests.unit.children_cases import EVERYTHING, JOBS, OWNER, RUNTIMES, Manifest, children, job, pod_templates, runtime
from tests.unit.pod_security import containers, violations


def every_child() -> Iterator[Any]:
    for job_name, spec in JOBS.items():
        for runtime_name, on in RUNTIMES.items():
            for child in children(spec, on):
                name = f"{child['kind']} {child['metadata']['name']}, job {job_name}, runtime {runtime_name}"
                yield pytest.param(child, id=name)


def every_template() -> Iterator[Any]:
    for parameter in every_child():
        for number, template in enumerate(pod_templates(parameter.values[0])):
            yield pytest.param(template, id=f"{parameter.id}, pod {number}")


@pytest.mark.parametrize("template", list(every_template()))
def test_every_pod_keeps_to_the_restricted_profile(template: Manifest) -> None:
    assert violations(template["spec"]) == []


@pytest.mark.parametrize("template", list(every_template()))
def test_no_pod_has_a_token_or_a_root_that_it_can_write(template: Manifest) -> None:
    pod = template["spec"]
    assert pod["automountServiceAccountToken"] is False
    assert not any("projected" in volume for volume in pod["volumes"])
    assert all(container["securityContext"]["readOnlyRootFilesystem"] for container in containers(pod))


@pytest.mark.parametrize("template", list(every_template()))
def test_credentials_are_files_and_logs_stay_out_of_the_status(template: Manifest) -> None:
    for container in containers(template["spec"]):
        assert all(set(variable) == {"name", "value"} for variable in container["env"])
        assert "envFrom" not in container
        assert container["terminationMessagePolicy"] == "File"


@pytest.mark.parametrize("child", list(every_child()))
def test_every_child_belongs_to_the_job_and_is_found_by_its_labels(child: Manifest) -> None:
    (reference,) = child["metadata"]["ownerReferences"]
    assert (reference["kind"], reference["uid"], reference["controller"]) == ("FinetuneJob", OWNER.uid, True)
    assert "finalizers" not in child["metadata"]
    for metadata in (child["metadata"], *(template["metadata"] for template in pod_templates(child))):
        assert metadata["labels"]["finetune.dev/job"] == OWNER.name
    for template in pod_templates(child):
        of_child = {key: value for key, value in child["metadata"]["labels"].items() if "finetune.dev" in key}
        assert of_child.items() <= template["metadata"]["labels"].items()


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"hostNetwork": True}, "pod: hostNetwork"),
        ({"hostPID": True}, "pod: hostPID"),
        ({"securityContext.runAsNonRoot": None, "containers[0].securityContext.runAsNonRoot": None}, "root"),
        ({"securityContext.runAsUser": 0}, "pod: runs as root"),
        ({"containers[0].securityContext.runAsUser": 0}, "may run as root"),
        ({"containers[0].securityContext.privileged": True}, "privileged"),
        ({"containers[0].securityContext.allowPrivilegeEscalation": None}, "may gain privileges"),
        ({"containers[0].securityContext.capabilities": {"drop": ["NET_RAW"]}}, "keeps capabilities"),
        ({"containers[0].securityContext.capabilities.add": ["SYS_ADMIN"]}, "keeps capabilities"),
        ({"containers[0].securityContext.seccompProfile.type": "Unconfined"}, "no seccomp profile"),
        ({"containers[0].ports": [{"containerPort": 80, "hostPort": 80}]}, "hostPort"),
        ({"containers[0].livenessProbe": {"httpGet": {"host": "169.254.169.254"}}}, "probes another host"),
        ({"volumes": [{"name": "root", "hostPath": {"path": "/"}}]}, "volume root: hostPath"),
        ({"initContainers": [{"name": "submitter"}]}, "submitter: may gain privileges"),
    ],
)
def test_the_check_sees_what_the_profile_forbids(change: dict[str, Any], found: str) -> None:
    (template,) = pod_templates(children(job(), runtime())[2])
    assert found in "\n".join(violations(changed(template["spec"], change)))


@settings(deadline=None)
@given(st.text("abcXYZ0189$(){}`'\";|&<>\\~.,:%=+-_/é😀", min_size=1, max_size=40), st.integers(1, 4))
def test_no_text_of_a_job_reaches_anything_but_its_run_file(hostile: str, count: int) -> None:
    mark = "zQz" + hostile.replace("..", "").replace("/", "") + "zQz"
    spec = job(
        model__source=f"s3://{mark}/model",
        method__lora={"targetModules": [mark]},
        data__train=[{"uri": f"s3://{mark}/rows", "columns": {"text": mark}}],
        output__uri=f"s3://{mark}/out",
        deepspeed__config={mark: {mark: mark}},
        evaluation__prompts=[{"prompt": mark, "system": mark, "expect": [mark], "reject": [mark], "topic": mark}],
        workers={"count": count, "gpusEach": count},
    )
    for child in children(spec, runtime(EVERYTHING)):
        outside = {key: value for key, value in child.items() if key != "data"}
        assert "zQz" not in json.dumps(outside)


def test_a_job_chooses_a_claim_of_its_namespace_and_nothing_else_of_a_volume() -> None:
    plain, with_claim = (children(spec, runtime()) for spec in (job(), JOBS["with a model in a volume"]))
    for before, after in zip(plain, with_claim, strict=True):
        for one, other in zip(pod_templates(before), pod_templates(after), strict=True):
            added = [volume for volume in other["spec"]["volumes"] if volume not in one["spec"]["volumes"]]
            claim = {"claimName": "models", "readOnly": True}
            assert added == [{"name": "model", "persistentVolumeClaim": claim}]


def test_where_a_pod_runs_and_as_whom_is_the_runtimes() -> None:
    for child in children(JOBS["on GPUs"], RUNTIMES["everything"]):
        for template in pod_templates(child):
            pod = template["spec"]
            assert {container["image"] for container in pod["containers"]} == {"registry.example.com/trainer:1"}
            assert pod["serviceAccountName"] == "storage-identity"
            assert pod["priorityClassName"] == "batch"
            assert pod["imagePullSecrets"] == [{"name": "registry"}]
            assert template["metadata"]["labels"]["cost-centre"] == "ml"
            assert template["metadata"]["annotations"]["example.com/contact"] == "ml@example.com"


def test_labels_of_the_runtime_do_not_hide_a_child_from_us_or_kuberay() -> None:
    chosen = {"finetune.dev/job": "x", "ray.io/node-type": "x", "app.kubernetes.io/name": "x", "team": "nlp"}
    for child in children(job(), runtime(labels=chosen)):
        for metadata in (child["metadata"], *(template["metadata"] for template in pod_templates(child))):
            assert "x" not in metadata["labels"].values()
            assert metadata["labels"]["team"] == "nlp"


def test_what_a_pod_knows_of_storage_is_the_runtimes() -> None:
    (template,) = pod_templates(children(job(), RUNTIMES["everything"])[2])
    (container,) = template["spec"]["containers"]
    env = {variable["name"]: variable["value"] for variable in container["env"]}
    assert env["AWS_ENDPOINT_URL"] == "https://minio.storage.svc:9000"
    assert env["AWS_REGION"] == "eu-west-1"
    assert env["FINETUNE_S3_PATH_STYLE"] == "1"
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    assert mounts["/etc/finetune/storage"]["readOnly"]
    assert env["AWS_CA_BUNDLE"] == "/etc/finetune/ca.crt"
    assert "ca.crt" in run_config_map(OWNER, job(), RUNTIMES["everything"], "prepare", "PEM")["data"]


def test_memory_goes_with_the_cores() -> None:
    on = runtime(changed(RUNTIME, {"spec.resources": {"memoryPerCpu": "1536Mi", "prepareCpus": 2.5}}))
    (template,) = pod_templates(children(job(), on)[2])
    needs = template["spec"]["containers"][0]["resources"]
    assert needs == {"requests": {"cpu": "2500m", "memory": "3840Mi"}, "limits": {"memory": "3840Mi"}}


def test_pods_learn_where_models_of_a_hub_come_from() -> None:
    hub = {"endpoint": "https://hub.example.com", "mirrorUri": "s3://models/hub"}
    env = environment(runtime(changed(RUNTIME, {"spec.hub": hub})))
    assert env["HF_ENDPOINT"] == "https://hub.example.com"
    assert env["FINETUNE_HF_MIRROR"] == "s3://models/hub"
    assert "HF_ENDPOINT" not in environment(runtime())
