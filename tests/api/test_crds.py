"""The two kinds on a real API server: what it accepts, refuses, fills in and shows is what the models say."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from finetune_api.crd import JOB as JOB_KIND
from finetune_api.crd import KINDS, Kind, schema, with_defaults
from finetune_api.crd import RUNTIME as RUNTIME_KIND
from finetune_api.job_rules import IMMUTABLE, IMMUTABLE_MESSAGE
from tests.api.cluster import Cluster
from tests.api.objects import Api, Object, Refused
from tests.tools.build import build
from tests.unit.api_cases import BROKEN_JOBS, BROKEN_RUNTIMES, JOB, RUNTIME, VALID_JOBS, VALID_RUNTIMES, Broken, changed

SAMPLES = sorted((Path(__file__).parents[2] / "manifests/samples").glob("*.yaml"))
JOBS = f"{JOB['apiVersion']}/{JOB['kind']}"
RUNTIMES = f"{RUNTIME['apiVersion']}/{RUNTIME['kind']}"
STATUS: Object = {
    "observedGeneration": 1,
    "phase": "Training",
    "attempt": 2,
    "runtime": "h200",
    "progress": {"step": 1200, "totalSteps": 4000, "percent": 30, "loss": 1.2345, "etaTime": "2026-11-24T01:00:00Z"},
    "cost": {"spent": 12.5, "currency": "USD"},
    "conditions": [
        {
            "type": "Valid",
            "status": "True",
            "observedGeneration": 1,
            "lastTransitionTime": "2026-11-23T16:00:00Z",
            "reason": "Valid",
            "message": "The job can run.",
        }
    ],
}


def kubectl(cluster: Cluster, *arguments: str | Path) -> str:
    """What kubectl writes, as the cluster's admin."""
    command = [build("kubernetes") / "kubectl", "--kubeconfig", cluster.kubeconfig, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("file", SAMPLES, ids=lambda file: file.name)
def test_kubectl_can_create_the_samples(file: Path, api_cluster: Cluster, namespace: str) -> None:
    kubectl(api_cluster, "create", "--dry-run=server", f"--namespace={namespace}", "-f", file)


@pytest.mark.parametrize(
    ("kind", "document", "changes"),
    [(JOB_KIND, JOB, changes) for changes in VALID_JOBS]
    + [(RUNTIME_KIND, RUNTIME, changes) for changes in VALID_RUNTIMES],
    ids=lambda value: value.name if isinstance(value, Kind) else "" if "kind" in value else str(value)[:70],
)
def test_defaults_are_filled_in_as_validate_does(api: Api, kind: Kind, document: Object, changes: Object) -> None:
    written = changed(document, changes)
    stored = api.create(written, namespace="default", dry_run=True)
    # The API server drops a null where nothing may be null, and it writes 1.0 as 1: both are equal here.
    assert stored["spec"] == with_defaults(written, schema(kind))["spec"]


@pytest.mark.parametrize(
    ("document", "case"),
    [(JOB, case) for case in BROKEN_JOBS] + [(RUNTIME, case) for case in BROKEN_RUNTIMES],
    ids=lambda value: str(value.changes)[:70] if isinstance(value, Broken) else value["kind"],
)
def test_fields_that_contradict_are_refused_with_the_field_and_what_to_do(
    api: Api, document: Object, case: Broken
) -> None:
    with pytest.raises(Refused) as refused:
        api.create(changed(document, case.changes), namespace="default", dry_run=True)
    assert refused.value.status == 422
    assert f"{case.field}: " in refused.value.message
    assert case.words in refused.value.message


@pytest.mark.parametrize("uri", ["rows/train.jsonl", "/data/rows"])
def test_a_path_that_a_cluster_cannot_see_is_refused(api: Api, uri: str) -> None:
    with pytest.raises(Refused, match=r"spec\.data\.train\[0\]\.uri: .*not visible in a cluster"):
        api.create(changed(JOB, {"spec.data.train[0].uri": uri}), namespace="default", dry_run=True)


@pytest.mark.parametrize("field", ["spec.podTemplate", "spec.workers.image", "spec.data.train[0].secretRef"])
def test_an_unknown_field_is_refused_by_name(api: Api, field: str) -> None:
    with pytest.raises(Refused, match=f'unknown field "{re.escape(field)}"'):
        api.create(changed(JOB, {field: {"x": 1}}), namespace="default", dry_run=True)


CHANGES: dict[str, Object] = {
    "model": {"model": {"source": "s3://other/model"}},
    "method": {"method": {"tuning": "full"}},
    "data": {"data": {"sequenceLength": 4096}},
    "training": {"training": {"seed": 1}},
    "evaluation": {"evaluation": {"maxNewTokens": 7}},
    "output": {"output": {"merge": False}},
}


@pytest.fixture
def job(api: Api, namespace: str) -> str:
    """The namespace of a stored job."""
    api.create(JOB, namespace=namespace)
    return namespace


def test_what_a_result_depends_on_cannot_change(api: Api, job: str) -> None:
    assert set(CHANGES) == set(IMMUTABLE)
    for part, change in CHANGES.items():
        with pytest.raises(Refused) as refused:
            api.patch(JOBS, "support-chat", job, {"spec": change})
        assert f"spec.{part}: " in refused.value.message
        assert IMMUTABLE_MESSAGE in refused.value.message


def test_what_only_the_run_depends_on_can_change(api: Api, job: str) -> None:
    change = {"suspend": True, "limits": {"retries": 9, "activeDeadline": "1d"}, "workers": {"cpusEach": 2}}
    changed_job = api.patch(JOBS, "support-chat", job, {"spec": change})
    assert changed_job["metadata"]["generation"] == 2


def test_spec_and_status_are_written_apart(api: Api, namespace: str) -> None:
    created = api.create(JOB | {"status": STATUS}, namespace=namespace)
    assert "status" not in created
    change = {"spec": {"suspend": True}, "status": STATUS}
    written = api.patch(JOBS, "support-chat", namespace, change, status=True)
    assert written["status"] == with_defaults(STATUS, schema(JOB_KIND)["properties"]["status"])
    assert written["spec"]["suspend"] is False
    assert written["metadata"]["generation"] == 1


def test_a_status_of_an_old_version_is_refused(api: Api, job: str) -> None:
    old = api.get(JOBS, "support-chat", job)["metadata"]["resourceVersion"]
    api.patch(JOBS, "support-chat", job, {"status": STATUS}, status=True)
    with pytest.raises(Refused) as refused:
        api.patch(
            JOBS, "support-chat", job, {"metadata": {"resourceVersion": old}, "status": {"attempt": 1}}, status=True
        )
    assert (refused.value.status, refused.value.reason) == (409, "Conflict")


def test_kubectl_shows_how_it_is_going(api: Api, api_cluster: Cluster, job: str) -> None:
    api.patch(JOBS, "support-chat", job, {"status": STATUS}, status=True)
    head, row = kubectl(api_cluster, "get", "ftj", f"--namespace={job}", "-o", "wide").splitlines()
    assert re.split(r"\s{2,}", head.strip()) == ["NAME", *(column.name.upper() for column in JOB_KIND.columns)]
    assert row.split()[:8] == [
        "support-chat",
        "Training",
        "1200",
        "4000",
        "30",
        "1.2345",
        "2026-11-24T01:00:00Z",
        "12.5",
    ]
    assert "support-chat" in kubectl(api_cluster, "get", "finetune", f"--namespace={job}")


def test_kubectl_explains_every_field(api_cluster: Cluster) -> None:
    for kind in KINDS:
        told = kubectl(api_cluster, "explain", f"{kind.plural}.spec", "--recursive")
        missing = [name for name in schema(kind)["properties"]["spec"]["properties"] if f"{name}\t" not in told]
        assert missing == []
