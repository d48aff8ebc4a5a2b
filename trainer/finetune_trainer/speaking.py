"""One model in this process: it answers questions greedily and reads passages.

Questions are answered one at a time with the weights as `from_pretrained` loads them, so that whoever loads the same
folder and calls `generate(do_sample=False)` reads the same text; in batches only where a question says so. Turns that
stand before several questions, as a few examples, are read once and kept as keys and values.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Final

from finetune_api.job_evaluation import Prompt

_BATCH: Final = 64  # questions
_BATCH_TOKENS: Final = 16_384  # at most, so that a batch's keys and values fit beside a large model

Turn = dict[str, str]  # role and content


@dataclass(frozen=True)
class Speaker:
    """A model that answers: a folder, and for an adapter the folder of its base model."""

    folder: Path
    base: Path


@dataclass(frozen=True)
class Question:
    """What a model is asked: a user's prompt, or tokens to go on from; and the longest answer, in tokens.

    `before` are turns that stand before the prompt. Questions that are `batched` may be answered together, which is
    several times as fast and rounds otherwise.
    """

    asked: Prompt | tuple[int, ...]
    most: int
    before: tuple[Turn, ...] = ()
    batched: bool = False


@dataclass(frozen=True)
class Passage:
    """Tokens to read, and how much predicting each of them from those before it counts.

    The first `shared` tokens, of weight 0, are the same in each passage that has such.
    """

    ids: tuple[int, ...]
    weights: tuple[float, ...]
    shared: int = 0


@dataclass(frozen=True)
class Task:
    """All that one model has to do."""

    questions: Sequence[Question]
    passages: Sequence[Passage] = ()


@dataclass(frozen=True)
class Said:
    """A greedy answer, before it is checked."""

    text: str
    prompt_tokens: int
    tokens: int
    complete: bool
    seconds: float


@dataclass(frozen=True)
class Told:
    """What a model made of its task, in the task's order; `nll` is Σ weights·nll of each passage, in nats."""

    said: list[Said]
    nll: list[float]


def tell(speaker: Speaker, task: Task, stop_tokens: Sequence[int], *, gpu: bool = False) -> Told:
    """Loads the model and does the task, in this process.

    Args:
        stop_tokens: token ids that end an answer, besides those in the model's own generation config.
        gpu: on the GPU when there is one.
    """
    import torch
    from transformers import AutoTokenizer

    from finetune_trainer.export import load

    device = torch.device("cuda" if gpu and torch.cuda.is_available() else "cpu")
    model = load(speaker.folder, speaker.base).to(device)
    tokenizer = AutoTokenizer.from_pretrained(speaker.folder, local_files_only=True)
    known = model.generation_config.eos_token_id
    ends = {*stop_tokens, *(known if isinstance(known, list) else [known] if known is not None else [])}
    mouth = _Mouth(model, tokenizer, sorted(ends))
    with torch.inference_mode():
        return Told(mouth.answers(task.questions), mouth.read(task.passages))


def prompt_ids(tokenizer: Any, prompt: Prompt, before: Sequence[Turn] = ()) -> list[int]:
    """Tokens of a prompt behind other turns: through the chat template, without one as they stand."""
    own = [{"role": "system", "content": prompt.system}] if prompt.system else []
    if own and before and before[0]["role"] == "system":
        before = before[1:]  # a prompt's own system message is the one it is tested with
    turns = [*own, *before, {"role": "user", "content": prompt.prompt}]
    if tokenizer.chat_template:
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
    else:
        ids = tokenizer(_as_text(turns))["input_ids"]
    return list(ids)


def _as_text(turns: Sequence[Turn]) -> str:
    """Turns for a model without a chat template: an answer goes on where its prompt ends, the rest stands apart."""
    text = turns[0]["content"]
    for turn in turns[1:]:
        text += ("" if turn["role"] == "assistant" else "\n\n") + turn["content"]
    return text


