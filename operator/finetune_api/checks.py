"""What is wrong with a document: every problem at once, each with its field, the value and what to do."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from pydantic import BaseModel, ValidationError
from pydantic.alias_generators import to_camel
from pydantic_core import ErrorDetails

from finetune_api import patterns
from finetune_api.base import API_VERSION
from finetune_api.crd import KINDS, Kind, Schema, schema, with_defaults
from finetune_api.documents import Document, Mark, Path
from finetune_api.job_rules import RAW_KEYS
from finetune_api.rules import broken_rules

_RAW: Final = tuple(RAW_KEYS.split("."))  # keys of another program: null means something there
_TYPES: Final = {
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "string_type": "must be text",
    "string_unicode": "must be valid Unicode text",
    "bool_type": "must be true or false",
    "list_type": "must be a list",
    "dict_type": "must be a mapping of keys and values",
    "model_type": "must be a mapping of keys and values",
    "model_attributes_type": "must be a mapping of keys and values",
    "finite_number": "must be a finite number",
}
_BOUNDS: Final = {
    "greater_than_equal": ("must be at least {}", "ge"),
    "greater_than": ("must be more than {}", "gt"),
    "less_than_equal": ("must be at most {}", "le"),
    "less_than": ("must be less than {}", "lt"),
    "string_too_short": ("must have at least {} characters", "min_length"),
    "string_too_long": ("must have at most {} characters", "max_length"),
    "too_short": ("must have at least {} entries", "min_length"),
    "too_long": ("must have at most {} entries", "max_length"),
}


@dataclass(frozen=True)
class Problem:
    """One problem: `field` is dotted from the document's root, `got` the value as it may be shown."""

    mark: Mark
    field: str
    message: str
    got: str | None = None
    hint: str = ""

    @property
    def place(self) -> tuple[Mark, str]:
        """What problems are ordered by."""
        return self.mark, self.field

    @property
    def what(self) -> str:
        """The problem in one line, without its place in the file."""
        head = f"{self.field}: {self.message}" if self.field else self.message
        return head if self.got is None else f"{head} (got {self.got})"

    def as_json(self) -> dict[str, object]:
        """The problem for programs."""
        return {
            "line": self.mark.line,
            "column": self.mark.column,
            "field": self.field,
            "message": self.message,
            "got": self.got,
            "hint": self.hint,
        }


@dataclass
class Checked:
    """A checked document: the problems that make it invalid, and the resource when there are none."""

    mark: Mark
    kind: str = ""
    name: str = ""
    namespace: str = ""
    problems: list[Problem] = field(default_factory=list)
    local_only: list[str] = field(default_factory=list)  # fields that `finetune run` reads and a cluster cannot
    resource: BaseModel | None = None

    @property
    def title(self) -> str:
        return self.name or self.kind or "document"


def check_document(document: Document) -> Checked:
    """Checks a FinetuneJob or FinetuneRuntime: its text, its fields, and the rules between them."""
    value = document.value
    problems = [
        Problem(complaint.mark, field_path(complaint.path), complaint.message, hint=complaint.hint)
        for complaint in document.complaints
    ]
    if not isinstance(value, Mapping):
        message = "a document is a mapping with apiVersion, kind, metadata and spec"
        return Checked(document.mark, problems=[*problems, Problem(document.mark, "", message, show(value))])
    metadata = value.get("metadata")
    metadata = metadata if isinstance(metadata, Mapping) else {}
    checked = Checked(
        document.locate(("metadata", "name")),
        kind=_shown_key(value.get("kind")),
        name=_shown_key(metadata.get("name")),
        namespace=_shown_key(metadata.get("namespace")),
        problems=problems,
    )
    kind = next((kind for kind in KINDS if kind.name == value.get("kind")), None)
    if kind is None:
        problems.append(_unknown_kind(document, value.get("kind")))
    else:
        _check_fields(document, _without_nulls(value, ()), kind, checked)
    problems.sort(key=lambda problem: problem.place)
    return checked


