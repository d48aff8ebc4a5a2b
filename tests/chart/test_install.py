"""Helm on a real API server: what is made there, what an upgrade leaves alone, and what an uninstall leaves behind."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import yaml

from finetune_api.base import API_VERSION
from finetune_api.crd import KINDS
from tests.api.cluster import Cluster, cluster, install_crds, install_ray_crds
from tests.api.jobs import JOB_KIND, job
from tests.api.objects import Api, Object, Refused, eventually
from tests.api.operator import operator
from tests.chart.helm import CHART, MATRIX, NAMESPACE, HelmError, helm, pods, template
from tests.tools.build import build

RELEASE = "finetune"
DEFINITION = "apiextensions.k8s.io/v1/CustomResourceDefinition"
NAMESPACES = (NAMESPACE, "team", "team-a", "team-b")
RUNTIMES: Object = {"runtimes": {"cpu": {"storage": {"endpoint": "https://s3.corp", "secretName": "storage"}}}}


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster with neither KubeRay nor our resource definitions."""
    with cluster(tmp_path_factory.mktemp("chart"), ray=False) as c, Api(c.kubeconfig) as api:
        for kind in KINDS:
            api.delete(DEFINITION, f"{kind.plural}.finetune.dev")
            api.wait_gone(DEFINITION, f"{kind.plural}.finetune.dev")
        for name in NAMESPACES:
            level = {"pod-security.kubernetes.io/enforce": "restricted"}
            api.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": level}})
        yield c


@pytest.fixture(scope="module")
def api(empty: Cluster) -> Iterator[Api]:
    with Api(empty.kubeconfig) as api:
        yield api


def on(c: Cluster, *arguments: str | Path, values: Object | None = None) -> str:
    return helm(*arguments, f"--namespace={NAMESPACE}", values=values, kubeconfig=c.kubeconfig)


def test_without_kuberay_nothing_is_installed(empty: Cluster, api: Api) -> None:
    with pytest.raises(HelmError, match="KubeRay is missing"):
        on(empty, "install", RELEASE, CHART)
    assert api.find("apps/v1/Deployment", "finetune-operator", NAMESPACE) is None


def test_a_job_outlives_upgrade_rollback_and_uninstall_and_its_pods_are_left_alone(
    empty: Cluster, api: Api, tmp_path: Path
) -> None:
    """Helm's whole life with a job in it; the operator is a process with the rights that the chart gives."""
    install_ray_crds(api)
    assert "NOT MADE YET: runtimes cpu" in on(empty, "install", RELEASE, CHART, values=RUNTIMES)
    assert eventually(partial(_listed, api), "the runtimes to be served", 90) == [[]]
    assert "kubectl get finetuneruntimes" in on(empty, "upgrade", RELEASE, CHART, "--reuse-values")
    api.wait_for("v1/ServiceAccount", "finetune-operator", NAMESPACE)
    kubeconfig = empty.service_account(NAMESPACE, "finetune-operator")
    with operator(empty, tmp_path, kubeconfig=kubeconfig, flags={"leader-elect": ""}) as process:
        api.create(job("chat", "cpu"), namespace="team")
        eventually(lambda: _children(api), "the job's children", 90)
        before = _children(api)
        on(empty, "upgrade", RELEASE, CHART, values=RUNTIMES | {"settings": {"log-level": "debug"}, "replicas": 3})
        assert api.get("apps/v1/Deployment", "finetune-operator", NAMESPACE)["spec"]["replicas"] == 3
        process.restart()
        api.wait_for(JOB_KIND, "chat", "team", _prepares, 90)
        assert _children(api) == before
        on(empty, "rollback", RELEASE, "2")
        assert api.get("apps/v1/Deployment", "finetune-operator", NAMESPACE)["spec"]["replicas"] == 2
        process.restart()
        api.wait_for(JOB_KIND, "chat", "team", _prepares, 90)
        assert _children(api) == before
        assert process.tracebacks() == []
    on(empty, "uninstall", RELEASE)
    api.wait_gone("apps/v1/Deployment", "finetune-operator", NAMESPACE)
    assert api.find("rbac.authorization.k8s.io/v1/ClusterRole", "finetune-operator") is None
    assert api.get(JOB_KIND, "chat", "team")["status"]["phase"] == "Preparing"
    assert _children(api) == before
    on(empty, "install", RELEASE, CHART, values=RUNTIMES)
    assert api.get(f"{API_VERSION}/FinetuneRuntime", "cpu"), "what stayed is taken up again"
    on(empty, "uninstall", RELEASE)


def _prepares(found: Object) -> bool:
    return bool(found.get("status", {}).get("phase") == "Preparing")


def _listed(api: Api) -> list[list[Object]]:
    """The runtimes, as the one item of a list; none while their kind is not served."""
    try:
        return [api.list(f"{API_VERSION}/FinetuneRuntime")]
    except Refused as refused:
        if refused.status not in (404, 429):
            raise
        return []


def _children(api: Api) -> list[tuple[str, str, object]]:
    """Everything that was made for the job, with what changes when it is made anew or its spec is edited."""
    found = []
    for kind in ("batch/v1/Job", "networking.k8s.io/v1/NetworkPolicy", "v1/ConfigMap"):
        for each in api.list(kind, "team", {"finetune.dev/job": "chat"}):
            metadata = each["metadata"]
            said = each.get("spec", each.get("data"))
            found.append((f"{kind}/{metadata['name']}", metadata["uid"], said))
    return found if len(found) == 3 else []


def test_whoever_applied_install_yaml_before_can_go_on_with_the_chart(empty: Cluster, api: Api) -> None:
    for manifest in yaml.safe_load_all((CHART.parents[1] / "manifests/install.yaml").read_text()):
        api.apply(manifest)
    before = api.get("apps/v1/Deployment", "finetune-operator", NAMESPACE)
    on(empty, "install", RELEASE, CHART, "--take-ownership")
    after = api.get("apps/v1/Deployment", "finetune-operator", NAMESPACE)
    assert after["metadata"]["uid"] == before["metadata"]["uid"]
    assert after["spec"] == before["spec"], "its pods are not started again"
    on(empty, "uninstall", RELEASE)


@pytest.mark.parametrize("values", MATRIX, ids=lambda path: path.stem)
def test_the_api_server_takes_every_object_strictly(values: Path, api: Api) -> None:
    """A field that a schema does not have is refused, and so is what a rule or the Pod Security level forbids."""
    folder = build("prometheus-operator")
    kinds = ("podmonitors", "prometheusrules")
    install_crds(
        api,
        [*(folder / f"monitoring.coreos.com_{kind}.yaml" for kind in kinds), *(CHART / "files/crds").glob("*.yaml")],
    )
    manifests = template(values)
    for manifest in manifests:
        if manifest["kind"] != "Pod":
            api.apply(manifest, dry_run=True)
    for spec in pods(manifests):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "one"}}
        # Its own account is not there, since nothing is made.
        api.create(pod | {"spec": dict(spec) | {"serviceAccountName": "default"}}, namespace=NAMESPACE, dry_run=True)


def test_a_runtime_that_breaks_a_rule_is_refused_by_the_api_server_and_nothing_stays(empty: Cluster, api: Api) -> None:
    values = {"runtimes": {"cpu": {"limits": {"maxCost": 10}}}}
    with pytest.raises(HelmError, match="maxCost cannot be held without a price"):
        on(empty, "install", RELEASE, CHART, "--atomic", values=values)
    with pytest.raises(Refused, match="404"):
        api.get("apps/v1/Deployment", "finetune-operator", NAMESPACE)
