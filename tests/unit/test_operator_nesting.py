"""Values nested thousands deep are read without harm, and the rest of their text is kept."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_operator.nesting import MAX_DEPTH, depth_of, loads, prune

VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda below: st.lists(below, max_size=4) | st.dictionaries(st.text(), below, max_size=4),
)


def nested(depth: int) -> str:
    return '{"a":[' * (depth // 2) + "1" + "]}" * (depth // 2)


@pytest.mark.parametrize("depth", [2_000, 9_998])
def test_a_list_with_one_deep_object_is_read_and_the_others_are_whole(depth: int) -> None:
    text = f'{{"items":[{{"name":"\\"]}}"}},{nested(depth)},{{"name":"last"}}]}}'
    items = loads(text.encode())["items"]
    assert items[0] == {"name": '"]}'}
    assert items[2] == {"name": "last"}
    assert depth_of(items[1]) == MAX_DEPTH - 2


def test_a_deep_text_that_is_no_json_is_still_refused() -> None:
    with pytest.raises(ValueError, match="Extra data"):
        loads(nested(5_000).encode() + b", ")


@given(VALUES)
def test_ordinary_values_stay_as_they_are(value: Any) -> None:
    assert loads(json.dumps(value).encode()) == value
    assert prune(json.loads(json.dumps(value))) == value


@given(VALUES, st.integers(1, 4))
def test_pruning_bounds_the_depth_and_keeps_what_is_above(value: Any, depth: int) -> None:
    before = depth_of(value)
    assert depth_of(prune(value, depth)) == min(before, depth)
