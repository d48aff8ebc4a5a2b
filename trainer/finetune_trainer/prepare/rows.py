"""Checks one row of data and brings it into the form of its format: chat, completion, text, code or rag.

Pure: fields in, a `Row` or the row's problems out. No message carries the row's own text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, get_args

from finetune_api.job import ColumnField

RowFormat = Literal["chat", "completion", "text", "code", "rag"]
Message = dict[str, Any]

FORMATS: Final[tuple[RowFormat, ...]] = get_args(RowFormat)
COLUMNS: Final[tuple[str, ...]] = get_args(ColumnField)
# A format is recognised by any of its fields. Code has to be named: its rows look like text.
FIELDS: Final[dict[RowFormat, tuple[str, ...]]] = {
    "chat": ("messages",),
    "completion": ("prompt", "completion"),
    "text": ("text",),
    "rag": ("oracle", "distractors"),
}
_ROLES: Final = ("system", "user", "assistant", "tool")
_LATER: Final = {"preference": ("chosen", "rejected")}


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a row: the field, what is wrong, and what to do."""

    field: str
    what: str
    hint: str = ""


class BadRow(ValueError):
    """Carries the row's first problem out of a check."""

    def __init__(self, field: str, what: str, hint: str = "") -> None:
        super().__init__(what)
        self.problem = Problem(field, what, hint)


@dataclass(frozen=True)
class Row:
    """A row that can be rendered. Only the fields of its format are filled."""

    format: RowFormat
    messages: list[Message] = field(default_factory=list)  # without `weight`
    weights: list[float] = field(default_factory=list)  # one per message
    tools: list[dict[str, Any]] | None = None
    prompt: str = ""
    completion: str = ""
    text: str = ""
    path: str = ""  # of code, inside of its repository
    language: str | None = None
    license: str | None = None
    repository: str = ""
    question: str = ""
    oracles: list[str] = field(default_factory=list)  # documents that hold the answer
    distractors: list[str] = field(default_factory=list)  # documents that do not
    answer: str = ""

    def identity(self) -> str | None:
        """What is the same for rows that are the same, where their rendered text also depends on draws."""
        if self.format == "code":
            return self.text
        if self.format == "rag":
            return json.dumps([self.question, self.oracles, self.distractors, self.answer])
        return None

    def said(self) -> list[str]:
        """What distinguishes the row from others: all its texts, without what rows share, as system messages."""
        if self.format == "chat":
            return [message["content"] for message in self.messages if message["role"] != "system"]
        if self.format == "rag":
            return [self.question, self.answer]
        return [self.prompt, self.completion] if self.format == "completion" else [self.text]

    def asked(self) -> list[str]:
        """What a user says in it."""
        if self.format == "chat":
            return [message["content"] for message in self.messages if message["role"] == "user"]
        if self.format == "rag":
            return [self.question]
        return [self.prompt if self.format == "completion" else self.text]


def detect(fields: Mapping[str, Any]) -> RowFormat:
    """The one format whose fields the row has.

    Raises:
        BadRow: it has the fields of no format, or of more than one.
    """
    present = {name for name, value in fields.items() if value is not None}
    matches = [name for name, own in FIELDS.items() if present.intersection(own)]
    if len(matches) == 1:
        return matches[0]
    if matches:
        names = [own for name in matches for own in FIELDS[name] if own in present]
        raise BadRow(
            ", ".join(names),
            f"the row matches two formats, {matches[0]} and {matches[1]}",
            f"set the source's format, such as `format: {matches[0]}`, or remove the fields of the other",
        )
    for name, own in _LATER.items():
        if present.intersection(own):
            raise BadRow(", ".join(n for n in own if n in present), f"the format {name} is not available yet", "")
    for name in (name for own in FIELDS.values() for name in own if name in fields):
        raise BadRow(name, "the field is null", "give it a value, or leave the row out")
    raise BadRow(
        "",
        "the row has none of the fields messages, prompt and completion, text, or oracle and distractors",
        "rename the file's own fields with the source's `columns`",
    )