class _Mouth:
    """A loaded model. Not for other modules: `tell` is what they call."""

    def __init__(self, model: Any, tokenizer: Any, ends: list[int]) -> None:
        self._model, self._tokenizer, self._ends = model, tokenizer, ends

    def answers(self, questions: Sequence[Question]) -> list[Said]:
        """An answer for each question, in order."""
        found: dict[int, Said] = {}
        ids = [self._ids(question) for question in questions]
        for before, group in _grouped(range(len(questions)), lambda i: questions[i].before):
            kept = _Kept(self._model, _common([ids[i] for i in group]) if before else [])
            for (batched, most), members in _grouped(group, lambda i: (questions[i].batched, questions[i].most)):
                size = _batch_size(max(len(ids[i]) for i in members) + most) if batched else 1
                for start in range(0, len(members), size):
                    chosen = members[start : start + size]
                    said = self._say([ids[i] for i in chosen], most, kept)
                    found.update(zip(chosen, said, strict=True))
        return [found[i] for i in range(len(questions))]

    def read(self, passages: Sequence[Passage]) -> list[float]:
        """Σ weights·nll of each passage."""
        found: list[float] = []
        for shared, group in _grouped(range(len(passages)), lambda i: passages[i].shared):
            kept = _Kept(self._model, passages[group[0]].ids[:shared])
            found += [self._nll(passages[i], kept) for i in group]
        return found

    def _nll(self, passage: Passage, kept: _Kept) -> float:
        import torch

        device = self._model.device
        ids = torch.tensor(passage.ids, device=device)
        first = next(i for i, weight in enumerate(passage.weights) if weight)
        keep = len(ids) - first + 1
        cache = kept.copies(1)
        output = self._model(
            ids[None, kept.tokens :], past_key_values=cache, use_cache=cache is not None, logits_to_keep=keep
        )
        nll = torch.nn.functional.cross_entropy(output.logits[0, :-1].float(), ids[first:], reduction="none")
        return float(nll.double() @ torch.tensor(passage.weights[first:], dtype=torch.float64, device=device))

    def _ids(self, question: Question) -> list[int]:
        if isinstance(question.asked, tuple):
            return list(question.asked)
        return prompt_ids(self._tokenizer, question.asked, question.before)

    def _say(self, prompts: list[list[int]], most: int, kept: _Kept) -> list[Said]:
        """Answers to prompts that all begin with the tokens that are kept; shorter ones are padded behind these."""
        import torch

        started = time.monotonic()
        pad = self._ends[0] if self._ends else 0
        length, head = max(map(len, prompts)), kept.tokens
        filled = [[*p[:head], *[pad] * (length - len(p)), *p[head:]] for p in prompts]
        seen = [[*[1] * head, *[0] * (length - len(p)), *[1] * (len(p) - head)] for p in prompts]
        whole = self._model.generate(
            input_ids=torch.tensor(filled, device=self._model.device),
            attention_mask=torch.tensor(seen, device=self._model.device),
            past_key_values=kept.copies(len(prompts)),
            do_sample=False,
            max_new_tokens=most,
            eos_token_id=self._ends or None,
            pad_token_id=pad,
        )
        seconds = (time.monotonic() - started) / len(prompts)
        return [
            self._said(prompt, new, seconds) for prompt, new in zip(prompts, whole[:, length:].tolist(), strict=True)
        ]

    def _said(self, prompt: list[int], new: list[int], seconds: float) -> Said:
        end = next((i for i, token in enumerate(new) if token in self._ends), None)
        new = new if end is None else new[: end + 1]  # what a batch puts behind an end is padding
        text = self._tokenizer.decode(new, skip_special_tokens=True).strip()
        return Said(text, prompt_tokens=len(prompt), tokens=len(new), complete=end is not None, seconds=seconds)


class _Kept:
    """Keys and values of the tokens that several prompts begin with."""

    def __init__(self, model: Any, ids: Sequence[int]) -> None:
        import torch

        self.tokens = len(ids)
        self._cache = model(torch.tensor([ids], device=model.device), use_cache=True).past_key_values if ids else None

    def copies(self, count: int) -> Any:
        """For a batch of `count`, which adds its own to them; None when nothing is kept."""
        if self._cache is None:
            return None
        cache = copy.deepcopy(self._cache)
        if count > 1:
            cache.batch_repeat_interleave(count)
        return cache


def _common(prompts: Sequence[Sequence[int]]) -> Sequence[int]:
    """The tokens that all of them begin with, but never the whole of one: the last token is to be answered."""
    shortest = min(map(len, prompts)) - 1
    first = prompts[0]
    same = next((i for i in range(shortest) if any(p[i] != first[i] for p in prompts)), shortest)
    return first[:same]


def _batch_size(tokens: int) -> int:
    return max(1, min(_BATCH, _BATCH_TOKENS // tokens))


def _grouped(items: Iterable[int], key: Callable[[int], Any]) -> list[tuple[Any, list[int]]]:
    """Neighbours with the same key."""
    return [(value, list(group)) for value, group in groupby(items, key)]
