"""Asks the base and the tuned model the job's prompts and other questions, and checks what they say.

The two models answer at the same time, each in its own process with half of the cores.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import cast

from finetune_api.errors import ExportError
from finetune_api.job_evaluation import Prompt
from finetune_api.result import Answer, Outcome, PromptResult
from finetune_trainer.speaking import Said, Speaker, Task, Told, tell

_POLL_SECONDS = 1.0


def ask(
    base: tuple[Speaker, Task],
    tuned: tuple[Speaker, Task],
    *,
    stop_tokens: Sequence[int],
    gpu: bool = False,
    waiting: Callable[[], None] = lambda: None,
) -> tuple[Told, Told]:
    """What the base model and the tuned model make of their tasks.

    Args:
        stop_tokens: token ids that end an answer, besides those in the models' own generation config.
        gpu: answer on the GPU when there is one.
        waiting: called about once a second meanwhile; what it raises ends the work.

    Raises:
        ExportError: a model does not load or answer.
    """
    if not any((*task.questions, *task.passages) for _, task in (base, tuned)):
        return Told([], []), Told([], [])
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    context = get_context("spawn")  # a forked child would inherit CUDA and thread pools in an unknown state
    processes: list[BaseProcess] = []
    ends: list[Connection] = []
    try:
        for speaker, task in (base, tuned):
            receiving, sending = context.Pipe(duplex=False)
            arguments = (sending, speaker, task, list(stop_tokens), threads, gpu)
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


def compared(
    prompts: Sequence[Prompt],
    of_base: Sequence[Said],
    of_tuned: Sequence[Said],
    of_prompted: Sequence[Said] | None = None,
) -> list[PromptResult]:
    """The prompts with both models' answers, checked, and with those of the prompted base model, if it was asked."""
    between: Sequence[Said | None] = [None] * len(prompts) if of_prompted is None else of_prompted
    return [
        PromptResult(
            prompt=prompt.prompt,
            system=prompt.system,
            topic=prompt.topic,
            held_out=prompt.held_out,
            expect=list(prompt.expect),
            reject=list(prompt.reject),
            base=_checked(prompt, first),
            prompted=None if other is None else _checked(prompt, other),
            tuned=_checked(prompt, second),
        )
        for prompt, first, other, second in zip(prompts, of_base, between, of_tuned, strict=True)
    ]


def _answer_into(
    sending: Connection,
    speaker: Speaker,
    task: Task,
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
        sending.send(tell(speaker, task, stop_tokens, gpu=gpu))
    except Exception as error:
        sending.send(f"{type(error).__name__}: {error}".splitlines()[0])


def _receive(end: Connection, waiting: Callable[[], None]) -> Told:
    while not end.poll(_POLL_SECONDS):
        waiting()
    try:
        told = end.recv()
    except EOFError:
        told = "its process ended, perhaps for lack of memory"
    if isinstance(told, str):
        raise ExportError(
            f"a model did not answer the prompts: {told}",
            where="spec.evaluation.prompts",
            hint="the weights are written and checked; run the same command again for the answers",
        )
    return cast(Told, told)


def check(prompt: Prompt, text: str) -> Outcome:
    """passed: the text contains one of `expect`, if there are any, and none of `reject`; upper and lower case equal."""
    if not prompt.expect and not prompt.reject:
        return "unchecked"
    lower = text.casefold()
    expected = not prompt.expect or any(e.casefold() in lower for e in prompt.expect)
    rejected = any(r.casefold() in lower for r in prompt.reject)
    return "passed" if expected and not rejected else "failed"


def _checked(prompt: Prompt, said: Said) -> Answer:
    return Answer(
        text=said.text,
        prompt_tokens=said.prompt_tokens,
        tokens=said.tokens,
        complete=said.complete,
        seconds=said.seconds,
        outcome=check(prompt, said.text),
    )
