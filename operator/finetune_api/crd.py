"""The two CustomResourceDefinitions, generated from the models and the rules.

    python -m finetune_api.crd manifests/crds       writes them
    finetune crd                                    prints them

Pydantic's JSON schema becomes a structural OpenAPI v3 schema (references inlined, `null` and titles gone, exclusive
bounds in OpenAPI's form), then each rule is put on the value it is about.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import yaml
from pydantic import BaseModel

from finetune_api.base import GROUP, VERSION
from finetune_api.deepspeed_keys import REFUSED_KEYS
from finetune_api.job import FinetuneJob, FinetuneJobSpec
from finetune_api.job_rules import IMMUTABLE, IMMUTABLE_MESSAGE, JOB_RULES, RAW_KEYS
from finetune_api.rules import Rule
from finetune_api.runtime import FinetuneRuntime, FinetuneRuntimeSpec, FinetuneRuntimeStatus
from finetune_api.runtime_rules import RUNTIME_RULES
from finetune_api.status import FinetuneJobStatus

Schema = dict[str, Any]

HEADER: Final = "# Generated from operator/finetune_api by `make generate`. Do not edit.\n"
_KEPT: Final = (
    "type",
    "format",
    "enum",
    "minimum",
    "maximum",
    "minLength",
    "maxLength",
    "pattern",
    "minItems",
    "maxItems",
    "maxProperties",
    "required",
    "x-kubernetes-list-type",
    "x-kubernetes-list-map-keys",
)


@dataclass(frozen=True)
class Column:
    """A column of `kubectl get`; priority 1 is shown with `-o wide` only."""

    name: str
    type: str
    path: str
    priority: int = 0

    def manifest(self) -> dict[str, object]:
        entry: dict[str, object] = {"name": self.name, "type": self.type, "jsonPath": self.path}
        return entry | ({"priority": self.priority} if self.priority else {})


@dataclass(frozen=True)
class Kind:
    """One kind of the group: its models, names, rules and columns."""

    name: str
    short_name: str
    scope: str
    document: type[BaseModel]
    spec: type[BaseModel]
    status: type[BaseModel]
    rules: tuple[Rule, ...]
    columns: tuple[Column, ...]

    @property
    def plural(self) -> str:
        return self.name.lower() + "s"


JOB: Final = Kind(
    name="FinetuneJob",
    short_name="ftj",
    scope="Namespaced",
    document=FinetuneJob,
    spec=FinetuneJobSpec,
    status=FinetuneJobStatus,
    rules=JOB_RULES,
    columns=(
        Column("Phase", "string", ".status.phase"),
        Column("Reason", "string", ".status.reason"),
        Column("Step", "integer", ".status.progress.step"),
        Column("Of", "integer", ".status.progress.totalSteps"),
        Column("%", "integer", ".status.progress.percent"),
        Column("Loss", "number", ".status.progress.loss"),
        Column("Ends", "string", ".status.progress.etaTime"),
        Column("Cost", "number", ".status.cost.spent"),
        Column("Age", "date", ".metadata.creationTimestamp"),
        Column("Eval loss", "number", ".status.progress.evalLoss", 1),
        Column("Tokens/s", "number", ".status.progress.tokensPerSecond", 1),
        Column("Projected", "number", ".status.cost.projected", 1),
        Column("Attempt", "integer", ".status.attempt", 1),
        Column("Runtime", "string", ".status.runtime", 1),
        Column("Message", "string", ".status.message", 1),
    ),
)
RUNTIME: Final = Kind(
    name="FinetuneRuntime",
    short_name="ftr",
    scope="Cluster",
    document=FinetuneRuntime,
    spec=FinetuneRuntimeSpec,
    status=FinetuneRuntimeStatus,
    rules=RUNTIME_RULES,
    columns=(
        Column("Ready", "string", '.status.conditions[?(@.type=="Ready")].status'),
        Column("Accelerator", "string", ".spec.accelerator.resourceName"),
        Column("Price", "number", ".spec.accelerator.pricePerHour"),
        Column("Currency", "string", ".spec.accelerator.currency"),
        Column("Queue", "string", ".spec.queueName"),
        Column("Age", "date", ".metadata.creationTimestamp"),
        Column("Image", "string", ".spec.images.trainer", 1),
    ),
)
KINDS: Final = (JOB, RUNTIME)


def manifest(kind: Kind) -> dict[str, Any]:
    """The CustomResourceDefinition of a kind, as a dictionary that is new on each call."""
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{kind.plural}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "scope": kind.scope,
            "names": {
                "kind": kind.name,
                "listKind": f"{kind.name}List",
                "plural": kind.plural,
                "singular": kind.name.lower(),
                "shortNames": [kind.short_name],
                "categories": ["finetune"],
            },
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "additionalPrinterColumns": [column.manifest() for column in kind.columns],
                    "schema": {"openAPIV3Schema": copy.deepcopy(schema(kind))},
                    "subresources": {"status": {}},
                }
            ],
        },
    }


def manifest_yaml(kind: Kind) -> str:
    """The CustomResourceDefinition as YAML; the same text each time."""
    return HEADER + yaml.dump(manifest(kind), Dumper=_Plain, sort_keys=False, width=120, allow_unicode=True)


@cache
def schema(kind: Kind) -> Schema:
    """The structural schema of the whole object, with its rules. Shared: do not change it."""
    name = kind.document.model_json_schema()["$defs"]
    metadata = name[kind.document.model_fields["metadata"].annotation.__name__]  # type: ignore[union-attr]
    whole: Schema = {
        "type": "object",
        "description": (kind.document.__doc__ or "").strip(),
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {"type": "object", "properties": {"name": _structural(metadata["properties"]["name"], {})}},
            "spec": _root(kind.spec),
            "status": _root(kind.status),
        },
    }
    if kind is JOB:
        _declare_refused_keys(_at(whole, RAW_KEYS))
        for part in IMMUTABLE:
            _add_rule(whole, f"spec.{part}", {"rule": "self == oldSelf", "message": IMMUTABLE_MESSAGE})
    for rule in kind.rules:
        _add_rule(whole, rule.at, rule.validation())
    return whole


def with_defaults(value: Any, of: Schema) -> Any:
    """A copy of `value` with the schema's defaults where fields are absent, as the API server fills them in."""
    if isinstance(value, Mapping):
        properties: Mapping[str, Schema] = of.get("properties", {})
        filled = {key: with_defaults(item, properties.get(key, {})) for key, item in value.items()}
        for key, below in properties.items():
            if key not in filled and "default" in below:
                filled[key] = with_defaults(copy.deepcopy(below["default"]), below)
        return filled
    if isinstance(value, list):
        return [with_defaults(item, of.get("items", {})) for item in value]
    return value


