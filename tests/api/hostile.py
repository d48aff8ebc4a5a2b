"""Jobs that somebody careless or hostile would send: every field with every sort of wrong or extreme value, and more.

Each case is one text, as it would be posted: JSON when it starts with a brace, else YAML. Names are unique, so that
all that the API server accepts can be in one namespace; the same texts come each time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import yaml

from finetune_api.base import GROUP, VERSION
from finetune_api.crd import JOB as JOB_KIND
from finetune_api.crd import Schema, schema
from finetune_api.deepspeed_keys import REFUSED_KEYS
from finetune_api.job_rules import RAW_KEYS
from tests.api.objects import Api
from tests.unit.api_cases import JOB, changed

MIB: Final = 1 << 20
_RAW: Final = "\x01raw\x01"  # in its place a text is written that `json.dumps` would not write
# Everything that a field's name can need above it is there, so that one change reaches each field.
FULL: Final = changed(
    JOB,
    {
        "spec.runtimeRef": {"name": "h200"},
        "spec.data.evaluation": [{"uri": "s3://rows/evaluation.jsonl"}],
        "spec.evaluation.prompts": [{"prompt": "Hi", "expect": ["hello"]}],
        "spec.evaluation.gates": [{"metric": "promptsPassed", "min": 0.5}],
    },
)
TEXTS: Final[Mapping[str, str]] = {
    "empty": "",
    "a null byte": "a\x00b",
    "a line feed": "a\nb",
    "an escape sequence": "\x1b[2J",
    "a right-to-left override": "a\u202egpj.exe",
    "zero width": "a\u200bb\ufeff",
    "half a surrogate pair": "\ud800",
    "a non-character": "\uffff",
    "a thousand combining marks": "e" + "\u0301" * 1000,
    "beyond the basic plane": "👩‍👩‍👧‍👦" * 8,
    "shell": "$(reboot);`reboot`|reboot&",
    "template": "{{.Values.x}}${HOME}%s%n",
    "markup": "<script>alert(1)</script>",
    "64 KiB": "a" * (64 << 10),
}
OTHER_TYPES: Final[Mapping[str, Any]] = {
    "number": 1,
    "text": "1",
    "boolean": True,
    "list": [[]],
    "mapping": {"a": {}},
}
TYPE_OF: Final = {"string": "text", "integer": "number", "number": "number", "array": "list", "object": "mapping"}
# Written as they stand: JSON as an encoder would not write it, but a decoder may meet it.
NUMBERS: Final = ("-0.0", "0.5", "1e3", "1.0", "9007199254740993", "9223372036854775808", "1e308", "5e-324")
NO_NUMBERS: Final = ("1" + "0" * 400, "1e309", "-1e400", "NaN", "Infinity", "0x10", "007", "1e", "+1", ".5", "--1")
ADDRESSES: Final = (
    "s3://bucket/../../etc/passwd", "s3://bucket/%2e%2e/x", "s3://bucket/.%2E/x", "s3://bucket/%252e%252e/x",
    "s3://bucket/..%2fx", "s3://bucket/..", "s3://../x", "file:///../x", "file:///etc/passwd",
    "file:///proc/self/environ", "file://localhost/x", "pvc://claim/../x", "pvc://Claim/x",
    "pvc://" + "a" * 300 + "/x", "s3://AKIA:hunter2@bucket/x", "s3://user@bucket/x", "gs://user:@bucket/x",
    "abfs://c:hunter2@a.dfs.core.windows.net/x", "s3://bucket/x?versionId=1", "s3://bucket/x#y", "s3://bucket/a b",
    "s3://bucket/a\tb", "s3://bucket/\u2024\u2024/x", "s3://bucket/\uff0e\uff0e/x", "s3://bucket/\u202e/x",
    "s3://b\u00fccket/x", "s3://bucket/\ud800", "s3://bucket/\x00", "s3://bucket/%00", "s3://", "s3:///key",
    "s3:bucket/key", "S3://bucket/key", "//bucket/key", "http://169.254.169.254/latest/meta-data", "s3://[::1]/x",
    "s3://169.254.169.254/latest", "ftp://host/x", "javascript:alert(1)", "data:text/plain,x", "C:\\rows.jsonl",
    "s3://bucket/a\\..\\b", "s3://bucket/$(id)", "s3://bucket/`id`", "s3://bucket/{{x}}",
    "s3://bucket/'; DROP TABLE x;--", "s3://bucket/" + "a" * 1012, "s3://bucket/" + "a" * 1013,
    "s3://bucket/" + "\u00fc" * 1012, "rows/train.jsonl", "/rows", ".", "..", "-", "--help", "-rf", "hf://org/name",
    "hf://org/name@../../x", "hf://org/name@refs/pr/1", "hf://org/../name@x", "hf://org/name@a@b", "hf://@x",
    "hf://o/n@" + "f" * 500,
)  # fmt: skip
NAMES: Final = (
    "a" * 47, "a" * 48, "a" * 63, "a" * 253, "a" * 254, "a" * 5000, "", "-", "a-", "-a", "1a", "A", "a.b", "a_b",
    "a b", "a/b", "../a", "%2e%2e", ".", "..", "a\x00", "a\n", "\u00fc", "\u0430", "\U0001f600", "a\u200b", "null",
    "true", "1", "1e3",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """What is posted, and the path of the field that is odd: a refusal has to name it. Without one it is the text."""

    name: str
    text: str
    field: str

    @property
    def deep(self) -> bool:
        """Whether it is nested deeper than Python's JSON reader goes unless it is told to."""
        return any(opening * 900 in self.text for opening in ("[", '{"a":'))

    def send(self, api: Api, namespace: str) -> str:
        """Creates it and returns its name.

        Raises:
            Refused: the API server does not take it.
        """
        content_type = "application/json" if self.text.startswith("{") else "application/yaml"
        path = f"/apis/{GROUP}/{VERSION}/namespaces/{namespace}/{JOB_KIND.plural}"
        query = "?fieldValidation=Strict&includeObject=None"
        # As a table: the object itself may be too deep to read.
        answer = api.request(
            "POST", path + query, self.text, content_type, "application/json;as=Table;g=meta.k8s.io;v=v1"
        )
        return str(answer["rows"][0]["cells"][0])


