"""The reference pages of the two kinds and of the exit codes, generated from the models, the rules and the errors.

python -m finetune_api.docs docs/reference
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from finetune_api import errors, patterns
from finetune_api.base import API_VERSION
from finetune_api.crd import JOB, KINDS, Kind, Schema, schema
from finetune_api.deepspeed_keys import REFUSED_KEYS
from finetune_api.job_rules import IMMUTABLE, RAW_KEYS
from finetune_api.rules import Rule

_NOTICE: Final = "<!-- Generated from operator/finetune_api by `make generate`. Do not edit. -->\n"


def reference(kind: Kind) -> str:
    """The Markdown page of a kind: every field with type, default, bounds and meaning, then the rules between them."""
    whole = schema(kind)
    lines = [
        _NOTICE,
        f"# {kind.name}\n",
        f"`{API_VERSION}`, {kind.scope.lower()}, short name `{kind.short_name}`. {whole['description']}\n",
        "What is neither required nor has a default may be left out. `finetune validate FILE` checks all of it.\n",
        "## Spec\n",
        *_object("spec", whole["properties"]["spec"], {}),
        "## Rules between fields\n",
        *_rules(kind),
        "## Status\n",
        "Written by the operator. Times are RFC 3339 in UTC, durations are seconds.\n",
        *_object("status", whole["properties"]["status"], {}),
    ]
    return "\n".join(lines).rstrip() + "\n"


def exit_codes() -> str:
    """The Markdown page of the exit codes, from the error tree."""
    named = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    kinds = [kind for kind in named if issubclass(kind, errors.FinetuneError)]
    rows = [
        ("0", "", "Done."),
        *((str(kind.exit_code), f"`{kind.__name__}`", _meaning(kind.__name__)) for kind in kinds),
    ]
    lines = [
        _NOTICE,
        "# Exit codes\n",
        "Every command of `finetune` ends with one of these. What went wrong, where, and what to do is on stderr.\n",
        *table(("Code", "Error", "Meaning"), sorted(rows, key=lambda row: int(row[0]))),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _meaning(name: str) -> str:
    """What the error tree's docstring says about an error."""
    tree = inspect.getdoc(errors) or ""
    (line,) = (line for line in tree.splitlines() if f"{name} " in line and "exit" in line)
    text = line.split(maxsplit=line.split().index("exit") + 2)[-1].strip("()")
    return text[0].upper() + text[1:] + "."


def _object(path: str, node: Schema, shown: dict[str, Schema]) -> Iterator[str]:
    yield f"### {path}\n"
    same = next((other for other, schema_ in shown.items() if schema_ == node["properties"]), None)
    if same:
        yield f"As [{same}](#{re.sub(r'[^a-z]', '', same.lower())}).\n"
        return
    shown[path] = node["properties"]
    rows: list[tuple[str, ...]] = []
    below: list[tuple[str, Schema]] = []
    for name, field in node["properties"].items():
        meaning = _cell(field.get("description", ""))
        rows.append(
            (f"`{name}`", _type(field), _default(field, name in node.get("required", [])), _bounds(field), meaning)
        )
        item = field.get("items", field)
        if "properties" in item and "x-kubernetes-preserve-unknown-fields" not in item:
            below.append((f"{path}.{name}" + ("[]" if "items" in field else ""), item))
    yield from table(("Field", "Type", "Default", "Bounds", "Meaning"), rows)
    for name, field in below:
        yield from _object(name, field, shown)


def _rules(kind: Kind) -> Iterator[str]:
    if kind is JOB:
        names = ", ".join(f"`spec.{name}`" for name in IMMUTABLE)
        yield f"{names} cannot change once the job exists. The rest may; the next attempt takes it up.\n"
    # The rules that several fields share are one row.
    shared: dict[tuple[str, str], list[Rule]] = {}
    for rule in kind.rules:
        if rule.at != RAW_KEYS:
            shared.setdefault((rule.message, rule.do), []).append(rule)
    rows: list[tuple[str, ...]] = []
    for (message, do), rules in shared.items():
        fields = ", ".join(f"`{'.'.join((rule.at, *rule.reads[:1]))}`" for rule in rules)
        rows.append((fields, _cell(message) + (" (in a cluster)" if rules[0].cluster_only else ""), _cell(do)))
    yield from table(("Field", "Refused because", "What to do"), rows)
    if kind is JOB:
        yield f"### Raw keys that {RAW_KEYS} refuses\n"
        refused = [(f"`{each.key}`", each.why, each.do) for each in REFUSED_KEYS]
        yield from table(("Key", "Refused because it", "What to do"), refused)


def _type(field: Schema) -> str:
    if "x-kubernetes-int-or-string" in field:
        return "integer or string"
    if field["type"] == "array":
        return f"list of {_type(field['items'])}"
    if "additionalProperties" in field:
        return f"map to {_type(field['additionalProperties'])}"
    return str(field.get("format", field["type"]))


def _default(field: Schema, required: bool) -> str:
    if required:
        return "**required**"
    return f"`{_plain(field['default'])}`" if "default" in field and "properties" not in field else ""


def _bounds(field: Schema) -> str:
    item = field.get("items") or field.get("additionalProperties") or {}
    bounds = [text for text in (_choices(field), _range(field), _length(field), _words(field)) if text]
    inner = [text for text in (_choices(item), _range(item), _length(item), _words(item)) if text]
    keys = [rule["message"] for rule in field.get("x-kubernetes-validations", []) if "additionalProperties" in field]
    return _cell("; ".join([*bounds, *keys, *(f"each {text}" for text in inner)]))


def _choices(field: Schema) -> str:
    return " ".join(f"`{choice}`" for choice in field.get("enum", []))


def _range(field: Schema) -> str:
    low, high = field.get("minimum"), field.get("maximum")
    left = "" if low is None else f"{'>' if field.get('exclusiveMinimum') else '≥'} {_plain(low)}"
    right = "" if high is None else f"{'<' if field.get('exclusiveMaximum') else '≤'} {_plain(high)}"
    return ", ".join(text for text in (left, right) if text)


def _length(field: Schema) -> str:
    for unit, low, high in (
        ("characters", "minLength", "maxLength"),
        ("entries", "minItems", "maxItems"),
        ("keys", "", "maxProperties"),
    ):
        if high in field:
            least = field.get(low, 0)
            if least == field[high]:
                return f"{least} {unit}"
            return f"{least}–{field[high]:,} {unit}" if least else f"up to {field[high]:,} {unit}"
    return ""


def _words(field: Schema) -> str:
    words = patterns.WORDS.get(field.get("pattern", ""), "")
    return words.removeprefix("must be ")


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return f"{value:,.17g}" if abs(value) >= 10_000 else f"{value:.15g}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    """A Markdown table."""
    lines = [head, ("---",) * len(head), *rows]
    return ["\n".join("| " + " | ".join(row) + " |" for row in lines) + "\n"]


def pages() -> dict[str, str]:
    """Every page, by its file name."""
    return {f"{kind.name.lower()}.md": reference(kind) for kind in KINDS} | {"exit-codes.md": exit_codes()}


def main(folder: str) -> None:
    """Writes the pages."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (Path(folder) / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
