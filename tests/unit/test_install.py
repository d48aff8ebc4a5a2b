from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from finetune_api.crd import KINDS
from finetune_api.crd import manifest as definition
from finetune_operator import chart, client, rights
from finetune_operator.client import Resource
from finetune_operator.command import operator
from finetune_operator.controller import STOP_LIMIT
from finetune_operator.docs import rbac
from finetune_operator.install import install_yaml, manifests
from finetune_operator.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
OPERATORS = (*rights.IN_JOB_NAMESPACES, *rights.IN_CLUSTER, *rights.IN_OWN_NAMESPACE)


def only(kind: str) -> dict[str, Any]:
    (found,) = (each for each in manifests() if each["kind"] == kind)
    return found


def test_the_written_files_are_current() -> None:
    assert (ROOT / "manifests/install.yaml").read_text() == install_yaml()
    assert (ROOT / "docs/reference/rbac.md").read_text() == rbac()
    assert (ROOT / "docs/reference/chart.md").read_text() == chart.reference()
    for name, text in chart.files().items():
        assert (ROOT / "charts/finetune-operator" / name).read_text() == text, f"{name}: make generate"


def test_the_file_holds_the_definitions_and_every_other_manifest_once_with_the_namespace_first() -> None:
    written = list(yaml.safe_load_all(install_yaml()))
    assert written[0] == only("Namespace")
    assert [each for each in written if each not in manifests()] == [definition(kind) for kind in KINDS]
    assert [each for each in written if each in manifests()] == manifests()


def test_the_operator_has_rights_on_what_its_client_knows_and_on_nothing_else() -> None:
    known = {each for each in vars(client).values() if isinstance(each, Resource)}
    assert {right.resource for right in OPERATORS} == known


def test_no_right_is_a_wildcard_nor_leads_to_more_rights() -> None:
    every = [*OPERATORS, *rights.EDITORS, *rights.VIEWERS, *rights.RUNTIME_READERS]
    rules = [rule for each in manifests() if "Role" in each["kind"] for rule in each.get("rules", [])]
    assert rules == [right.rule() for right in every]
    assert not any("*" in values for rule in rules for values in rule.values())
    assert not {"bind", "escalate", "impersonate"} & {verb for rule in rules for verb in rule["verbs"]}


def test_the_pods_are_as_the_operators_settings_and_command_line_say() -> None:
    pod = only("Deployment")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"] == ["finetune", operator.name]
    ports = {each["name"]: f":{each['containerPort']}" for each in container["ports"]}
    assert ports == {"metrics": Settings.metrics_bind_address, "health": Settings.health_bind_address}
    assert {each["metadata"].get("namespace", Settings.operator_namespace) for each in manifests()} == {
        only("Namespace")["metadata"]["name"]
    }
    # What was begun is finished, and then the Lease is given up.
    assert pod["terminationGracePeriodSeconds"] > STOP_LIMIT + Settings.request_timeout


def test_trainings_are_given_an_address_that_the_operator_answers_at() -> None:
    (container,) = only("Deployment")["spec"]["template"]["spec"]["containers"]
    settings = operator.make_context("operator", list(container["args"])).params
    service = only("Service")
    (port,) = service["spec"]["ports"]
    name, namespace = service["metadata"]["name"], service["metadata"]["namespace"]
    assert settings["probe_address"] == f"{name}.{namespace}.svc:{port['port']}"
    assert port["targetPort"] in {each["name"] for each in container["ports"]}
    labels = only("Deployment")["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()


def test_one_of_two_replicas_may_be_evicted_at_a_time() -> None:
    deployment, budget = only("Deployment")["spec"], only("PodDisruptionBudget")["spec"]
    assert deployment["replicas"] == 2
    assert budget["maxUnavailable"] == 1
    assert budget["selector"] == deployment["selector"]
    assert budget["selector"]["matchLabels"].items() <= deployment["template"]["metadata"]["labels"].items()
