"""The CRDs and the reference are current, structural, bounded everywhere, and answer `kubectl get`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_api.base import GROUP
from finetune_api.crd import JOB, KINDS, Kind, manifest, manifest_yaml, schema, with_defaults
from finetune_api.docs import pages
from finetune_api.job import FinetuneJob
from tests.unit import api_cases

ROOT = Path(__file__).parents[2]
# What apiextensions.k8s.io/v1 knows, less what a structural schema must not hold (anyOf, $ref, nullable, title …).
ALLOWED = {
    "type", "format", "description", "default", "enum", "pattern", "minimum", "maximum", "exclusiveMinimum",
    "exclusiveMaximum", "minLength", "maxLength", "minItems", "maxItems", "maxProperties", "items", "properties",
    "additionalProperties", "required", "x-kubernetes-validations", "x-kubernetes-int-or-string",
    "x-kubernetes-preserve-unknown-fields", "x-kubernetes-list-type", "x-kubernetes-list-map-keys",
}  # fmt: skip


def nodes(node: dict[str, Any], path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    yield path, node
    for name, below in node.get("properties", {}).items():
        yield from nodes(below, f"{path}.{name}")
    for key in ("items", "additionalProperties"):
        if key in node:
            yield from nodes(node[key], f"{path}.{key}")


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_the_written_crds_are_current(kind: Kind) -> None:
    assert (ROOT / "manifests/crds" / f"{GROUP}_{kind.plural}.yaml").read_text() == manifest_yaml(kind)


@pytest.mark.parametrize("name", pages())
def test_the_written_reference_is_current(name: str) -> None:
    assert (ROOT / "docs/reference" / name).read_text() == pages()[name]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_the_schema_is_structural(kind: Kind) -> None:
    for path, node in nodes(schema(kind), kind.name):
        assert not node.keys() - ALLOWED, path
        assert ("type" in node) != ("x-kubernetes-int-or-string" in node), path
        assert not ("properties" in node and "additionalProperties" in node), path
        assert (node.get("type") == "array") == ("items" in node), path
        assert all(name in node["properties"] for name in node.get("required", [])), path
        assert "x-kubernetes-preserve-unknown-fields" not in node or ".deepspeed.config" in path, path
    assert schema(kind)["properties"]["metadata"]["properties"].keys() == {"name"}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_string_list_and_map_is_bounded_and_every_field_is_explained(kind: Kind) -> None:
    for path, node in nodes(schema(kind), kind.name):
        if path.endswith((".apiVersion", ".kind", ".metadata")) or ".deepspeed.config." in path:
            continue
        match node.get("type"):
            case "string":
                assert "maxLength" in node or "enum" in node, path
            case "array":
                assert "maxItems" in node, path
            case "integer" | "number":
                assert "maximum" in node, path
                assert "minimum" in node, path
            case "object" if "properties" not in node:
                assert "maxProperties" in node, path
        assert node.get("description") or path.endswith((".items", ".additionalProperties")), path


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_rules_fit_what_the_api_server_takes_and_say_what_to_do(kind: Kind) -> None:
    for path, node in nodes(schema(kind), kind.name):
        for rule in node.get("x-kubernetes-validations", []):
            assert len(rule["message"]) <= 2048, path
            assert "\n" not in rule["message"] + rule["rule"], path
            below = node
            for part in rule.get("fieldPath", "").split(".")[1:]:
                below = below["properties"][part]


def test_an_object_whose_fields_all_have_defaults_is_filled_in_down_to_the_leaves() -> None:
    filled = with_defaults(api_cases.JOB, schema(JOB))
    assert filled["spec"]["method"]["lora"]["rank"] == 16
    assert filled["spec"]["data"]["train"][0]["format"] == "auto"
    assert "runtimeRef" not in filled["spec"]


def test_the_schema_has_the_defaults_of_the_models() -> None:
    model = FinetuneJob.model_validate(api_cases.JOB)
    dumped = model.model_dump(mode="json", exclude_none=True)
    assert FinetuneJob.model_validate(with_defaults(api_cases.JOB, schema(JOB))) == model
    assert with_defaults(api_cases.JOB, schema(JOB))["spec"].keys() == dumped["spec"].keys()


def test_conditions_are_merged_by_their_type() -> None:
    conditions = schema(JOB)["properties"]["status"]["properties"]["conditions"]
    assert conditions["x-kubernetes-list-type"] == "map"
    assert conditions["x-kubernetes-list-map-keys"] == ["type"]


def test_kubectl_get_ftj_answers_how_it_is_going() -> None:
    names = manifest(JOB)["spec"]["names"]
    (version,) = manifest(JOB)["spec"]["versions"]
    assert names["shortNames"] == ["ftj"]
    assert names["categories"] == ["finetune"]
    assert version["subresources"] == {"status": {}}
    shown = [column["name"] for column in version["additionalPrinterColumns"] if not column.get("priority")]
    assert shown == ["Phase", "Reason", "Step", "Of", "%", "Loss", "Ends", "Cost", "Age"]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_column_shows_a_field_that_is_there(kind: Kind) -> None:
    for column in kind.columns:
        if column.path.startswith((".metadata", ".status.conditions")):
            continue
        node = schema(kind)
        for part in column.path.split(".")[1:]:
            node = node["properties"][part]
        assert node["type"] == column.type, column.name


def test_the_crd_is_plain_yaml_that_reads_back_as_itself() -> None:
    assert yaml.safe_load(manifest_yaml(JOB)) == manifest(JOB)