def corpus() -> Iterator[Case]:
    """All cases, several hundred. Jobs whose name is not the odd thing have each their own."""
    for number, (name, text, field) in enumerate(_cases()):
        yield Case(name, text.replace('"support-chat"', f'"hostile-{number:03d}"'), field)


def _cases() -> Iterator[tuple[str, str, str]]:
    spec = schema(JOB_KIND)["properties"]["spec"]
    yield from _fields(spec, "spec")
    for field in ("spec.model.source", "spec.data.train[0].uri", "spec.output.uri"):
        for address in ADDRESSES:
            yield _changed(field, address)
    for name in NAMES:
        yield _changed("metadata.name", name)
    yield from _metadata()
    yield from _raw_keys()
    yield from _sizes()
    yield from _documents()
    yield from _yaml()


def _changed(field: str, value: object, name: str = "", raw: str = "") -> tuple[str, str, str]:
    """The full job with one value changed; `raw` is written as it is where `value` has _RAW."""
    text = _json(changed(FULL, {field: value}))
    shown = name or (repr(value) if len(repr(value)) <= 60 else repr(value)[:40] + f"… ({len(repr(value))})")
    return f"{field}: {shown}", text.replace(_json(_RAW), raw), field


def _json(value: object) -> str:
    """Characters as they are; but half a surrogate pair can be sent as its escape only."""
    return json.dumps(value, ensure_ascii=False).replace("\ud800", "\\ud800")


def _fields(node: Schema, path: str) -> Iterator[tuple[str, str, str]]:
    """Each field of a schema, in every way that its type can be wrong or extreme."""
    kind = node.get("type", "")
    for name, value in OTHER_TYPES.items():
        if kind and name != TYPE_OF.get(kind, "boolean"):
            yield _changed(path, value, f"a {name}")
    yield _changed(path, _RAW, "null", "null")
    if "enum" in node:
        yield _changed(path, str(node["enum"][0]).upper() + " ", "upper case, and a blank behind")
    elif kind == "string":
        yield from _text(node, path)
    elif kind in ("integer", "number"):
        yield from _number(node, path)
    elif kind == "array":
        yield from _list(node, path)
    elif kind == "object":
        yield from _mapping(node, path)


def _text(node: Schema, path: str) -> Iterator[tuple[str, str, str]]:
    for name, value in TEXTS.items():
        yield _changed(path, value, name)
    for length in (node["maxLength"], node["maxLength"] + 1):
        yield _changed(path, "\u00e9" * length, f"{length} characters of two bytes")


def _number(node: Schema, path: str) -> Iterator[tuple[str, str, str]]:
    for bound in (node.get("minimum"), node.get("maximum")):
        for number in () if bound is None else (bound - 1, bound, bound + 1):
            yield _changed(path, number)
    for text in NUMBERS:
        yield _changed(path, _RAW, text, text)


