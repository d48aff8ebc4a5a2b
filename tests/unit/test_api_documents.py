"""YAML is read as kubectl reads it, with places, and hostile text ends early with a sentence."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from finetune_api.documents import MAX_VALUES, Mark, plain_scalar, read_documents


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-4", 2e-4),  # PyYAML would say text
        ("1e3", 1000.0),
        (".5", 0.5),
        ("1_000", 1000),
        ("0x1F", 31),
        ("010", 8),
        ("-0o17", -15),
        ("0b101", 5),
        ("089", 89.0),
        ("1:30", "1:30"),  # PyYAML would say 90
        ("2026-11-23", "2026-11-23"),
        ("1.2.3", "1.2.3"),
        ("-", "-"),
        ("off", False),
        ("Yes", True),
        ("~", None),
        ("12h", "12h"),
        ("99999999999999999999", 1e20),
    ],
)
def test_plain_text_is_the_value_that_kubectl_makes_of_it(text: str, value: object) -> None:
    assert plain_scalar(text) == value
    assert type(plain_scalar(text)) is type(value)


def test_every_field_knows_its_line_and_column() -> None:
    (document,), stopped = read_documents("a:\n  b: 1\n  'c d':\n    - x\n    - {e: f}\n")
    assert stopped is None
    assert document.value == {"a": {"b": 1, "c d": ["x", {"e": "f"}]}}
    assert document.marks[("a", "b")] == Mark(2, 3)
    assert document.marks[("a", "c d", 1, "e")] == Mark(5, 8)
    assert document.locate(("a", "b", "nowhere")) == Mark(2, 3)


def test_documents_before_a_syntax_error_are_kept() -> None:
    documents, stopped = read_documents("a: 1\n---\nb: [\n")
    assert [document.value for document in documents] == [{"a": 1}]
    assert stopped is not None
    assert stopped.mark.line == 4


def test_a_key_that_stands_twice_is_said_with_both_lines() -> None:
    (document,), _ = read_documents("a: 1\nb: 2\na: 3\n")
    (complaint,) = document.complaints
    assert complaint.mark == Mark(3, 1)
    assert "line 1" in complaint.message


def test_an_alias_is_the_value_of_its_anchor() -> None:
    (document,), _ = read_documents("a: &x {b: 1}\nc: *x\n")
    assert document.value == {"a": {"b": 1}, "c": {"b": 1}}


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BOMB, f"more than {MAX_VALUES} values"),
        ("a: &a [*a]", "no finished anchor"),
        ("a: *nowhere", "no finished anchor"),
        ("[" * 5000, "nested deeper"),
        ("- " * 5000, "nested deeper"),
        ("a: !!python/object/apply:os.system [true]", "tags"),
        ("a: !secret x", "tags"),
        ("{[a]: 1}", "a key must be plain text"),
        ("a: {<<: {b: 1}}", "merge keys"),
        ("a: b: c", "not YAML"),
        ("a:\n\t- b", "not YAML"),
        ("a: \x01", "control characters"),
        ("%YAML 9.9\n--- a", "not YAML"),
    ],
)
def test_text_that_is_hostile_or_broken_ends_with_a_sentence(text: str, words: str) -> None:
    _, stopped = read_documents(text)
    assert stopped is not None
    assert words in stopped.message


@pytest.mark.parametrize("number", [".inf", "-.Inf", ".nan"])
def test_a_number_that_json_lacks_is_refused(number: str) -> None:
    (document,), _ = read_documents(f"a: {number}")
    assert document.complaints[0].message == "must be a finite number"


@given(st.text(st.characters(codec="utf-8"), max_size=60) | st.text("ab:-[]{},&*!#|>'\"\n\t ~0.e", max_size=60))
@example("'")
@settings(max_examples=300, deadline=None)
def test_no_text_at_all_makes_the_reader_raise(text: str) -> None:
    documents, stopped = read_documents(text)
    assert isinstance(documents, list)
    assert stopped is None or stopped.message
