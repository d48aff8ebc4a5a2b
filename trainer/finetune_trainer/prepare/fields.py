"""Checks the fields of a row: texts, lists, and the messages of a conversation.

Pure: fields in, checked values or the row's first problem out. No message carries the row's own text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

Message = dict[str, Any]

_MOST_WEIGHT: Final = 100  # of a message, to an ordinary one's 1
_ROLES: Final = ("system", "user", "assistant", "tool")


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


def text_of(fields: Mapping[str, Any], name: str, path: str = "") -> str:
    """A text that is not empty; `path` says in errors where it stands."""
    path = path or name
    if name not in fields:
        raise BadRow(path, "the field is missing", f"give every row a {name!r}, or name its column in `columns`")
    value = fields[name]
    if value is None:
        raise BadRow(path, "the field is null", "give it a text, or leave the row out")
    if not isinstance(value, str):
        raise BadRow(path, f"the field is {kind_of(value)}, not text", "write it as one string")
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


def list_of(fields: Mapping[str, Any], name: str) -> list[Any]:
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
        raise BadRow(name, f"the field is {kind_of(value)}, not a list", "write a list of objects")
    if not value:
        raise BadRow(name, "the list is empty", "fill it, or leave the row out")
    return value


def named_messages(fields: Mapping[str, Any], name: str) -> list[tuple[str, Any]]:
    """The messages of a field, each with its place."""
    return [(f"{name}[{index}]", message) for index, message in enumerate(list_of(fields, name))]


def conversation(given: Sequence[tuple[str, Any]]) -> tuple[list[Message], list[float]]:
    """Checked messages, and their weights, from messages with their places."""
    messages: list[Message] = []
    weights: list[float] = []
    for path, message in given:
        if not isinstance(message, dict):
            raise BadRow(path, f"the message is {kind_of(message)}, not an object", 'write {"role": …, "content": …}')
        messages.append(_message(message, path))
        weights.append(_weight(message, messages[-1]["role"], path))
        _check_order(messages, path)
    if messages[-1]["role"] != "assistant":
        raise BadRow(
            f"{given[-1][0]}.role",
            f"the last message is from {messages[-1]['role']}, so there is no answer to learn",
            "end every conversation with an assistant message",
        )
    return messages, weights


def tools_of(fields: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    if fields.get("tools") is None:
        return None
    tools = list_of(fields, "tools")
    for index, tool in enumerate(tools):
        if not isinstance(tool, dict):
            raise BadRow(f"tools[{index}]", f"the tool is {kind_of(tool)}, not an object", "write a JSON schema")
    return tools


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
        message["content"] = text_of(given, "content", f"{path}.content") if given.get("content") else ""
    else:
        message.pop("tool_calls", None)
        message["content"] = text_of(given, "content", f"{path}.content")
    return message


def _tool_calls(calls: object, path: str) -> list[dict[str, Any]]:
    """Calls with their arguments as an object, which is what chat templates expect."""
    if not isinstance(calls, list):
        raise BadRow(path, f"the field is {kind_of(calls)}, not a list", "write a list of calls")
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
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight <= _MOST_WEIGHT:
        raise BadRow(
            f"{path}.weight",
            f"the weight is not a number from 0 to {_MOST_WEIGHT}",
            "use 1 for an ordinary answer, 0 to leave one out",
        )
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


def kind_of(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else f"a {type(value).__name__}")
