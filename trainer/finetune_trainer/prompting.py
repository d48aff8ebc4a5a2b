"""A prompt in place of tuning: a few training rows that stand before each question, and held-out answers to score.

Rows are taken from the prepared shards. Only those of one turn can be told from their tokens, and only where the chat
template gives the very same tokens for them again: no other is used.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt
from jinja2 import TemplateError

from finetune_api.job_evaluation import Prompt
from finetune_api.run import PREPARED, RunConfig
from finetune_trainer.dataset import PackedDataset
from finetune_trainer.manifest import Split, read_manifest
from finetune_trainer.prepare.rows import normalised
from finetune_trainer.speaking import Passage, Turn, prompt_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_ANSWERS: Final = 32  # that are scored
_LOOKED_AT: Final = 1024  # documents, spread over the split
_LEAST_ROOM: Final = 512  # tokens for examples, however short the job's sequences are


@dataclass(frozen=True)
class Exchange:
    """A row of one turn: what it asks, in words and tokens, and its answer's words, tokens and their loss weights."""

    prompt: Prompt
    ids: tuple[int, ...]
    answer: str
    answer_ids: tuple[int, ...]
    weights: tuple[float, ...]


def preface(run: RunConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[Turn, ...]:
    """The turns that evaluation.promptBaseline puts before a question; none when it asks for none.

    Examples are drawn by content from the training rows of one turn: not those that ask what evaluation.prompts ask, no
    two with the same answer while there are others, and as many as fit into half of a sequence.
    """
    wanted = run.spec.evaluation.prompt_baseline
    examples: list[Exchange] = []
    if wanted.examples and run.spec.method.objective == "sft":
        rows = _drawn(exchanges(Path(run.work) / PREPARED, "train", tokenizer))
        asked = {normalised(prompt.prompt) for prompt in run.spec.evaluation.prompts}
        rows = [row for row in rows if normalised(row.prompt.prompt) not in asked]
        room = max(_LEAST_ROOM, run.spec.data.sequence_length // 2)
        examples = _chosen(rows, wanted.examples, room)
    turns: list[Turn] = []
    for row in examples:
        turns += [{"role": "user", "content": row.prompt.prompt}, {"role": "assistant", "content": row.answer}]
    system = wanted.system or next((row.prompt.system for row in examples if row.prompt.system), None)
    if system and _takes_system_messages(tokenizer):
        turns.insert(0, {"role": "system", "content": system})
    return tuple(turns)


def held_out_answers(run: RunConfig, tokenizer: PreTrainedTokenizerBase) -> list[Exchange]:
    """Up to MOST_ANSWERS rows of one turn from the evaluation split, drawn by content."""
    if run.spec.method.objective != "sft":
        return []
    return _drawn(exchanges(Path(run.work) / PREPARED, "evaluation", tokenizer))[:MOST_ANSWERS]


def plain(rows: Sequence[Exchange]) -> list[Passage]:
    """The rows as they were learned."""
    return [_passage(row.ids, row) for row in rows]


def behind(turns: Sequence[Turn], rows: Sequence[Exchange], tokenizer: PreTrainedTokenizerBase) -> list[Passage]:
    """The rows behind other turns, with the same answers' tokens to predict."""
    if not rows:
        return []
    # A row's own system message is one of the rows', and so the turns' first is: asked alone, the question follows it.
    prompts = [prompt_ids(tokenizer, _prompt(row.prompt.prompt), turns) for row in rows]
    shortest = min(map(len, prompts))
    different = (i for i in range(shortest) if len({prompt[i] for prompt in prompts}) > 1)
    shared = next(different, shortest - 1)
    return [_passage(tuple(ids), row, shared) for ids, row in zip(prompts, rows, strict=True)]


def exchanges(prepared: Path, split: Split, tokenizer: PreTrainedTokenizerBase) -> Iterator[Exchange]:
    """Rows of one turn among about a thousand documents spread over the split."""
    if not read_manifest(prepared).split(split).sequences:
        return
    read = _Reader(tokenizer)
    data = PackedDataset(prepared, split)
    step = max(1, int(data.documents.sum()) // _LOOKED_AT)
    for index in range(0, len(data), step):
        sequence = data[index]
        ends = np.cumsum(sequence.documents)
        for start, end in zip((ends - sequence.documents).tolist(), ends.tolist(), strict=True):
            row = read(sequence.input_ids[start:end], sequence.weights[start:end])
            if row:
                yield row


def _takes_system_messages(tokenizer: PreTrainedTokenizerBase) -> bool:
    try:
        prompt_ids(tokenizer, _prompt("?", "?"))
    except TemplateError:
        return False
    return True


class _Reader:
    """Finds question and answer in a document's tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._control = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._frames: list[tuple[str, ...]] = []  # what the template puts around system message and question
        if tokenizer.chat_template is not None:
            for marks in (("A-SYSTEM-MESSAGE", "A-QUESTION"), ("A-QUESTION",)):
                self._frames += self._frame(marks)

    def __call__(self, ids: npt.NDArray[np.int32], weights: npt.NDArray[np.float32]) -> Exchange | None:
        learned = np.flatnonzero(weights)
        if len(learned) < 2 or learned[0] < 2 or learned[-1] - learned[0] >= len(learned):
            return None  # all of it is learned, or several answers are
        first, stop = int(learned[0]), int(learned[-1]) + 1
        prompt = self._prompt(ids[:first].tolist())
        answer = str(self._tokenizer.decode(ids[first:stop].tolist(), skip_special_tokens=True))
        if prompt is None or not answer.strip():
            return None
        return Exchange(
            prompt=prompt,
            ids=tuple(ids[:first].tolist()),
            answer=answer,
            answer_ids=tuple(ids[first:stop].tolist()),
            weights=tuple(weights[first:stop].tolist()),
        )

    def _prompt(self, ids: list[int]) -> Prompt | None:
        if self._tokenizer.chat_template is None:
            found = [_prompt(str(self._tokenizer.decode(ids, skip_special_tokens=True)))]
        else:
            found = self._framed(str(self._tokenizer.decode(ids)))
        for prompt in found:
            said = (prompt.system or "") + prompt.prompt
            clean = prompt.prompt.strip() and not any(token in said for token in self._control)
            if clean and prompt_ids(self._tokenizer, prompt) == ids:
                return prompt
        return None

    def _framed(self, text: str) -> list[Prompt]:
        """The ways in which the template's frames fit the text."""
        found = []
        for frame in self._frames:
            inner = text.removeprefix(frame[0]).removesuffix(frame[-1])
            if len(inner) + len(frame[0]) + len(frame[-1]) != len(text):
                continue
            if len(frame) == 2:
                found.append(_prompt(inner))
            elif frame[1] in inner:
                system, _, question = inner.partition(frame[1])
                found.append(_prompt(question, system))
        return found

    def _frame(self, marks: Sequence[str]) -> list[tuple[str, ...]]:
        turns = [
            {"role": role, "content": mark} for role, mark in zip(("system", "user")[-len(marks) :], marks, strict=True)
        ]
        template: Any = self._tokenizer.apply_chat_template
        try:
            rest = str(template(turns, tokenize=False, add_generation_prompt=True))
        except TemplateError:
            return []  # it takes no system messages
        parts = []
        for mark in marks:
            before, _, rest = rest.partition(mark)
            parts.append(before)
        return [(*parts, rest)]


def _prompt(text: str, system: str | None = None) -> Prompt:
    """Not checked against the bounds of a job's prompts: rows may be longer."""
    return Prompt.model_construct(prompt=text, system=system)


def _drawn(rows: Iterator[Exchange]) -> list[Exchange]:
    """In an order that follows from what they say."""
    by_hash = {hashlib.blake2b(str((row.ids, row.answer_ids)).encode()).digest(): row for row in rows}
    return [by_hash[key] for key in sorted(by_hash)]


def _chosen(rows: Sequence[Exchange], count: int, room: int) -> list[Exchange]:
    """The first `count` that fit into `room` tokens; a second one with the same answer only for want of others."""
    given: set[str] = set()
    fresh: list[Exchange] = []
    again: list[Exchange] = []
    for row in rows:
        (again if row.answer in given else fresh).append(row)
        given.add(row.answer)
    chosen: list[Exchange] = []
    for row in [*fresh, *again]:
        size = len(row.ids) + len(row.answer_ids)
        if len(chosen) < count and size <= room:
            chosen.append(row)
            room -= size
    return chosen


def _passage(prompt: tuple[int, ...], row: Exchange, shared: int = 0) -> Passage:
    return Passage((*prompt, *row.answer_ids), (*[0.0] * len(prompt), *row.weights), shared)
