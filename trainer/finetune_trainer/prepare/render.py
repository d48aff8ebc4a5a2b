"""Turns a checked row into text and the spans of it that the model must say, then into tokens and loss weights.

The text of a chat is what the model's own template makes of the whole conversation, tokenised in one go, so that a
model in training sees the very tokens it sees in use. Which characters are learned is found without the template's
help: an answer starts where the prompt before it ends (the template's output for the messages before the answer, with
the generation prompt, must be a prefix of the whole) and ends with the token that ends the turn. A template that marks
answers itself, with `{% generation %}`, is taken at its word.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from jinja2 import TemplateError

from finetune_api.errors import ModelError
from finetune_trainer.prepare.fields import BadRow, Message
from finetune_trainer.prepare.rows import Row
from finetune_trainer.tokenizer import end_of_turn, special_tokens

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int, float]  # first character, one past the last, weight


@dataclass(frozen=True)
class Rendered:
    """Text, the spans of it that are learned, and whether the begin and end tokens are put around it.

    `ends` is false for the beginning of a longer text, which gets no end token.
    """

    text: str
    spans: list[Span]
    framed: bool = False
    ends: bool = True


class Renderer:
    """Renders rows for one tokenizer; `loss` is the spec's data.loss.

    Raises:
        ModelError: the tokenizer has no token that ends an answer or a text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, loss: str) -> None:
        self._tokenizer = tokenizer
        self._loss = loss
        special = special_tokens(tokenizer)
        self._control = re.compile("|".join(re.escape(text) for text in special.values()) or r"(?!)")
        self._ends = [special[token] for token in end_of_turn(tokenizer) if token in special]
        self._learned_end = [*self._ends, tokenizer.eos_token] if tokenizer.eos_token else self._ends
        first = tokenizer("a")["input_ids"][:1]
        self._begin = first if first == [tokenizer.bos_token_id] else []
        self._end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        if tokenizer.chat_template is not None and not self._ends:
            raise ModelError(
                "the chat template puts no control token behind an answer, so the model could not learn to stop",
                where=f"{tokenizer.name_or_path}: chat template",
                hint="add the end-of-turn or end-of-text token behind assistant messages in the template",
            )

    def render(self, row: Row) -> Rendered:
        """Text and learned spans of one row.

        Raises:
            BadRow: the row holds a control token, or the template refuses it or does not show where its answers are.
            ModelError: chat rows without a chat template, or texts without an end-of-text token.
        """
        if row.format == "text":
            self.needs_end()
            return Rendered(row.text, [(0, len(row.text), 1.0)], framed=True)
        if row.format == "chat":
            return self._chat(row.messages, row.weights, row.tools)
        self._refuse_control_tokens([("prompt", row.prompt), ("completion", row.completion)])
        if self._tokenizer.chat_template is not None:
            turns = [{"role": "user", "content": row.prompt}, {"role": "assistant", "content": row.completion}]
            return self._chat(turns, [1.0, 1.0], None)
        self.needs_end()
        start = 0 if self._loss == "all" else len(row.prompt)
        text = row.prompt + row.completion
        return Rendered(text, [(start, len(text), 1.0)], framed=True)

    def tokens(self, rendered: Sequence[Rendered]) -> list[tuple[npt.NDArray[np.int32], npt.NDArray[np.float16]]]:
        """Ids and loss weights of each text; the first token's weight is always 0."""
        encodings = self._tokenizer.backend_tokenizer.encode_batch(
            [item.text for item in rendered], add_special_tokens=False
        )
        return [self._weighted(item, encoding) for item, encoding in zip(rendered, encodings, strict=True)]

    def _weighted(self, item: Rendered, encoding: Encoding) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float16]]:
        ids = np.array(encoding.ids, dtype=np.int32)
        weights = np.zeros(len(ids), dtype=np.float16)
        for start, end, weight in item.spans:
            weights[_token_at(encoding, start) : _token_at(encoding, end)] = weight
        if item.framed:
            behind = self._end if item.ends else []
            ids = np.concatenate([self._begin, ids, behind]).astype(np.int32)
            weights = np.concatenate([[0] * len(self._begin), weights, [1] * len(behind)]).astype(np.float16)
        weights[:1] = 0
        return ids, weights

    def needs_end(self) -> None:
        """Stops at a tokenizer without an end-of-text token.

        Raises:
            ModelError: it has none.
        """
        if not self._end:
            raise ModelError(
                "the tokenizer names no end-of-text token, so the model could not learn to stop",
                where=str(self._tokenizer.name_or_path),
                hint="set eos_token in tokenizer_config.json",
            )

    def _refuse_control_tokens(self, texts: Sequence[tuple[str, str]]) -> None:
        """A control token in a row's text would end a turn, or begin one, in the middle of it."""
        for field, text in texts:
            found = self._control.search(text)
            if found:
                raise BadRow(
                    field,
                    f"character {found.start() + 1} begins the model's control token {found.group()}",
                    "remove it; the chat template adds what is needed",
                )

    def _chat(self, messages: list[Message], weights: list[float], tools: list[dict[str, Any]] | None) -> Rendered:
        if self._tokenizer.chat_template is None:
            raise ModelError(
                "the rows are chats and the model has no chat template",
                where=str(self._tokenizer.name_or_path),
                hint="use the instruct version of the model, or put a chat_template.jinja into its folder",
            )
        self._refuse_control_tokens([(f"messages[{i}].content", m["content"]) for i, m in enumerate(messages)])
        template = self._tokenizer.get_chat_template(tools=tools)
        marked = re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None
        try:
            if self._loss == "all":
                return self._everything(messages, weights, tools)
            learned = {i: weights[i] for i, message in enumerate(messages) if message["role"] == "assistant"}
            if self._loss == "last-turn":
                learned = dict.fromkeys(learned, 0.0) | {len(messages) - 1: weights[-1]}
            if marked:
                return self._marked(template, messages, tools, learned)
            text = self._template(messages, tools)
            spans = [self._answer(text, messages, tools, i) for i, weight in learned.items() if weight]
        except TemplateError as error:
            # The template's own words (raise_exception) say which role or order it does not take.
            raise BadRow("messages", f"the chat template refuses the row: {error}") from None
        return Rendered(text, [(start, end, learned[i]) for start, end, i in spans])

    def _everything(
        self, messages: list[Message], weights: list[float], tools: list[dict[str, Any]] | None
    ) -> Rendered:
        """The whole text; answers with a weight of their own have that."""
        text = self._template(messages, tools)
        own = [i for i, message in enumerate(messages) if message["role"] == "assistant" and weights[i] != 1]
        answers = [self._answer(text, messages, tools, i) for i in own]
        return Rendered(text, [(0, len(text), 1.0), *((start, end, weights[i]) for start, end, i in answers)])

    def _template(self, messages: list[Message], tools: list[dict[str, Any]] | None, prompt: bool = False) -> str:
        text: str = self._tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=prompt
        )
        return text

    def _answer(
        self, text: str, messages: list[Message], tools: list[dict[str, Any]] | None, index: int
    ) -> tuple[int, int, int]:
        """First and last character of message `index` in the whole text, its end-of-turn token included."""
        before = self._template(messages[:index], tools, prompt=True)
        if not text.startswith(before):
            raise BadRow(
                f"messages[{index}]",
                "the chat template writes the turns before this answer differently once the answer is there",
                "mark answers with {% generation %} in the template, or set data.loss to last-turn or all",
            )
        start, end = len(before), len(text)
        if index < len(messages) - 1:
            through = self._template(messages[: index + 1], tools)
            end = len(through) if text.startswith(through) else self._after_end(text, start)
        spoken = text[start:end].rstrip()
        if spoken.endswith(tuple(self._learned_end)):
            end = start + len(spoken)  # a template's line break behind the token is never generated
        return start, end, index

    def _after_end(self, text: str, start: int) -> int:
        """Where the turn that begins at `start` is over: for templates that write the last answer unlike others."""
        ends = [text.find(token, start) + len(token) for token in self._ends if text.find(token, start) >= 0]
        return min(ends, default=len(text))

    def _marked(
        self, template: str, messages: list[Message], tools: list[dict[str, Any]] | None, learned: dict[int, float]
    ) -> Rendered:
        """Spans that the template itself marks, one for each assistant message."""
        from transformers.utils.chat_template_utils import render_jinja_template

        texts, marks = render_jinja_template(
            [messages],
            tools=tools,
            chat_template=template,
            return_assistant_tokens_mask=True,
            **self._tokenizer.special_tokens_map,
        )
        text: str = texts[0]
        if len(marks[0]) != len(learned):
            raise BadRow(
                "messages",
                f"the chat template marks {len(marks[0])} answers and the row has {len(learned)}",
                "put each assistant message between {% generation %} and {% endgeneration %} in the template",
            )
        spans = []
        for (start, end), weight in zip(marks[0], learned.values(), strict=True):
            if not text[start:end].rstrip().endswith(tuple(self._learned_end)):
                found = next((token for token in self._learned_end if text[end:].startswith(token)), "")
                end += len(found)
            spans.append((start, end, weight))
        return Rendered(text, [span for span in spans if span[2]])


def _token_at(encoding: Encoding, character: int) -> int:
    """Number of the first token that covers `character` or stands behind it."""
    token = encoding.char_to_token(character)
    if token is not None:
        return int(token)
    # No token covers it (dropped white space, or the end of the text): look at where each token ends.
    ends = np.array([end for _, end in encoding.offsets], dtype=np.int64)
    behind = np.flatnonzero(ends > character)
    return int(behind[0]) if len(behind) else len(ends)
