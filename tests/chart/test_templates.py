"""What the chart makes of values, without a cluster."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_operator import install
from finetune_operator.chart_values import Values
from finetune_operator.command import operator
from tests.chart.helm import CHART, MATRIX, HelmError, Object, helm, of_kind, pods, template
from tests.tools.build import build
from tests.unit.pod_security import violations

ROOT = Path(__file__).parents[2]
# What kube-score asks for and we decline: a spread constraint does what it wants of affinity; a CPU limit would cost
# the leader its Lease; that the image's user is not root is checked, its number is the image's business; tags are not
# moved, so an image that is there need not be pulled again; the operator writes no files.
DECLINED = {
    "container-ephemeral-storage-request-and-limit",
    "container-image-pull-policy",
    "container-resources",
    "container-security-context-user-group-id",
    "deployment-has-host-podantiaffinity",
}


def one(manifests: list[Object], kind: str) -> Object:
    (found,) = of_kind(manifests, kind)
    return found


def test_the_values_file_says_the_defaults_of_the_models() -> None:
    written = yaml.safe_load((CHART / "values.yaml").read_text())
    assert Values.model_validate(written) == Values()
    assert written == Values().model_dump(), "every value stands in the file"


def test_the_chart_and_the_package_have_one_version() -> None:
    versions = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert install.IMAGE.endswith(f":{versions['appVersion']}")


@pytest.mark.parametrize("values", MATRIX, ids=lambda path: path.stem)
def test_helm_finds_nothing_wrong(values: Path) -> None:
    text = helm("lint", "--strict", CHART, "--set=kuberay.check=false", values=values)
    assert "[WARNING]" not in text
    assert "[ERROR]" not in text


@pytest.mark.parametrize("values", MATRIX, ids=lambda path: path.stem)
def test_pods_are_restricted_and_have_flags_that_the_operator_knows(values: Path) -> None:
    manifests = template(values)
    for pod in pods(manifests):
        assert violations(pod) == []
    (container,) = one(manifests, "Deployment")["spec"]["template"]["spec"]["containers"]
    operator.make_context("operator", container.get("args", []))


def test_a_chart_with_its_defaults_is_install_yaml_and_a_network_policy() -> None:
    made = {_name(each): _without_helm(each) for each in template()}
    written = yaml.safe_load_all((ROOT / "manifests/install.yaml").read_text())
    wanted = {_name(each): _without_helm(each) for each in written if each["kind"] != "Namespace"}
    assert one(template(), "NetworkPolicy")
    assert made.keys() - wanted.keys() == {"NetworkPolicy/finetune-operator"}
    for name, manifest in wanted.items():
        assert made[name] == manifest


def _name(manifest: Object) -> str:
    return f"{manifest['kind']}/{manifest['metadata']['name']}"


def _without_helm(manifest: Object) -> Object:
    metadata = dict(manifest["metadata"])
    metadata.pop("annotations", None)
    labels = {
        key: value
        for key, value in metadata.pop("labels", {}).items()
        if not key.startswith(("helm.sh/", "app.kubernetes.io/version", "app.kubernetes.io/managed-by"))
    }
    return manifest | {"metadata": metadata | ({"labels": labels} if labels else {})}


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"replica": 3}, "replica"),
        ({"monitoring": {"rules": {"enable": True}}}, "enable"),
        ({"runtimes": {"cpu": {"storage": {"endpont": "https://s3"}}}}, "endpont"),
        ({"runtimes": {"CPU": {}}}, "CPU"),
        ({"runtimes": {"cpu": {"limits": {"maxGpus": "many"}}}}, "maxGpus"),
        ({"priorityClasses": {"urgent": {}}}, "value"),
        ({"image": {"digest": "sha256:12"}}, "digest"),
        ({"settings": {"--log-level": "debug"}}, "log-level"),
        ({"replicas": "two"}, "replicas"),
        ({"networkPolicy": {"apiServerPorts": [0]}}, "apiServerPorts"),
    ],
    ids=lambda part: part if isinstance(part, str) else "",
)
def test_a_misspelt_or_wrong_value_is_refused_by_its_name(values: Object, complaint: str) -> None:
    with pytest.raises(HelmError, match=complaint):
        template(values)


def test_runtimes_of_the_samples_are_good_values() -> None:
    specs = {}
    for path in sorted((ROOT / "manifests/samples").glob("runtime-*.yaml")):
        sample = yaml.safe_load(path.read_text())
        specs[sample["metadata"]["name"]] = sample["spec"]
    made = {
        each["metadata"]["name"]: each["spec"] for each in of_kind(template({"runtimes": specs}), "FinetuneRuntime")
    }
    assert made == specs


def test_a_cluster_without_kuberay_is_told_so_before_anything_is_made() -> None:
    with pytest.raises(HelmError, match=r"KubeRay is missing.*docs/install.md"):
        template(served=[])
    assert template({"kuberay": {"check": False}}, served=[])


def test_monitors_where_prometheus_operator_is_missing_are_refused_with_a_sentence() -> None:
    with pytest.raises(HelmError, match="Prometheus Operator"):
        template({"monitoring": {"podMonitors": {"enabled": True}}}, served=["ray.io/v1/RayJob"])


def test_a_flag_that_the_chart_sets_itself_cannot_be_contradicted() -> None:
    with pytest.raises(HelmError, match=r"settings.namespaces is the chart's own"):
        template({"settings": {"namespaces": "team"}})


def test_an_operator_for_some_namespaces_has_rights_on_jobs_there_only() -> None:
    manifests = template({"namespaces": ["team-a", "team-b"]})
    everywhere = {each["roleRef"]["name"] for each in of_kind(manifests, "ClusterRoleBinding")}
    assert everywhere == {"finetune-operator-cluster"}
    bound = {
        each["metadata"]["namespace"]
        for each in of_kind(manifests, "RoleBinding")
        if each["roleRef"]
        == {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "finetune-operator"}
    }
    assert bound == {"team-a", "team-b"}
    (container,) = next(pods(manifests))["containers"]
    assert "--namespaces=team-a,team-b" in container["args"]


def test_behind_an_air_gap_every_image_is_the_mirrors_and_storage_is_checked_with_the_companys_certificates() -> None:
    manifests = template(next(path for path in MATRIX if path.stem == "air-gap"))
    images = [container["image"] for pod in pods(manifests) for container in pod["containers"]]
    runtime = one(manifests, "FinetuneRuntime")["spec"]
    assert all(image.startswith("mirror.corp:5000/finetune/") for image in [*images, runtime["images"]["trainer"]])
    assert "@sha256:" in images[0]
    assert runtime["images"]["pullSecrets"] == ["corp-registry"]
    (bundle,) = (each for each in of_kind(manifests, "ConfigMap") if "ca.crt" in each["data"])
    assert runtime["storage"]["caBundle"] == {"name": bundle["metadata"]["name"]}


def test_a_runtimes_own_image_and_certificates_win_over_the_charts() -> None:
    manifests = template(next(path for path in MATRIX if path.stem == "everything"))
    cpu = next(each["spec"] for each in of_kind(manifests, "FinetuneRuntime") if each["metadata"]["name"] == "cpu")
    assert cpu["images"] == {"trainer": "mirror.corp:5000/own/trainer:2", "pullSecrets": ["own"]}
    assert cpu["storage"]["caBundle"] == {"name": "storage-ca"}


def test_definitions_stay_when_the_release_goes() -> None:
    found = of_kind(template(), "CustomResourceDefinition")
    assert len(found) == 2
    assert all(each["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep" for each in found)


def test_another_version_of_the_chart_changes_nothing_that_trainings_are_made_of(tmp_path: Path) -> None:
    newer = Path(shutil.copytree(CHART, tmp_path / "chart"))
    versions = yaml.safe_load((newer / "Chart.yaml").read_text())
    (newer / "Chart.yaml").write_text(json.dumps(versions | {"version": "9.9.9"}))
    values = {"runtimes": {"cpu": {"storage": {"pathStyle": True}}}}
    before, after = template(values), template(values, chart=newer)
    for kind in ("FinetuneRuntime", "Deployment"):
        assert one(before, kind)["spec"] == one(after, kind)["spec"], "a label with the version would restart pods"


def test_kube_score_finds_nothing_but_what_is_declined() -> None:
    command = [str(build("kube-score") / "kube-score"), "score", "--output-format=json", "-"]
    text = yaml.safe_dump_all(template(next(path for path in MATRIX if path.stem == "monitoring")))
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    found: list[dict[str, Any]] = json.loads(done.stdout)
    wrong = {
        check["check"]["id"]: [comment["summary"] for comment in check["comments"] or []]
        for each in found
        for check in each["checks"]
        if not check["skipped"] and check["grade"] < 10
    }
    assert wrong.keys() == DECLINED, wrong
