"""Worker processes that tokenise. Results come in the order of the tasks, so output never depends on their number."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self, TypeVar

from finetune_api.errors import FinetuneError
from finetune_trainer.manifest import TokenizerFacts

if TYPE_CHECKING:
    from finetune_trainer.prepare.work import Result, Settings, Task, Worker

_AHEAD: Final = 2  # tasks waiting for each worker: enough to keep it busy, few enough to keep memory flat
Answer = TypeVar("Answer")


class Pool:
    """`workers` processes with a tokenizer each; with 0 the calling process does the work itself."""

    def __init__(self, settings: Settings, workers: int) -> None:
        self._settings = settings
        self._ahead = max(workers * _AHEAD, 1)
        self._executor: ProcessPoolExecutor | None = None
        if workers:
            # A forked child would inherit the locks of Arrow's and torch's threads, held for ever.
            spawn = multiprocessing.get_context("spawn")
            self._executor = ProcessPoolExecutor(workers, spawn, _initialise, (settings,))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the processes; what they had not done yet is not done."""
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)

    def facts(self) -> TokenizerFacts:
        """The tokenizer's facts, from a worker: the tokenizer is not loaded in this process.

        Raises:
            ModelError: the tokenizer does not load.
        """
        return self._wait(self._submit(_facts))

    def map(self, tasks: Iterable[Task]) -> Iterator[Result]:
        """Results of the tasks, in their order. When `tasks` raises, the results before it come first."""
        waiting: deque[Future[Result]] = deque()
        source = iter(tasks)
        failure: FinetuneError | None = None
        more = True
        while more or waiting:
            while more and len(waiting) < self._ahead:
                try:
                    waiting.append(self._submit(_result, next(source)))
                except StopIteration:
                    more = False
                except FinetuneError as error:
                    failure, more = error, False
            if waiting:
                yield self._wait(waiting.popleft())
        if failure is not None:
            raise failure

    def _submit(self, function: Callable[..., Answer], *arguments: object) -> Future[Answer]:
        if self._executor is not None:
            return self._executor.submit(function, *arguments)
        _State.use(self._settings)
        future: Future[Answer] = Future()
        try:
            future.set_result(function(*arguments))
        except FinetuneError as error:
            future.set_exception(error)
        return future

    @staticmethod
    def _wait(future: Future[Answer]) -> Answer:
        try:
            return future.result()
        except BrokenProcessPool:
            raise FinetuneError(
                "a process that tokenises was killed",
                where="prepare",
                hint="most often the machine ran out of memory; see the kernel's log (dmesg)",
            ) from None


class _State:
    """A process's settings, and its worker once it is asked for."""

    settings: Settings | None = None
    worker: Worker | None = None

    @classmethod
    def use(cls, settings: Settings) -> None:
        if cls.settings is not settings:
            cls.settings, cls.worker = settings, None

    @classmethod
    def get(cls) -> Worker:
        from finetune_trainer.prepare.work import Worker

        assert cls.settings is not None
        if cls.worker is None:
            cls.worker = Worker(cls.settings)
        return cls.worker


def _facts() -> TokenizerFacts:
    return _State.get().facts()


def _result(task: Task) -> Result:
    return _State.get()(task)


def _initialise(settings: Settings) -> None:
    """Runs first in each worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers
    lighten()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _State.use(settings)


def lighten() -> None:
    """Lets a process that only tokenises do without torch and without threads of its own."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # processes share the cores already
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"  # it would remark that there is no torch
    if not {"transformers", "torch"} & sys.modules.keys():
        # It loads torch if it finds it, which costs each process 5 s and 650 MiB; a tokenizer needs none.
        sys.modules["torch"] = None  # type: ignore[assignment]


def _end_with_parent() -> None:
    """A killed parent must not leave workers that wait for tasks for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
