"""Checks one row of data and brings it into the form of its format, such as chat, completion or preference.

Pure: fields in, a `Row` or the row's problems out. No message carries the row's own text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, get_args

from finetune_api.job import ColumnField
from finetune_trainer.prepare.fields import (
    BadRow,
    Message,
    conversation,
    kind_of,
    list_of,
    named_messages,
    text_of,
    tools_of,
)

RowFormat = Literal["chat", "completion", "text", "code", "rag", "preference"]
FORMATS: Final[tuple[RowFormat, ...]] = get_args(RowFormat)
COLUMNS: Final[tuple[str, ...]] = get_args(ColumnField)
# A format is recognised by any of its fields. Code has to be named: its rows look like text.
FIELDS: Final[dict[RowFormat, tuple[str, ...]]] = {
    "chat": ("messages",),
    "completion": ("prompt", "completion"),
    "text": ("text",),
    "rag": ("oracle", "distractors"),
    "preference": ("chosen", "rejected"),
}


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
    halves: tuple[Row, ...] = ()  # of a preference: the chosen and the rejected answer, each behind the same prompt

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
        if self.format == "preference":
            return [text for half in self.halves for text in half.said()]
        return [self.prompt, self.completion] if self.format == "completion" else [self.text]

    def asked(self) -> list[str]:
        """What a user says in it."""
        if self.format == "chat":
            return [message["content"] for message in self.messages if message["role"] == "user"]
        if self.format == "rag":
            return [self.question]
        if self.format == "preference":
            return self.halves[0].asked()
        return [self.prompt if self.format == "completion" else self.text]


def detect(fields: Mapping[str, Any]) -> RowFormat:
    """The one format whose fields the row has.

    Raises:
        BadRow: it has the fields of no format, or of more than one.
    """
    present = {name for name, value in fields.items() if value is not None}
    own_fields = FIELDS
    if present.intersection(FIELDS["preference"]):
        own_fields = FIELDS | {"completion": ("completion",)}  # a pair has a prompt, too
    matches = [name for name, own in own_fields.items() if present.intersection(own)]
    if len(matches) == 1:
        return matches[0]
    if matches:
        names = [own for name in matches for own in FIELDS[name] if own in present]
        raise BadRow(
            ", ".join(names),
            f"the row matches two formats, {matches[0]} and {matches[1]}",
            f"set the source's format, such as `format: {matches[0]}`, or remove the fields of the other",
        )
    for name in (name for own in FIELDS.values() for name in own if name in fields):
        raise BadRow(name, "the field is null", "give it a value, or leave the row out")
    raise BadRow(
        "",
        "the row has none of the fields messages, prompt and completion, text, chosen and rejected, or oracle and "
        "distractors",
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
        prompt = text_of(fields, "prompt")
        return Row("completion", prompt=prompt, completion=text_of(fields, "completion"))
    if row_format == "code":
        return _code(fields)
    if row_format == "rag":
        return _rag(fields)
    if row_format == "preference":
        return _preference(fields)
    return Row("text", text=text_of(fields, "text"))


def normalised(text: str) -> str:
    """A text's words in lower case with single spaces: equal for texts that differ in case, space or punctuation."""
    return " ".join(re.findall(r"\w+", text.casefold())) or text.strip()


def _code(fields: Mapping[str, Any]) -> Row:
    about = {
        name: text_of(fields, name) if fields.get(name) else None
        for name in ("path", "language", "license", "repository")
    }
    return Row(
        "code",
        text=text_of(fields, "text"),
        path=about["path"] or "",
        language=about["language"],
        license=about["license"],
        repository=about["repository"] or "",
    )


