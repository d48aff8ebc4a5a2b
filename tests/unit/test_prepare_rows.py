"""What counts as a row, and of which format it is. Rows that are refused stand in test_prepare_bad_input."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_trainer.prepare.fields import BadRow
from finetune_trainer.prepare.rows import FIELDS, RowFormat, check_row, detect, normalised

USER = {"role": "user", "content": "Hello"}
ASSISTANT = {"role": "assistant", "content": "Hi"}
CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"messages": [USER, ASSISTANT], "tools": []}, "chat"),
        ({"prompt": "a", "completion": "b"}, "completion"),
        ({"text": "a", "id": 7, "source": "web"}, "text"),
        ({"text": "a", "messages": None}, "text"),
        ({"chosen": "a", "rejected": "b"}, "preference"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference"),
    ],
)
def test_a_format_is_recognised_by_its_fields(fields: dict[str, Any], expected: str) -> None:
    assert detect(fields) == expected


@pytest.mark.parametrize("left", FIELDS)
@pytest.mark.parametrize("right", FIELDS)
def test_a_row_that_matches_two_formats_is_refused(left: RowFormat, right: RowFormat) -> None:
    fields = dict.fromkeys((*FIELDS[left], *FIELDS[right]), "x")
    if left == right:
        assert detect(fields) == left
    else:
        with pytest.raises(BadRow, match="matches two formats"):
            detect(fields)


def test_a_conversation_with_system_and_tools_is_a_row() -> None:
    messages = [
        {"role": "system", "content": "Be kind."},
        USER,
        {"role": "assistant", "content": None, "tool_calls": [CALL, CALL], "weight": 0.5},
        {"role": "tool", "content": "1", "tool_call_id": "1"},
        {"role": "tool", "content": "2", "tool_call_id": "1"},
        ASSISTANT,
        USER,
        ASSISTANT,
    ]
    row = check_row({"messages": messages, "tools": [{"type": "function"}]}, "chat")
    assert row.weights == [1, 1, 0.5, 1, 1, 1, 1, 1]
    assert row.messages[2]["content"] == ""
    assert row.messages[2]["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    assert row.messages[3]["tool_call_id"] == "1"
    assert row.asked() == ["Hello", "Hello"]
    assert "Be kind." not in row.said()


def test_messages_may_be_json_text_as_in_a_csv_cell() -> None:
    row = check_row({"messages": '[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]'}, "chat")
    assert row.said() == ["a", "b"]


def test_prompts_are_equal_but_for_case_space_and_punctuation() -> None:
    assert normalised("What's  your\nNAME?") == normalised("what's your name")
    assert normalised("What's your name?") != normalised("What is your name?")
    assert normalised("?!") != normalised("!?")
