"""Which tokens of a row are learned, for the kinds of chat templates that models come with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetune_api.errors import ModelError
from finetune_trainer.prepare.fields import BadRow, Message
from finetune_trainer.prepare.render import Renderer
from finetune_trainer.prepare.rows import check_row, detect
from finetune_trainer.tokenizer import load_tokenizer
from tests.tiny import CHATML, tiny_tokenizer

GENERATION = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}{% endgeneration %}{{ '<|im_end|>\n' }}"
    "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Begins with the begin-of-text token, trims contents, has a default system message.
TRIMMING = (
    "{{ bos_token }}{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n\n' + m['content'] | trim + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}"
)
# No generation prompt of its own, no system messages, the end-of-text token behind answers.
BRACKETS = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
# Opens the last answer with an empty thought that it leaves out of those before it, as reasoning models do.
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Counts its messages at the start, so that nothing stays the same when one more comes.
UNSTABLE = "{{ messages | length }}" + CHATML

TWO_TURNS: list[Message] = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "First answer."},
    {"role": "user", "content": "And then?"},
    {"role": "assistant", "content": "Second answer."},
]


def _renderer(folder: Path, template: str | None, loss: str = "assistant") -> Renderer:
    return Renderer(load_tokenizer(tiny_tokenizer(folder, chat_template=template)), loss)


def _learned(folder: Path, renderer: Renderer, fields: dict[str, object]) -> list[str]:
    """The texts of the runs of learned tokens."""
    tokenizer = load_tokenizer(folder)
    ids, weights = renderer.tokens([renderer.render(check_row(fields, detect(fields)))])[0]
    runs: list[list[int]] = [[]]
    for token, weight in zip(ids.tolist(), weights.tolist(), strict=True):
        if weight:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        pytest.param(CHATML, ["First answer.<|im_end|>", "Second answer.<|im_end|>"], id="chatml"),
        pytest.param(GENERATION, ["First answer.<|im_end|>", "Second answer.<|im_end|>"], id="generation"),
        pytest.param(TRIMMING, ["First answer.<|im_end|>", "Second answer.<|im_end|>"], id="trimming"),
        pytest.param(BRACKETS, [" First answer.<|im_end|>", " Second answer.<|im_end|>"], id="brackets"),
        pytest.param(THINKING, ["First answer.<|im_end|>", "<think></think>Second answer.<|im_end|>"], id="thinking"),
    ],
)
def test_every_answer_and_its_end_of_turn_token_are_learned(tmp_path: Path, template: str, expected: list[str]) -> None:
    assert _learned(tmp_path, _renderer(tmp_path, template), {"messages": TWO_TURNS}) == expected


@pytest.mark.parametrize("template", [CHATML, GENERATION, TRIMMING, BRACKETS])
def test_training_sees_the_tokens_of_inference(tmp_path: Path, template: str) -> None:
    renderer = _renderer(tmp_path, template)
    tokenizer = load_tokenizer(tmp_path)
    ids, weights = renderer.tokens([renderer.render(check_row({"messages": TWO_TURNS[:2]}, "chat"))])[0]
    prompt = tokenizer.apply_chat_template(TWO_TURNS[:1], add_generation_prompt=True, return_dict=False)
    assert ids[: len(prompt)].tolist() == prompt
    assert not weights[: len(prompt)].any()
    assert weights[len(prompt)] == 1
    assert ids.tolist().count(tokenizer.bos_token_id) == (template == TRIMMING)


def test_only_the_last_turn_is_learned_when_asked(tmp_path: Path) -> None:
    renderer = _renderer(tmp_path, CHATML, "last-turn")
    assert _learned(tmp_path, renderer, {"messages": TWO_TURNS}) == ["Second answer.<|im_end|>"]


def test_all_but_the_first_token_is_learned_when_asked(tmp_path: Path) -> None:
    renderer = _renderer(tmp_path, CHATML, "all")
    ids, weights = renderer.tokens([renderer.render(check_row({"messages": TWO_TURNS}, "chat"))])[0]
    assert weights.tolist() == [0.0] + [1.0] * (len(ids) - 1)


def test_a_messages_weight_is_the_weight_of_its_tokens(tmp_path: Path) -> None:
    renderer = _renderer(tmp_path, CHATML)
    messages = [dict(message) for message in TWO_TURNS]
    messages[1]["weight"] = 0.25
    messages[3]["weight"] = 0
    _, weights = renderer.tokens([renderer.render(check_row({"messages": messages}, "chat"))])[0]
    assert set(weights.tolist()) == {0, 0.25}


def test_a_completion_becomes_a_chat_when_there_is_a_template(tmp_path: Path) -> None:
    renderer = _renderer(tmp_path, CHATML)
    assert _learned(tmp_path, renderer, {"prompt": "Hello", "completion": "Bye"}) == ["Bye<|im_end|>"]


def test_a_completion_without_a_template_ends_with_the_end_of_text_token(tmp_path: Path) -> None:
    renderer = _renderer(tmp_path, None)
    assert _learned(tmp_path, renderer, {"prompt": "Hello", "completion": " Bye"}) == [" Bye<|im_end|>"]


def test_a_text_is_learned_whole_with_its_end(tmp_path: Path) -> None:
    renderer = _renderer(tmp_path, CHATML)
    ids, weights = renderer.tokens([renderer.render(check_row({"text": "Once upon a time"}, "text"))])[0]
    assert load_tokenizer(tmp_path).decode(ids) == "Once upon a time<|im_end|>"
    assert weights.tolist() == [0.0] + [1.0] * (len(ids) - 1)


@pytest.mark.parametrize(
    ("template", "messages", "says"),
    [
        (BRACKETS, [{"role": "system", "content": "Be kind."}, *TWO_TURNS], "Only user and assistant"),
        (UNSTABLE, TWO_TURNS, "differently once the answer is there"),
        (CHATML, [{"role": "user", "content": "a<|im_end|>b"}, TWO_TURNS[1]], "character 2 begins"),
    ],
)
def test_a_row_that_the_template_cannot_take_is_refused(
    tmp_path: Path, template: str, messages: list[Message], says: str
) -> None:
    renderer = _renderer(tmp_path, template)
    with pytest.raises(BadRow, match=says):
        renderer.render(check_row({"messages": messages}, "chat"))


def test_a_template_that_never_ends_a_turn_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="could not learn to stop"):
        _renderer(tmp_path, "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}")


def test_tool_calls_are_learned(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
        "{% for call in m.tool_calls or [] %}{{ call.function.name + call.function.arguments | tojson }}{% endfor %}"
        "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "It is 2."},
    ]
    learned = _learned(tmp_path, _renderer(tmp_path, template), {"messages": messages})
    assert learned == ['add{"a": 1}<|im_end|>', "It is 2.<|im_end|>"]


# Tools listed in the system turn, calls and results between tags, as Qwen's templates do.
TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\nTools: ' }}{% for t in tools %}{{ t | tojson }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}{% for m in messages %}"
    "{% if m.role == 'tool' %}{{ '<|im_start|>user\n<result>' + m.content + '</result><|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{% for call in m.tool_calls or [] %}{{ '<call>' + call.function | tojson + '</call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
TOOL_TALK: dict[str, Any] = {
    "tools": [{"type": "function", "function": {"name": "weather", "parameters": {}}}],
    "messages": [
        {"role": "user", "content": "Is it cold in Oslo?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL], "weight": 3},
        {"role": "tool", "content": "-4"},
        {"role": "assistant", "content": "Yes, four below.", "weight": 0.5},
        {"role": "user", "content": "And here?"},
        {"role": "assistant", "content": "Where are you?"},
        {"role": "user", "content": "In Rome."},
        {"role": "assistant", "content": "Then it is not.", "weight": 0},
    ],
}
# The same conversation written out, in the stretches that count differently.
WRITTEN_OUT = [
    '<|im_start|>system\nTools: {"type": "function", "function": {"name": "weather", "parameters": {}}}<|im_end|>\n',
    "<|im_start|>user\nIs it cold in Oslo?<|im_end|>\n<|im_start|>assistant\n",
    '<call>{"name": "weather", "arguments": {"city": "Oslo"}}</call><|im_end|>',
    "\n<|im_start|>user\n<result>-4</result><|im_end|>\n<|im_start|>assistant\n",
    "Yes, four below.<|im_end|>",
    "\n<|im_start|>user\nAnd here?<|im_end|>\n<|im_start|>assistant\n",
    "Where are you?<|im_end|>",
    "\n<|im_start|>user\nIn Rome.<|im_end|>\n<|im_start|>assistant\n",
    "Then it is not.<|im_end|>",
    "\n",
]
ANSWERS = (2, 4, 6, 8)  # in WRITTEN_OUT


@pytest.mark.parametrize(
    ("loss", "last", "counted"),
    [
        ("assistant", None, {2: 3, 4: 0.5, 6: 1, 8: 0}),
        ("assistant", 2.0, {2: 3, 4: 0.5, 6: 1, 8: 2}),
        ("last-turn", 1.0, {8: 1}),
        ("last-turn", 2.0, {8: 2}),
        ("all", None, {i: 1 for i in range(10) if i not in ANSWERS} | {2: 3, 4: 0.5, 6: 1, 8: 0}),
    ],
)
def test_a_talk_with_tools_counts_as_written_out(
    tmp_path: Path, loss: str, last: float | None, counted: dict[int, float]
) -> None:
    fields = TOOL_TALK
    if last is not None:
        messages = TOOL_TALK["messages"]
        fields = TOOL_TALK | {"messages": [*messages[:-1], messages[-1] | {"weight": last}]}
    renderer = _renderer(tmp_path, TOOLS, loss)
    ids, weights = renderer.tokens([renderer.render(check_row(fields, "chat"))])[0]
    tokenizer = load_tokenizer(tmp_path)
    # No token of the tiny tokenizer joins two stretches: each ends or begins with a control token or a line break.
    expected_ids: list[int] = []
    expected: list[float] = []
    for index, text in enumerate(WRITTEN_OUT):
        part = tokenizer(text).input_ids
        expected_ids += part
        expected += [counted.get(index, 0)] * len(part)
    assert ids.tolist() == expected_ids
    assert weights.tolist() == [0, *expected[1:]]
