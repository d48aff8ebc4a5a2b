"""What the tests of this tier stand on is there, and is the real thing."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.api.cluster import Cluster, cluster
from tests.api.objects import Api, Object, Refused, eventually

RAY_JOB: Object = {
    "apiVersion": "ray.io/v1",
    "kind": "RayJob",
    "metadata": {"name": "some"},
    "spec": {
        "submissionMode": "SidecarMode",
        "entrypoint": "true",
        "rayClusterSpec": {
            "rayVersion": "2.60.0",
            "headGroupSpec": {
                "rayStartParams": {},
                "template": {"spec": {"restartPolicy": "Never", "containers": [{"name": "ray-head", "image": "none"}]}},
            },
        },
    },
}


def test_kuberay_makes_a_cluster_whose_end_takes_its_pods_along(api: Api, namespace: str) -> None:
    api.create(RAY_JOB, namespace=namespace)
    (pod,) = eventually(lambda: api.list("v1/Pod", namespace), "a head pod")
    assert [container["name"] for container in pod["spec"]["containers"]] == ["ray-head", "ray-job-submitter"]
    api.delete("ray.io/v1/RayJob", "some", namespace)
    api.wait_gone("v1/Pod", pod["metadata"]["name"], namespace)


def test_a_user_has_the_rights_that_were_bound_and_is_named_in_the_audit_log(
    local_cluster: Cluster, namespace: str
) -> None:
    with Api(local_cluster.user("tenant")) as tenant, pytest.raises(Refused) as refused:
        tenant.list("v1/Pod", namespace)
    assert refused.value.status == 403
    of_tenant = (each for each in local_cluster.audited() if each["user"]["username"] == "tenant")
    (line,) = (each for each in of_tenant if namespace in each["requestURI"])
    assert (line["verb"], line["responseStatus"]["code"]) == ("list", 403)


def test_a_service_account_is_who_it_says(local_cluster: Cluster, namespace: str) -> None:
    review = {"apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview"}
    with Api(local_cluster.service_account(namespace, "default")) as account:
        answer = account.request("POST", "/apis/authentication.k8s.io/v1/selfsubjectreviews", review)
    assert answer["status"]["userInfo"]["username"] == f"system:serviceaccount:{namespace}:default"


def test_a_program_that_ends_is_reported_with_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.api.cluster.etcd_flags", lambda *_: ["--no-such-flag"])
    with pytest.raises(RuntimeError, match=r"(?s)etcd ended with .*no-such-flag"), cluster(tmp_path / "c"):
        pass
