"""Runs the functions of `parts` on Ray: the only module of prepare that knows it.

Reading and tokenising is a pipeline of Ray Data: it streams, holds back where memory is short, uses workers as they
come and go, and keeps the order. What follows are a few hundred tasks whose arguments depend on all rows; these are
plain Ray tasks, of which only so many are under way that their arguments and answers stay small.
"""

from __future__ import annotations

import contextlib
import logging
import pickle
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Final, TypeVar

import ray
import ray.data
import ray.exceptions

from finetune_api.errors import FinetuneError
from finetune_trainer.prepare.cluster.exchange import Exchange
from finetune_trainer.prepare.cluster.parts import Bundle, Part, bundles, local_settings, tokenise
from finetune_trainer.prepare.pool import lighten
from finetune_trainer.prepare.read import Piece
from finetune_trainer.prepare.rows import RowFormat
from finetune_trainer.prepare.sources import SourceFile
from finetune_trainer.prepare.work import Settings, Worker

Answer = TypeVar("Answer")
Cut = tuple[int, SourceFile, Piece, RowFormat | None]  # a piece of the file with this number, and its rows' format

_TASK_CPUS: Final = 1.0
_READ_CPUS: Final = 0.1  # reading waits for the disk or bucket; tokenising takes the rest of a core
_AHEAD: Final = 2  # tasks under way for each core
_RETRIES: Final = 10  # of a task whose machine was lost
_POLL_SECONDS: Final = 0.5
_END_SECONDS: Final = 20.0  # that what is under way has to end, when it is not wanted any more
_BLOCK_BYTES: Final = 1 << 20  # each bundle is a block of its own, so that it is handed on at once


def spread(
    function: Callable[..., Answer], arguments: Iterable[Sequence[Any]], tick: Callable[[], None]
) -> Iterator[Answer]:
    """What the function gives for each of the arguments, in their order.

    Args:
        function: called on any machine, and again if that is lost.
        arguments: taken as workers get free.
        tick: called now and then while this waits; may raise.

    Raises:
        FinetuneError: what the function raised, or that the cluster could not do it.
    """
    remote = ray.remote(_guarded).options(num_cpus=_TASK_CPUS, max_retries=_RETRIES)
    waiting: deque[Any] = deque()
    source = iter(arguments)
    try:
        while True:
            free = max(_AHEAD * _cores(), 1) - len(waiting)
            waiting += [remote.remote(function, list(each)) for each in islice(source, free)]
            if not waiting:
                return
            while not ray.wait([waiting[0]], timeout=_POLL_SECONDS)[0]:
                tick()
            with _explained():
                answer = ray.get(waiting.popleft())
            if isinstance(answer, FinetuneError):
                raise answer
            yield answer
    finally:
        for reference in waiting:
            ray.cancel(reference)
        if waiting:
            ray.wait(list(waiting), num_returns=len(waiting), timeout=_END_SECONDS)


def tokenised(
    cuts: Sequence[Cut],
    settings: Settings,
    exchange: Exchange,
    chunks: int,
    tick: Callable[[], None],
) -> Iterator[Part]:
    """The parts that the rows become, in the order of the rows.

    Args:
        cuts: pieces of the files, in order.
        settings: the workers' settings.
        exchange: where tokens and signatures are left.
        chunks: chunks in a part.
        tick: called now and then while this waits; may raise.

    Raises:
        FinetuneError: the cluster could not do it. What is wrong with a file stands in the last of its parts.
    """
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.target_max_block_size = _BLOCK_BYTES
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it tells about every step on the console
    items = [{"cut": pickle.dumps((f"{number:06d}", *cut, chunks))} for number, cut in enumerate(cuts)]
    cores = max(1, _cores())
    rows = (
        ray.data.from_items(items, override_num_blocks=len(items))
        .flat_map(_bundles, num_cpus=_READ_CPUS, concurrency=min(cores, len(items)))
        .map_batches(
            _Tokenise,
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=cores),
            fn_constructor_args=(settings, exchange),
            num_cpus=_TASK_CPUS - _READ_CPUS,
        )
    )
    with contextlib.closing(_polled(rows.iter_rows, tick)) as found:
        for row in found:
            yield pickle.loads(row["part"])


class _Tokenise:
    """An actor with a tokenizer."""

    def __init__(self, settings: Settings, exchange: Exchange) -> None:
        lighten()
        self._there, self._exchange = settings.model, exchange
        self._settings = local_settings(settings, exchange)
        self._worker: Worker | None = None

    def __call__(self, batch: Any) -> dict[str, list[bytes]]:
        bundle: Bundle = pickle.loads(batch.column("bundle")[0].as_buffer())
        try:
            self._worker = self._worker or Worker(self._settings)
            part = tokenise(self._worker, bundle, self._exchange)
        except FinetuneError as error:
            part = Part(bundle.name, [], error)
        if part.error is not None:
            # The driver knows the model's folder, and not where its tokenizer was unpacked here.
            part.error.where = part.error.where.replace(str(self._settings.model), str(self._there))
        return {"part": [pickle.dumps(part)]}


def _bundles(row: Mapping[str, Any]) -> Iterator[dict[str, bytes]]:
    for bundle in bundles(*pickle.loads(row["cut"])):
        yield {"bundle": pickle.dumps(bundle)}


def _guarded(function: Callable[..., Answer], arguments: Sequence[Any]) -> Answer | FinetuneError:
    lighten()
    try:
        return function(*arguments)
    except FinetuneError as error:  # raised through Ray, it would come with the traceback in its words
        return error


def _polled(start: Callable[[], Iterable[Any]], tick: Callable[[], None]) -> Generator[Any, None, None]:
    """Items as they come from a thread of their own; `tick` is called while there are none."""
    found: queue.Queue[tuple[bool, Any]] = queue.Queue(maxsize=2)
    stopped = threading.Event()

    def put(item: tuple[bool, Any]) -> None:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                found.put(item, timeout=_POLL_SECONDS)
                return

    def follow() -> None:
        try:
            for item in start():
                put((True, item))
                if stopped.is_set():
                    return
            put((False, None))
        except Exception as error:  # the thread's border: raised below
            put((False, error))

    thread = threading.Thread(target=follow, name="ray-data", daemon=True)
    thread.start()
    try:
        while True:
            try:
                more, item = found.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                tick()
                continue
            if more:
                yield item
            elif item is None:
                return
            else:
                with _explained():
                    raise item
    finally:
        stopped.set()
        thread.join(_END_SECONDS)


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Turns what Ray says into one sentence."""
    try:
        yield
    except ray.exceptions.RayError as error:
        cause = error.cause if isinstance(error, ray.exceptions.RayTaskError) else error
        raise FinetuneError(  # without its words, which may hold a row's
            f"the Ray cluster could not go on: {type(cause).__name__}",
            where="prepare",
            hint="most often its workers ran out of memory or could not be started; see their pods' events and logs",
        ) from None


def _cores() -> int:
    return int(ray.cluster_resources().get("CPU", 0))