def _root(model: type[BaseModel]) -> Schema:
    generated = model.model_json_schema()
    return _structural(generated, generated.get("$defs", {}))


def _structural(node: Schema, definitions: Mapping[str, Schema]) -> Schema:
    """One node of Pydantic's JSON schema as a node of a structural schema."""
    if "$ref" in node:
        node = definitions[node["$ref"].rpartition("/")[2]] | {k: v for k, v in node.items() if k != "$ref"}
    if "anyOf" in node:  # Optional: an absent field, never null
        (some,) = (option for option in node["anyOf"] if option != {"type": "null"})
        outer = {k: v for k, v in node.items() if k != "anyOf" and not (k == "default" and v is None)}
        return _structural(some | outer, definitions)
    result: Schema = {"description": node["description"]} if "description" in node else {}
    result |= {key: node[key] for key in _KEPT if key in node}
    for exclusive, bound in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if exclusive in node:
            result |= {bound: node[exclusive], exclusive: True}
    if "enum" in node:
        result |= _enum_type(node["enum"])
    if node.get("default") not in (None, [], {}):
        result["default"] = node["default"]
    if "const" in node:
        result |= {"type": "string", "enum": [node["const"]]}
    if node.get("type") == "array":
        result["items"] = _structural(node["items"], definitions)
    elif node.get("type") == "object":
        result |= _object(node, definitions)
    return result


def _enum_type(values: Sequence[object]) -> Schema:
    if all(isinstance(value, str) for value in values):
        return {"type": "string"}
    return {"x-kubernetes-int-or-string": True}


def _object(node: Schema, definitions: Mapping[str, Schema]) -> Schema:
    if "properties" in node:
        properties = {name: _structural(below, definitions) for name, below in node["properties"].items()}
        for name, below in properties.items():
            # An object whose fields all have defaults gets them where it is left out itself. They are spelt out,
            # since the API server checks a default against its rules before it fills in what is below.
            optional = name not in node.get("required", []) and "anyOf" not in node["properties"][name]
            if optional and "properties" in below:
                below["default"] = with_defaults({}, below)
        return {"properties": properties}
    values = node.get("additionalProperties")
    if values is None:
        (values,) = node["patternProperties"].values()
    if not values:  # any value: raw keys of another program
        return {"x-kubernetes-preserve-unknown-fields": True}
    result: Schema = {"additionalProperties": _structural(values, definitions)}
    keys = node["propertyNames"]
    if "enum" in keys:
        rule = f"self.all(key, key in {sorted(keys['enum'])})"
        message = f"keys are {', '.join(keys['enum'])}"
    else:
        rule = f"self.all(key, size(key) <= {keys['maxLength']})"
        message = f"keys have at most {keys['maxLength']} characters"
    return result | {"x-kubernetes-validations": [{"rule": rule, "message": message}]}


def _declare_refused_keys(config: Schema) -> None:
    """CEL can ask for a raw key only if the schema names it."""
    for refused in REFUSED_KEYS:
        *way, last = refused.key.split(".")
        node = config
        for part in way:
            below = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
            node = node.setdefault("properties", {}).setdefault(part, below)
        leaf: Schema = {"type": refused.type}
        if refused.type == "object":
            leaf["x-kubernetes-preserve-unknown-fields"] = True
        node.setdefault("properties", {})[last] = leaf


def _add_rule(whole: Schema, path: str, entry: dict[str, str]) -> None:
    _at(whole, path).setdefault("x-kubernetes-validations", []).append(entry)


def _at(whole: Schema, path: str) -> Schema:
    node = whole
    for part in path.split("."):
        node = node["properties"][part.removesuffix("[]")]
        if part.endswith("[]"):
            node = node["items"]
    return node


class _Plain(yaml.SafeDumper):
    """YAML without aliases, lists indented, and whole numbers without a fraction."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        return super().increase_indent(flow, False)


def _number(dumper: yaml.SafeDumper, value: float) -> yaml.ScalarNode:
    return dumper.represent_int(int(value)) if value.is_integer() else dumper.represent_float(value)


_Plain.add_representer(float, _number)


def main(folder: str) -> None:
    """Writes one file per kind."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for kind in KINDS:
        (Path(folder) / f"{GROUP}_{kind.plural}.yaml").write_text(manifest_yaml(kind), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