def _list(node: Schema, path: str) -> Iterator[tuple[str, str, str]]:
    yield _changed(path, [], "empty")
    yield _changed(path, [_RAW], "a null in it", "null")
    yield _changed(path, ["x"] * (node["maxItems"] + 1), "one too many")
    if "properties" in node["items"]:
        yield from _fields(node["items"], f"{path}[0]")


def _mapping(node: Schema, path: str) -> Iterator[tuple[str, str, str]]:
    yield _changed(path, {}, "empty")
    yield _changed(f"{path}.__proto__", {"polluted": True})
    yield _changed(f"{path}.{'k' * 300}", 1, "a long unknown key")
    for name, below in node.get("properties", {}).items():
        if path != RAW_KEYS:
            yield from _fields(below, f"{path}.{name}")


def _metadata() -> Iterator[tuple[str, str, str]]:
    values: dict[str, Any] = {
        "labels": {"k" * 400: "v"},
        "labels.long": "v" * 64,
        "labels.blank": "a b",
        "labels.number": 1,
        "annotations": {"": "empty key"},
        "annotations.large": "a" * (255 << 10),
        "annotations.too-large": "a" * (257 << 10),
        "annotations.nulls": "\x00" * 1000,
        "ownerReferences": [{"apiVersion": "v1", "kind": "Node", "name": "x", "uid": "no-such-uid"}, {}],
        "finalizers": ["no slash"],
        "namespace": "kube-system",
        "generateName": "a" * 300,
        "uid": "chosen",
        "resourceVersion": "12",
        "generation": -5,
        "creationTimestamp": "yesterday",
        "deletionTimestamp": "2020-01-01T00:00:00Z",
        "deletionGracePeriodSeconds": -1,
        "managedFields": [{"manager": "x", "fieldsV1": {"f:spec": []}}],
        "unknown": {"a": 1},
    }
    for field, value in values.items():
        yield _changed(f"metadata.{field}", value)


def _raw_keys() -> Iterator[tuple[str, str, str]]:
    """DeepSpeed's own keys may hold anything."""
    field = RAW_KEYS
    for key in (
        "",
        " ",
        "a.b",
        "a/b",
        "~1",
        "$ref",
        "\x00",
        "\u202e",
        "\ud800",
        "\U0001f600",
        "k" * 256,
        "k" * 257,
        "self",
    ):
        yield f"{field} with key {key[:9]!r} ({len(key)})", _json(changed(FULL, {field: {key: 1}})), field
    odd: dict[str, Any] = {"null": None, "lists": [[[]], [None], [{}]], "mixed": [1, "a", {}, None, 1.5, False]}
    for name, value in odd.items():
        yield f"{field} with {name}", _json(changed(FULL, {field: {"x": value}})), field
    for text in (*NUMBERS, "0.1" + "0" * 5000 + "1", "18446744073709551616"):
        yield _changed(field, {"x": _RAW}, f"a number {text[:30]}", text)
    for text in NO_NUMBERS:
        name, document, _ = _changed("spec.workers.count", _RAW, f"no number {text[:30]}", text)
        yield name, document, ""
    for count in (64, 65, 50_000):
        yield f"{field} of {count} keys", _json(changed(FULL, {field: {f"k{n}": n for n in range(count)}})), field
    for depth in (32, 60, 64, 65, 200, 1000, 9990, 10_010, 100_000):
        yield _changed(field, {"x": _RAW}, f"lists nested {depth} deep", "[" * depth + "]" * depth)
        yield _changed(field, {"x": _RAW}, f"mappings nested {depth} deep", '{"a":' * depth + "1" + "}" * depth)
    for refused in REFUSED_KEYS:
        for text in ("null", "{}", "[]", '"x"', "0", '{"enabled": false}'):
            yield _changed(f"{field}.{refused.key}", _RAW, text, text)