def check_row(fields: Mapping[str, Any], row_format: RowFormat) -> Row:
    """The row in its format.

    Raises:
        BadRow: the first thing that is wrong with it.
    """
    if row_format == "chat":
        return _chat(fields)
    if row_format == "completion":
        prompt = _text(fields, "prompt")
        return Row("completion", prompt=prompt, completion=_text(fields, "completion"))
    if row_format == "code":
        return _code(fields)
    if row_format == "rag":
        return _rag(fields)
    return Row("text", text=_text(fields, "text"))


def normalised(text: str) -> str:
    """A text's words in lower case with single spaces: equal for texts that differ in case, space or punctuation."""
    return " ".join(re.findall(r"\w+", text.casefold())) or text.strip()


def _text(fields: Mapping[str, Any], name: str, path: str = "") -> str:
    path = path or name
    if name not in fields:
        raise BadRow(path, "the field is missing", f"give every row a {name!r}, or name its column in `columns`")
    value = fields[name]
    if value is None:
        raise BadRow(path, "the field is null", "give it a text, or leave the row out")
    if not isinstance(value, str):
        raise BadRow(path, f"the field is {_kind(value)}, not text", "write it as one string")
    if not value.strip():
        raise BadRow(path, "the text is empty", "give it a text, or leave the row out")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise BadRow(
                path, f"character {error.start + 1} is half of a surrogate pair", "write the character itself, in UTF-8"
            ) from None
    return value


def _code(fields: Mapping[str, Any]) -> Row:
    about = {
        name: _text(fields, name) if fields.get(name) else None
        for name in ("path", "language", "license", "repository")
    }
    return Row(
        "code",
        text=_text(fields, "text"),
        path=about["path"] or "",
        language=about["language"],
        license=about["license"],
        repository=about["repository"] or "",
    )


def _rag(fields: Mapping[str, Any]) -> Row:
    """Documents are given as `oracle` and `distractors`, or as `documents` in which the oracles are marked."""
    question, answer = _text(fields, "question"), _text(fields, "answer")
    oracles = _texts(fields, "oracle") if fields.get("oracle") else []
    distractors = _texts(fields, "distractors") if fields.get("distractors") else []
    if fields.get("documents") is not None:
        if oracles or distractors:
            raise BadRow("documents", "the row has documents twice", "keep documents, or oracle and distractors")
        for index, document in enumerate(_list(fields, "documents")):
            path = f"documents[{index}]"
            if not isinstance(document, dict):
                raise BadRow(path, f"the document is {_kind(document)}, not an object", 'write {"text": …}')
            if not isinstance(document.get("oracle") or False, bool):
                raise BadRow(f"{path}.oracle", "the mark is not a boolean", "write true for what holds the answer")
            own = oracles if document.get("oracle") else distractors
            own.append(_text(document, "text", f"{path}.text"))
    if not oracles and not distractors:
        raise BadRow("documents", "the row has no document", "give it oracle and distractors, or documents")
    return Row("rag", question=question, oracles=oracles, distractors=distractors, answer=answer)


def _texts(fields: Mapping[str, Any], name: str) -> list[str]:
    """One text, or a list of them."""
    values = fields[name]
    if isinstance(values, str):
        try:
            values = json.loads(values)  # a CSV cell holds a list so
        except ValueError:
            values = None
        if not isinstance(values, list):
            return [_text(fields, name)]
    values = _list({name: values}, name)
    return [_text({name: value}, name, f"{name}[{index}]") for index, value in enumerate(values)]


