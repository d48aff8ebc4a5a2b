"""YAML read as the API server reads it, with the line of every field.

Two readers must agree on a job file: this one and kubectl's. So plain scalars follow its rules (`2e-4` is a number,
`off` is a boolean, `1:30` is text), which are not PyYAML's. Hostile input ends early: the tree is built from events,
with bounds on depth and on the values that aliases expand to.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

import yaml

MAX_BYTES: Final = 1 << 20
MAX_DEPTH: Final = 64
MAX_VALUES: Final = 50_000

Path = tuple[str | int, ...]

_LOADER: Final = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_TEXT_TAGS: Final = (None, "!", "tag:yaml.org,2002:str")
_WORDS: Final[dict[str, bool | float | None]] = (
    dict.fromkeys(("", "~", "null", "Null", "NULL"))
    | dict.fromkeys(("y", "Y", "yes", "Yes", "YES", "true", "True", "TRUE", "on", "On", "ON"), True)
    | dict.fromkeys(("n", "N", "no", "No", "NO", "false", "False", "FALSE", "off", "Off", "OFF"), False)
    | dict.fromkeys((".inf", ".Inf", ".INF", "+.inf", "+.Inf", "+.INF"), math.inf)
    | dict.fromkeys(("-.inf", "-.Inf", "-.INF"), -math.inf)
    | dict.fromkeys((".nan", ".NaN", ".NAN"), math.nan)
)
_INTEGER: Final = re.compile(r"[-+]?(0[xX][0-9a-fA-F]{1,16}|0[oO]?[0-7]{1,22}|0[bB][01]{1,64}|0|[1-9][0-9]{0,18})")
_FLOAT: Final = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")


@dataclass(frozen=True, order=True)
class Mark:
    """A place in a file; both count from 1."""

    line: int
    column: int


@dataclass(frozen=True)
class Complaint:
    """Something wrong with the text itself."""

    mark: Mark
    path: Path
    message: str
    hint: str = ""


@dataclass
class Document:
    """One YAML document: its value, and where each field's key (or list item) stands."""

    mark: Mark
    value: object = None
    marks: dict[Path, Mark] = field(default_factory=dict)
    complaints: list[Complaint] = field(default_factory=list)

    def locate(self, path: Path) -> Mark:
        """The mark of `path`, or of the nearest part of it that is in the text."""
        while path and path not in self.marks:
            path = path[:-1]
        return self.marks.get(path, self.mark)


@dataclass
class _Node:
    mark: Mark
    scalar: object = None
    items: list[_Node] | None = None
    pairs: list[tuple[str, _Node, Mark]] | None = None  # key, value, and where the key stands