def _sizes() -> Iterator[tuple[str, str, str]]:
    """From what is large and right to what no server takes."""
    prompt = {"prompt": "p" * 8192, "expect": ["e"]}
    for count in (100, 256):
        yield _changed("spec.evaluation.prompts", [prompt] * count, f"{count} of 8 KiB")
    rows = [{"uri": f"s3://rows/{n:0>990}"} for n in range(256)]
    yield _changed("spec.data.train", rows, "256 long addresses")
    for size in (MIB // 2, MIB, 3 * MIB // 2, 2 * MIB, 4 * MIB):
        yield _changed("spec.deepspeed.config", {"x": "a" * size}, f"{size >> 10} KiB in one value")
    yield _changed("spec.deepspeed.config", {"x": ["\u2603"] * (MIB // 8)}, "a list of 131,072")
    yield _changed("metadata.annotations", {f"k{n}": "v" * 1000 for n in range(2000)}, "2 MB")


def _documents() -> Iterator[tuple[str, str, str]]:
    """The document as a whole."""
    values: dict[str, Any] = {
        "apiVersion": "finetune.dev/v1",
        "kind": "FinetuneRuntime",
        "spec": None,
        "metadata": None,
        "status": {"phase": "Complete", "attempt": 99, "conditions": [{"type": "Complete", "status": "True"}]},
        "data": "top level",
        "spec.status": {"phase": "Complete"},
        "spec.podTemplate": {"spec": {"hostNetwork": True, "containers": [{"image": "evil"}]}},
        "spec.Model": {"source": "s3://x/y"},
        "spec.workers.image": "evil",
        "spec.suspend ": True,
    }
    for field, value in values.items():
        yield _changed(field, value)
    whole = _json(FULL)
    yield "a key twice", whole[:-1] + ', "spec": {}}', ""
    yield "a key twice, below", whole.replace('"uri": "s3://models', '"uri": "s3://x/y", "uri": "s3://models'), ""
    yield "cut off", whole[:-20], ""
    yield "more behind", whole + "{}", ""
    yield "a byte order mark", "\ufeff" + whole, ""
    yield "comments in JSON", whole.replace("{", "{/* */", 1), ""
    yield "a list", "[" + whole + "]", ""
    for text in ("", "null", "1", '"x"', "{}", "[]", "{", "\x00"):
        yield f"only {text!r}", text, ""


def _yaml() -> Iterator[tuple[str, str, str]]:
    """What only YAML can do. `metadata.name` is quoted, so that each text gets a name of its own."""
    head = 'apiVersion: finetune.dev/v1alpha1\nkind: FinetuneJob\nmetadata: {name: "support-chat"}\n'
    spec = yaml.safe_dump({"spec": JOB["spec"]}, sort_keys=False)
    plain = head + spec
    laughs = "".join(f"      a{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 9)}]\n" for n in range(9))
    config = "  deepspeed:\n    config:\n"
    for name, text in {
        "as it should be": plain,
        "an anchor used": plain + config + "      a: &x {b: 1}\n      c: *x\n",
        "an anchor for the address": plain.replace("uri: s3://rows", "uri: &u s3://rows")
        + "  runtimeRef: {name: *u}\n",
        "nine to the ninth by aliases": plain + config + "      a0: &a0 [x]\n" + laughs,
        "a thousand aliases": plain + config + "      a: &x [1, 2]\n      b: [" + "*x, " * 1000 + "]\n",
        "an alias to itself": plain + config + "      a: &x [*x]\n",
        "an alias to nothing": plain + config + "      a: *nothing\n",
        "a merge key": plain + config + "      <<: {a: 1}\n",
        "a merge key for the workers": plain + "  workers:\n    <<: {count: 3}\n",
        "a tag for bytes": plain + config + "      a: !!binary aGVsbG8=\n",
        "a tag for Python": plain + config + "      a: !!python/object/apply:os.system [reboot]\n",
        "a tag for numbers": plain + "  workers: {count: !!int '3'}\n",
        "an unknown tag": plain + config + "      a: !evil x\n",
        "a word for a boolean": plain + "  suspend: off\n",
        "a letter for a boolean": plain + "  suspend: n\n",
        "a number that is no float in YAML 1.1": plain + "  training: {learningRate: 2e-4}\n",
        "base sixty": plain + "  workers: {count: 1:30}\n",
        "octal": plain + "  workers: {count: 010}\n",
        "underscores": plain + "  workers: {count: 1_0}\n",
        "a date": plain + "  limits: {activeDeadline: 2026-01-01}\n",
        "not a number": plain + "  training: {learningRate: .nan}\n",
        "infinite": plain + "  limits: {maxCost: .inf}\n",
        "a number as a key": plain + config + "      1: a\n",
        "a boolean as a key": plain + config + "      true: a\n",
        "a list as a key": plain + config + "      ? [a]\n      : b\n",
        "a tab": plain + "\tworkers: {count: 2}\n",
        "Windows line ends": plain.replace("\n", "\r\n"),
        "a byte order mark": "\ufeff" + plain,
        "a second document": plain + "---\n" + plain,
        "two thousand nested lists": plain + config + "      a: " + "[" * 2000 + "]" * 2000 + "\n",
        "a key twice": plain + "  workers: {count: 1, count: 2}\n",
        "a block of control characters": plain + config + '      a: "\\x00\\x1b[2J\\u202e"\n',
        "a long line": plain + config + "      a: " + "b" * (MIB // 2) + "\n",
        "directives": "%YAML 1.2\n---\n" + plain,
        "an end and more": plain + "...\nmore\n",
    }.items():
        yield f"YAML: {name}", text, ""