def _chat(fields: Mapping[str, Any]) -> Row:
    given = _list(fields, "messages")
    messages: list[Message] = []
    weights: list[float] = []
    for index, message in enumerate(given):
        path = f"messages[{index}]"
        if not isinstance(message, dict):
            raise BadRow(path, f"the message is {_kind(message)}, not an object", 'write {"role": …, "content": …}')
        messages.append(_message(message, path))
        weights.append(_weight(message, messages[-1]["role"], path))
        _check_order(messages, path)
    if messages[-1]["role"] != "assistant":
        raise BadRow(
            f"messages[{len(messages) - 1}].role",
            f"the last message is from {messages[-1]['role']}, so there is no answer to learn",
            "end every conversation with an assistant message",
        )
    tools = None
    if fields.get("tools") is not None:
        tools = _list(fields, "tools")
        for index, tool in enumerate(tools):
            if not isinstance(tool, dict):
                raise BadRow(f"tools[{index}]", f"the tool is {_kind(tool)}, not an object", "write a JSON schema")
    return Row("chat", messages=messages, weights=weights, tools=tools)


def _list(fields: Mapping[str, Any], name: str) -> list[Any]:
    """A non-empty list; also as JSON text, since a CSV cell and many Parquet files hold it so."""
    if name not in fields:
        raise BadRow(name, "the field is missing", f"give every row a {name!r}, or name its column in `columns`")
    value = fields[name]
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise BadRow(name, "the field is text that is not JSON", "write a list of objects") from None
    if not isinstance(value, list):
        raise BadRow(name, f"the field is {_kind(value)}, not a list", "write a list of objects")
    if not value:
        raise BadRow(name, "the list is empty", "fill it, or leave the row out")
    return value


def _message(given: Mapping[str, Any], path: str) -> Message:
    message = {key: value for key, value in given.items() if value is not None and key != "weight"}
    role = given.get("role")
    if role not in _ROLES:
        said = "the field is missing" if role is None else "the role is not known"
        raise BadRow(f"{path}.role", said, f"use one of {', '.join(_ROLES)}")
    calls = message.get("tool_calls")
    if calls:
        if role != "assistant":
            raise BadRow(f"{path}.tool_calls", f"a {role} message has tool calls", "only the assistant calls tools")
        message["tool_calls"] = _tool_calls(calls, f"{path}.tool_calls")
        message["content"] = _text(given, "content", f"{path}.content") if given.get("content") else ""
    else:
        message.pop("tool_calls", None)
        message["content"] = _text(given, "content", f"{path}.content")
    return message


def _tool_calls(calls: object, path: str) -> list[dict[str, Any]]:
    """Calls with their arguments as an object, which is what chat templates expect."""
    if not isinstance(calls, list):
        raise BadRow(path, f"the field is {_kind(calls)}, not a list", "write a list of calls")
    checked = []
    for index, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRow(
                f"{path}[{index}].function", "the call names no function", 'write {"name": …, "arguments": {…}}'
            )
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except ValueError:
                arguments = None
        if not isinstance(arguments, dict):
            raise BadRow(f"{path}[{index}].function.arguments", "the arguments are not a JSON object", "write {…}")
        checked.append({**call, "function": {**function, "arguments": arguments}})
    return checked


def _weight(message: Mapping[str, Any], role: str, path: str) -> float:
    weight = message.get("weight")
    if weight is None:
        return 1.0
    if role != "assistant":
        raise BadRow(f"{path}.weight", f"a {role} message has a weight", "only assistant messages are learned")
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight <= 1:
        raise BadRow(f"{path}.weight", "the weight is not a number from 0 to 1", "use 0 to leave an answer out")
    return float(weight)


def _check_order(messages: Sequence[Message], path: str) -> None:
    """The role of the last message may follow those before it."""
    role = messages[-1]["role"]
    before = messages[-2] if len(messages) > 1 else None
    if role == "system":
        allowed = before is None
    elif role == "user":
        allowed = (
            before is None
            or before["role"] == "system"
            or (before["role"] == "assistant" and "tool_calls" not in before)
        )
    elif role == "assistant":
        allowed = before is not None and before["role"] in ("user", "tool")
    else:
        allowed = before is not None and (before["role"] == "tool" or "tool_calls" in before)
    if not allowed:
        after = f"after {before['role']}" if before else "at the start"
        raise BadRow(
            f"{path}.role",
            f"a {role} message may not stand {after}",
            "system comes first, then user and assistant in turn; tool results follow the assistant's calls",
        )


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else f"a {type(value).__name__}")
