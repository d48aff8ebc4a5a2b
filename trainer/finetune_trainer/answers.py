"""Asks the base and the tuned model the job's prompts and other questions, and checks what they say.

Answers are greedy and made one prompt at a time, with the weights as `from_pretrained` loads them: whoever loads the
same folder and calls `generate(do_sample=False)` reads the same text. The two models answer at the same time, each in
its own process with half of the cores.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, cast

from finetune_api.errors import ExportError
from finetune_api.job import Prompt
from finetune_api.result import Answer, Outcome, PromptResult

_POLL_SECONDS = 1.0


@dataclass(frozen=True)
class Speaker:
    """A model that answers: a folder, and for an adapter the folder of its base model."""

    folder: Path
    base: Path


@dataclass(frozen=True)
class Question:
    """What a model is asked: a user's prompt, or tokens to go on from; and the longest answer, in tokens."""

    asked: Prompt | tuple[int, ...]
    most: int


@dataclass(frozen=True)
class Said:
    """A greedy answer, before it is checked."""

    text: str
    tokens: int
    complete: bool
    seconds: float


def ask(
    base: Speaker,
    tuned: Speaker,
    questions: Sequence[Question],
    *,
    stop_tokens: Sequence[int],
    gpu: bool = False,
    waiting: Callable[[], None] = lambda: None,
) -> tuple[list[Said], list[Said]]:
    """The base model's and the tuned model's answers to each question, in order.

    Args:
        stop_tokens: token ids that end an answer, besides those in the models' own generation config.
        gpu: answer on the GPU when there is one.
        waiting: called about once a second meanwhile; what it raises ends the work.

    Raises:
        ExportError: a model does not load or answer.
    """
    if not questions:
        return [], []
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    context = get_context("spawn")  # a forked child would inherit CUDA and thread pools in an unknown state
    processes: list[BaseProcess] = []
    ends: list[Connection] = []
    try:
        for speaker in (base, tuned):
            receiving, sending = context.Pipe(duplex=False)
            arguments = (sending, speaker, list(questions), list(stop_tokens), threads, gpu)
            process: BaseProcess = context.Process(target=_answer_into, args=arguments, daemon=True)
            process.start()
            sending.close()  # now only the child holds it: when it dies, `receiving` ends
            processes.append(process)
            ends.append(receiving)
        of_base, of_tuned = (_receive(end, waiting) for end in ends)
    finally:
        for process in processes:
            process.terminate()
            process.join()
    return of_base, of_tuned


def compared(prompts: Sequence[Prompt], of_base: Sequence[Said], of_tuned: Sequence[Said]) -> list[PromptResult]:
    """The prompts with both models' answers, checked."""
    return [
        PromptResult(
            prompt=prompt.prompt,
            system=prompt.system,
            topic=prompt.topic,
            held_out=prompt.held_out,
            expect=list(prompt.expect),
            reject=list(prompt.reject),
            base=_checked(prompt, first),
            tuned=_checked(prompt, second),
        )
        for prompt, first, second in zip(prompts, of_base, of_tuned, strict=True)
    ]


def answer(
    speaker: Speaker, questions: Sequence[Question], stop_tokens: Sequence[int], *, gpu: bool = False
) -> list[Said]:
    """One model's answers, in this process."""
    import torch
    from transformers import AutoTokenizer

    from finetune_trainer.export import load

    device = torch.device("cuda" if gpu and torch.cuda.is_available() else "cpu")
    model = load(speaker.folder, speaker.base).to(device)
    tokenizer = AutoTokenizer.from_pretrained(speaker.folder, local_files_only=True)
    known = model.generation_config.eos_token_id
    ends = {*stop_tokens, *(known if isinstance(known, list) else [known] if known is not None else [])}
    return [_say(model, tokenizer, question, sorted(ends), device) for question in questions]


def _answer_into(
    sending: Connection,
    speaker: Speaker,
    questions: list[Question],
    stop_tokens: list[int],
    threads: int,
    gpu: bool,
) -> None:
    """Main function of an answering process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    torch.set_num_threads(threads)
    try:
        sending.send(answer(speaker, questions, stop_tokens, gpu=gpu))
    except Exception as error:
        sending.send(f"{type(error).__name__}: {error}".splitlines()[0])


def _receive(end: Connection, waiting: Callable[[], None]) -> list[Said]:
    while not end.poll(_POLL_SECONDS):
        waiting()
    try:
        said = end.recv()
    except EOFError:
        said = "its process ended, perhaps for lack of memory"
    if isinstance(said, str):
        raise ExportError(
            f"a model did not answer the prompts: {said}",
            where="spec.evaluation.prompts",
            hint="the weights are written and checked; run the same command again for the answers",
        )
    return cast("list[Said]", said)


def check(prompt: Prompt, text: str) -> Outcome:
    """passed: the text contains one of `expect`, if there are any, and none of `reject`; upper and lower case equal."""
    if not prompt.expect and not prompt.reject:
        return "unchecked"
    lower = text.casefold()
    expected = not prompt.expect or any(e.casefold() in lower for e in prompt.expect)
    rejected = any(r.casefold() in lower for r in prompt.reject)
    return "passed" if expected and not rejected else "failed"


def _say(model: Any, tokenizer: Any, question: Question, ends: list[int], device: Any) -> Said:
    import torch

    started = time.monotonic()
    ids = _tokens(tokenizer, question.asked).to(device)
    with torch.inference_mode():
        whole = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=question.most,
            eos_token_id=ends or None,
            pad_token_id=ends[0] if ends else 0,
        )
    new = whole[0, ids.shape[1] :].tolist()
    complete = bool(new) and new[-1] in ends
    text = tokenizer.decode(new, skip_special_tokens=True)
    return Said(text=text.strip(), tokens=len(new), complete=complete, seconds=time.monotonic() - started)


def _tokens(tokenizer: Any, prompt: Prompt | tuple[int, ...]) -> Any:
    """Token ids [1, T]: a prompt through the chat template, without one as it stands."""
    import torch

    if isinstance(prompt, tuple):
        return torch.tensor([prompt])
    if tokenizer.chat_template:
        system = [{"role": "system", "content": prompt.system}] if prompt.system else []
        inputs = tokenizer.apply_chat_template(
            [*system, {"role": "user", "content": prompt.prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
    else:
        inputs = tokenizer("\n\n".join(filter(None, (prompt.system, prompt.prompt))), return_tensors="pt")
    return inputs["input_ids"]


def _checked(prompt: Prompt, said: Said) -> Answer:
    return Answer(
        text=said.text,
        tokens=said.tokens,
        complete=said.complete,
        seconds=said.seconds,
        outcome=check(prompt, said.text),
    )