def _rag(fields: Mapping[str, Any]) -> Row:
    """Documents are given as `oracle` and `distractors`, or as `documents` in which the oracles are marked."""
    question, answer = text_of(fields, "question"), text_of(fields, "answer")
    oracles = _texts(fields, "oracle") if fields.get("oracle") else []
    distractors = _texts(fields, "distractors") if fields.get("distractors") else []
    if fields.get("documents") is not None:
        if oracles or distractors:
            raise BadRow("documents", "the row has documents twice", "keep documents, or oracle and distractors")
        for index, document in enumerate(list_of(fields, "documents")):
            path = f"documents[{index}]"
            if not isinstance(document, dict):
                raise BadRow(path, f"the document is {kind_of(document)}, not an object", 'write {"text": …}')
            if not isinstance(document.get("oracle") or False, bool):
                raise BadRow(f"{path}.oracle", "the mark is not a boolean", "write true for what holds the answer")
            own = oracles if document.get("oracle") else distractors
            own.append(text_of(document, "text", f"{path}.text"))
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
            return [text_of(fields, name)]
    values = list_of({name: values}, name)
    return [text_of({name: value}, name, f"{name}[{index}]") for index, value in enumerate(values)]


def _chat(fields: Mapping[str, Any]) -> Row:
    messages, weights = conversation(named_messages(fields, "messages"))
    return Row("chat", messages=messages, weights=weights, tools=tools_of(fields))


def _preference(fields: Mapping[str, Any]) -> Row:
    """A prompt with a better and a worse answer, as texts or as messages. Without `prompt` both begin with it."""
    texts = not any(isinstance(fields.get(name), list) for name in FIELDS["preference"])
    chosen, rejected = _two_texts(fields) if texts else _two_conversations(fields)
    if chosen == rejected:
        raise BadRow("rejected", "chosen and rejected are the same", "leave the row out: it prefers nothing")
    return Row("preference", halves=(chosen, rejected))


def _two_texts(fields: Mapping[str, Any]) -> list[Row]:
    answers = [text_of(fields, name) for name in FIELDS["preference"]]
    if fields.get("prompt") is not None:
        return [Row("completion", prompt=text_of(fields, "prompt"), completion=answer) for answer in answers]
    pairs = enumerate(zip(*answers, strict=False))
    common = answers[0][: next((i for i, (left, right) in pairs if left != right), min(map(len, answers)))]
    words = list(re.finditer(r"\s+", common))
    begin = words[-1].start() if words else 0  # white space goes with the answer, as tokenizers have it
    if not common[:begin].strip():
        raise BadRow(
            "prompt", "the field is missing, and chosen and rejected do not begin with the same words", "give a prompt"
        )
    for name, answer in zip(FIELDS["preference"], answers, strict=True):
        text_of({name: answer[begin:]}, name)
    return [Row("completion", prompt=common[:begin], completion=answer[begin:]) for answer in answers]


def _two_conversations(fields: Mapping[str, Any]) -> list[Row]:
    prompt, answers = fields.get("prompt"), [named_messages(fields, name) for name in FIELDS["preference"]]
    asked: list[tuple[str, Any]] = []
    if isinstance(prompt, str):
        whole = any(isinstance(given[0][1], dict) and given[0][1].get("role") != "assistant" for given in answers)
        asked = [] if whole else [("prompt", {"role": "user", "content": text_of(fields, "prompt")})]
    elif prompt is not None:
        asked = named_messages(fields, "prompt")
        if all([m for _, m in given[: len(asked)]] == [m for _, m in asked] for given in answers):
            answers = [given[len(asked) :] or given for given in answers]
    for path, message in (each for given in answers for each in given):
        if isinstance(message, dict) and message.get("weight") is not None:
            raise BadRow(f"{path}.weight", "the answers of a pair have no weights", "leave it out")
    halves = [conversation(asked + given)[0] for given in answers]
    same = (i for i, (left, right) in enumerate(zip(*halves, strict=False)) if left != right)
    begin = len(asked) or next(same, min(map(len, halves)))
    for name, messages in zip(FIELDS["preference"], halves, strict=True):
        if begin == 0 or len(messages) == begin:
            raise BadRow(name, "the answer is missing, or is no answer to the other's prompt", "give both one prompt")
        if messages[begin]["role"] != "assistant":
            raise BadRow(name, "chosen and rejected differ before their answers", "give both the same prompt")
    tools = tools_of(fields)
    return [Row("chat", messages=m, weights=[float(i >= begin) for i in range(len(m))], tools=tools) for m in halves]
