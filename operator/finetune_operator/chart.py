"""What the Helm chart is given from the code: resource definitions, rights and the schema of its values.

python -m finetune_operator.chart charts/finetune-operator
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, get_args

import yaml
from pydantic import BaseModel

from finetune_api.base import GROUP
from finetune_api.crd import KINDS, manifest_yaml
from finetune_api.docs import table
from finetune_operator import rights
from finetune_operator.chart_values import PriorityClass, Values

_NOTICE: Final = "# Generated from operator/finetune_operator/chart.py by `make generate`. Do not edit.\n"
_KEEP: Final = "  annotations:\n    helm.sh/resource-policy: keep  # or `helm uninstall` would delete every job\n"
_ROLES: Final = {
    "jobs": rights.IN_JOB_NAMESPACES,
    "cluster": rights.IN_CLUSTER,
    "own": rights.IN_OWN_NAMESPACE,
    "editor": rights.EDITORS,
    "viewer": rights.VIEWERS,
    "runtimeReader": rights.RUNTIME_READERS,
}


def files() -> dict[str, str]:
    """Text of every generated file, by its path in the chart."""
    made = {f"files/crds/{GROUP}_{kind.plural}.yaml": _kept(manifest_yaml(kind)) for kind in KINDS}
    rules = {name: [right.rule() for right in allowed] for name, allowed in _ROLES.items()}
    made["files/rights.yaml"] = _NOTICE + yaml.safe_dump(rules, sort_keys=False, default_flow_style=None, width=120)
    made["values.schema.json"] = json.dumps(values_schema(), indent=1) + "\n"
    return made


def values_schema() -> dict[str, Any]:
    """JSON schema of the values. Helm checks it at each command, so a misspelt value is refused."""
    return {"$schema": "http://json-schema.org/draft-07/schema#", **_draft7(Values.model_json_schema())}


def reference() -> str:
    """The Markdown page of the values."""
    lines = [
        "<!-- Generated from operator/finetune_operator by `make generate`. Do not edit. -->\n",
        "# Values of the Helm chart\n",
        "Of `charts/finetune-operator`. What is not here is refused; [install.md](../install.md) says which to set.\n",
        *table(("Value", "Default", "Meaning"), _rows("", Values, Values().model_dump())),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _rows(prefix: str, model: type[BaseModel], defaults: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for name, field in model.model_fields.items():
        key = f"{prefix}{field.alias or name}"
        value = defaults.get(field.alias or name, field.default)
        below = field.annotation
        if isinstance(below, type) and issubclass(below, BaseModel):
            yield f"`{key}`", "", field.description or ""
            yield from _rows(f"{key}.", below, value)
            continue
        default = "**required**" if field.is_required() else f"`{json.dumps(value)}`"
        yield f"`{key}`", default, field.description or ""
        if PriorityClass in get_args(below):
            yield from _rows(f"{key}.*.", PriorityClass, {})


def _kept(definition: str) -> str:
    return definition.replace("metadata:\n", "metadata:\n" + _KEEP, 1)


def _draft7(schema: Any) -> Any:
    """Pydantic's schema in the draft that every Helm 3 reads, without titles."""
    if isinstance(schema, list):
        return [_draft7(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    found: dict[str, Any] = {}
    for key, value in schema.items():
        if key in ("properties", "patternProperties"):
            found[key] = {name: _draft7(each) for name, each in value.items()}
        elif key == "$defs":
            found["definitions"] = {name: _draft7(each) for name, each in value.items()}
        elif key == "$ref":
            found[key] = value.replace("#/$defs/", "#/definitions/")
        elif key in ("default", "enum", "const"):
            found[key] = value
        elif key != "title":
            found[key] = _draft7(value)
    if "patternProperties" in found:
        found["additionalProperties"] = False  # of a map with keys that match a pattern, pydantic lets others be
    return found


def main(folder: str) -> None:
    """Writes the files."""
    for name, text in files().items():
        path = Path(folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