def field_path(path: Path) -> str:
    """`("spec", "train", 0, "uri")` as `spec.train[0].uri`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f"{'.' if text else ''}{_shown_key(part)}"
    return text


def show(value: object) -> str:
    """A value as it may stand in a message: short, printable, and without credentials."""
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, str):
        value = re.sub(r"://([^@]*:[^@]*|[^/]*)@", "://***@", value)
        value = re.sub(r"(://[^?#]*[?#]).*", r"\1***", value, flags=re.DOTALL)
        value = value if len(value) <= 80 else value[:77] + "..."
        return json.dumps(value, ensure_ascii=not value.isprintable())
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _shown_key(key: object) -> str:
    if not isinstance(key, str):
        return "" if key is None else show(key)
    return key if key.isprintable() and len(key) <= 63 else show(key)


def _without_nulls(value: Any, path: Path) -> Any:
    """Drops keys whose value is null, as the API server does: nothing here is nullable."""
    if path == _RAW:
        return value
    if isinstance(value, Mapping):
        return {key: _without_nulls(item, (*path, key)) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item, (*path, index)) for index, item in enumerate(value)]
    return value


def _unknown_kind(document: Document, kind: object) -> Problem:
    known = [each.name for each in KINDS]
    if kind is None:
        return Problem(document.mark, "kind", "is required", hint=f"write kind: {' or '.join(known)}")
    hint = (
        _did_you_mean(str(kind), known) or f"finetune reads {' and '.join(known)}; move others to a file of their own"
    )
    return Problem(document.locate(("kind",)), "kind", "is not a kind of finetune", show(kind), hint)


def _check_fields(document: Document, value: Mapping[str, Any], kind: Kind, checked: Checked) -> None:
    whole = schema(kind)
    wrong: list[Path] = []
    try:
        checked.resource = kind.document.model_validate(value, by_alias=True, by_name=False)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            path = tuple(part for part in detail["loc"] if part != "[key]")
            wrong.append(path)
            checked.problems.append(_field_problem(document, path, detail, whole))
    for broken in broken_rules(kind.rules, with_defaults(value, whole), wrong):
        if broken.rule.cluster_only:
            checked.local_only.append(field_path(broken.path))
            continue
        shown = _shown_scalar(value, broken.path)
        mark = document.locate(broken.path)
        checked.problems.append(Problem(mark, field_path(broken.path), broken.rule.message, shown, broken.rule.do))
    if checked.problems:
        checked.resource = None


def _field_problem(document: Document, path: Path, detail: ErrorDetails, whole: Schema) -> Problem:
    mark, name, got = document.locate(path), field_path(path), show(detail["input"])
    context = detail.get("ctx", {})
    about = _describe(_schema_at(whole, path))
    match detail["type"]:
        case "missing":
            needs = _schema_at(whole, path).get("required", [])
            return Problem(mark, name, "is required", hint=f"{about} It needs {', '.join(needs)}." if needs else about)
        case "extra_forbidden":
            return Problem(mark, name, "is not a known field", hint=_known_fields(path, whole))
        case "literal_error" if path == ("apiVersion",):
            return Problem(mark, name, "is not a version that this finetune reads", got, f"write {API_VERSION}")
        case "literal_error" if detail["loc"][-1] == "[key]":
            return Problem(mark, name, "is not a known key", hint=f"known keys: {context['expected']}")
        case "literal_error":
            choices = re.findall(r"'([^']*)'", context["expected"])
            hint = _did_you_mean(detail["input"], choices) or about
            return Problem(mark, name, f"must be {context['expected']}", got, hint)
        case "string_pattern_mismatch":
            words = patterns.WORDS.get(context["pattern"], f"must match {context['pattern']}")
            return Problem(mark, name, words, got, about)
        case "value_error":
            return Problem(mark, name, str(context["error"]), got, about)
        case bound if bound in _BOUNDS:
            template, key = _BOUNDS[bound]
            return Problem(mark, name, template.format(f"{context[key]:.15g}"), got, about)
        case other:
            return Problem(mark, name, _TYPES.get(other, detail["msg"]), got, about)


def _schema_at(whole: Schema, path: Path) -> Schema:
    node = whole
    for part in path:
        if isinstance(part, int):
            node = node.get("items", {})
        else:
            node = node.get("properties", {}).get(part) or node.get("additionalProperties", {})
    return node


def _describe(node: Schema) -> str:
    return str(node.get("description", ""))


def _known_fields(path: Path, whole: Schema) -> str:
    """Where a misspelt or misplaced field belongs."""
    parent, key = path[:-1], str(path[-1])
    here = list(_schema_at(whole, parent).get("properties", {}))
    if near := _did_you_mean(key, here):
        return near
    spec = whole["properties"]["spec"]
    elsewhere = [place for name in (key, to_camel(key)) for place in _places(spec, name, ("spec",))]
    if elsewhere:
        return f"did you mean {field_path(elsewhere[0])}?"
    return f"known fields here: {', '.join(here)}" if here else "remove it"


def _places(node: Schema, name: str, path: Path) -> list[Path]:
    """Paths of the fields called `name` below a node; lists are not entered."""
    found: list[Path] = []
    for key, below in node.get("properties", {}).items():
        if key == name:
            found.append((*path, key))
        found += _places(below, name, (*path, key))
    return found


def _did_you_mean(wrong: object, known: Sequence[str]) -> str:
    if not isinstance(wrong, str):
        return ""
    folded = {re.sub("[-_ ]", "", name).lower(): name for name in known}
    near = difflib.get_close_matches(re.sub("[-_ ]", "", wrong[:64]).lower(), folded, n=1, cutoff=0.7)
    return f"did you mean {folded[near[0]]}?" if near else ""


def _shown_scalar(value: Any, path: Path) -> str | None:
    """The value at `path` as it may be shown; None where there is none, or a whole list or mapping."""
    try:
        for part in path:
            value = value[part]
    except (LookupError, TypeError):
        return None
    return None if isinstance(value, Mapping | list) else show(value)