class _Refused(Exception):
    def __init__(self, mark: Mark, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.mark, self.message, self.hint = mark, message, hint


def read_documents(text: str) -> tuple[list[Document], Complaint | None]:
    """The documents of a YAML text, and what stopped the reading, if anything did.

    Documents that come before a syntax error are returned. Empty ones are left out.
    """
    documents: list[Document] = []
    try:
        events = yaml.parse(text, Loader=_LOADER)
        for event in events:
            if isinstance(event, yaml.DocumentStartEvent):
                node = _compose(next(events), events, {}, 0)
                document = Document(node.mark)
                document.value = _Builder(document).build(node, ())
                if document.value is not None:
                    documents.append(document)
    except _Refused as e:
        return documents, Complaint(e.mark, (), e.message, e.hint)
    except yaml.reader.ReaderError as e:
        return documents, Complaint(_mark_at(text, e.position), (), f"not YAML: {e.reason}")
    except yaml.MarkedYAMLError as e:
        return documents, _syntax_error(e)
    return documents, None


def _compose(event: yaml.Event, events: Iterator[yaml.Event], anchors: dict[str, _Node], depth: int) -> _Node:
    mark = _start(event)
    if depth > MAX_DEPTH:
        raise _Refused(mark, f"values are nested deeper than {MAX_DEPTH} levels")
    if isinstance(event, yaml.AliasEvent):
        if event.anchor not in anchors:
            raise _Refused(mark, f"alias *{event.anchor} has no finished anchor &{event.anchor} before it")
        return anchors[event.anchor]
    node = _Node(mark)
    if getattr(event, "tag", None) not in _TEXT_TAGS:
        raise _Refused(mark, "tags such as !!binary or !name are not supported", "remove the tag")
    if isinstance(event, yaml.ScalarEvent):
        node.scalar = plain_scalar(event.value) if event.implicit[0] else event.value
    elif isinstance(event, yaml.SequenceStartEvent):
        node.items = []
        while not isinstance(item := next(events), yaml.SequenceEndEvent):
            node.items.append(_compose(item, events, anchors, depth + 1))
    else:
        node.pairs = []
        while not isinstance(key := next(events), yaml.MappingEndEvent):
            key_mark = _start(key)
            if not isinstance(key, yaml.ScalarEvent):
                raise _Refused(key_mark, "a key must be plain text, not a list, a mapping or an alias")
            if key.value == "<<" and key.implicit[0]:
                raise _Refused(key_mark, "merge keys (<<) are not supported", "write the fields out")
            node.pairs.append((key.value, _compose(next(events), events, anchors, depth + 1), key_mark))
    if isinstance(event, yaml.NodeEvent) and event.anchor is not None:
        anchors[event.anchor] = node  # only now: a value that contains itself has no end
    return node


def plain_scalar(text: str) -> object:
    """The value of an unquoted scalar, by the rules of kubectl's YAML reader (go.yaml.in/yaml/v2, resolve.go)."""
    if text in _WORDS:
        return _WORDS[text]
    digits = text.replace("_", "")
    if text[0] in "+-.0123456789":
        if _INTEGER.fullmatch(digits):
            octal = re.sub(r"^([-+]?)0(?=[0-7])", r"\g<1>0o", digits)
            return int(octal, 0)
        if _FLOAT.fullmatch(digits) and math.isfinite(number := float(digits)):
            return number
    return text


class _Builder:
    """Turns nodes into plain values, notes where they stand, and stops when aliases expand to too much."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.values = 0

    def build(self, node: _Node, path: Path) -> object:
        self.values += 1
        if self.values > MAX_VALUES:
            raise _Refused(node.mark, f"the document has more than {MAX_VALUES} values, with its aliases expanded")
        if len(path) > MAX_DEPTH:
            raise _Refused(node.mark, f"values are nested deeper than {MAX_DEPTH} levels")
        if node.items is not None:
            values = []
            for index, item in enumerate(node.items):
                self.document.marks[(*path, index)] = item.mark
                values.append(self.build(item, (*path, index)))
            return values
        if node.pairs is not None:
            return self._mapping(node.pairs, path)
        if isinstance(node.scalar, float) and not math.isfinite(node.scalar):
            self.document.complaints.append(Complaint(node.mark, path, "must be a finite number"))
            return None  # JSON has no such number, and neither has the API server
        return node.scalar

    def _mapping(self, pairs: list[tuple[str, _Node, Mark]], path: Path) -> dict[str, object]:
        values: dict[str, object] = {}
        for key, node, mark in pairs:
            here = (*path, key)
            if key in values:
                first = self.document.marks[here].line
                self.document.complaints.append(
                    Complaint(mark, here, f"the key stands twice, first on line {first}", "keep one of the two")
                )
                continue
            self.document.marks[here] = mark
            values[key] = self.build(node, here)
        return values


def _start(event: yaml.Event) -> Mark:
    assert event.start_mark is not None
    return Mark(event.start_mark.line + 1, event.start_mark.column + 1)


def _syntax_error(error: yaml.MarkedYAMLError) -> Complaint:
    mark = error.problem_mark or error.context_mark
    place = Mark(mark.line + 1, mark.column + 1) if mark else Mark(1, 1)
    what = ", ".join(part for part in (error.context, error.problem) if part)
    hint = ""
    if "character that cannot start any token" in what:
        hint = "indent with spaces, not tabs, and quote text that starts with @, ` or %"
    elif "mapping values are not allowed" in what:
        hint = "quote text that has a colon and a space in it, and check the indentation"
    return Complaint(place, (), f"not YAML: {what}", hint)


def _mark_at(text: str, position: int) -> Mark:
    before = text[:position]
    return Mark(before.count("\n") + 1, position - (before.rfind("\n") + 1) + 1)
