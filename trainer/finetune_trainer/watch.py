"""Notices that training stands still, and tells whose fault it is. Pure: time comes from the caller's clock.

Every worker says every few seconds how far it is (`Beat`). All of them make the same moves in the same order, so of
workers that wait for each other the one with the fewest moves is the one that the others wait for. A worker that no
longer speaks is stopped as a whole. Where all have made the same moves, their stacks tell who is not in a collective.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

from finetune_api.base import parse_duration
from finetune_api.errors import Hang
from finetune_api.job import FinetuneJobSpec
from finetune_trainer.stacks import Stack, blocked_at, in_collective

Order = Literal["go on", "tell", "leave"]  # tell: send your stacks; leave: end your process

_STEPS: Final = 20  # a step may take so many times as long as usual, whatever the limit
_SLOW: Final = 6  # and what follows these moves so many times the limit; nothing may take longer
_SLOW_MOVES: Final = ("start", "last step", "export")  # loading, storing the last checkpoint, writing weights
_TELL_SECONDS: Final = 15.0  # for stacks to arrive
_MOST_NAMED: Final = 4


def hang_limit(spec: FinetuneJobSpec) -> float:
    """Seconds that a worker may stand still."""
    return max(5.0, parse_duration(spec.limits.hang_timeout))


def collective_timeout(limit: float) -> float:
    """Seconds after which torch gives a collective up: later than the watch, which knows more."""
    return _SLOW * limit + 300


def interval(limit: float) -> float:
    """Seconds between a worker's beats."""
    return min(max(limit / 20, 0.5), 10.0)


@dataclass(frozen=True)
class Beat:
    """How far a worker is.

    Attributes:
        moves: how often it has got on; equal moves are the same place in the loop.
        doing: what it did last.
        usual: seconds of a usual step; 0 before there is one.
        stack: of the thread that trains, when it was asked for; the innermost frame last.
        threads: the stacks of all threads, as text.
    """

    rank: int
    node: str
    moves: int
    doing: str
    step: int
    usual: float
    stack: Stack = ()
    threads: str = ""


@dataclass
class _Worker:
    beat: Beat
    heard: float
    moved: float


@dataclass(frozen=True)
class Verdict:
    """A hang, and the stacks of all workers that could still tell theirs, as text for the error log."""

    hang: Hang
    step: int
    stacks: str


class Watch:
    """Takes the workers' beats, and finds out when and where training stands still.

    Args:
        ranks: the workers.
        limit: seconds that a worker may stand still.
    """

    def __init__(self, ranks: Iterable[int], limit: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._ranks, self._limit, self._clock = set(ranks), limit, clock
        self._workers: dict[int, _Worker] = {}
        self._looked = clock()
        self._since: float | None = None  # when the hang was noticed
        self._verdict: Verdict | None = None

    def beat(self, beat: Beat) -> Order:
        """Takes a beat; what its sender shall do."""
        now = self._clock()
        known = self._workers.get(beat.rank)
        moved = known.moved if known and known.beat.moves == beat.moves else now
        if known and not beat.stack:
            beat = replace(beat, stack=known.beat.stack, threads=known.beat.threads)
        self._workers[beat.rank] = _Worker(beat, heard=now, moved=moved)
        self._look(now)
        if self._verdict:
            return "leave"
        return "tell" if self._since is not None and not beat.stack else "go on"

    def done(self, rank: int) -> None:
        """A worker has ended, well or by an error of its own: it is watched no more."""
        self._workers.pop(rank, None)
        self._ranks.discard(rank)

    def verdict(self, look: bool = True) -> Verdict | None:
        """The hang, once it is one and all who can have told their stacks. Without `look`: if it was found before."""
        if look:
            self._look(self._clock())
        return self._verdict

    def _look(self, now: float) -> None:
        away, self._looked = now - self._looked, now
        if away > max(10.0, self._limit / 4):  # it was this process that stood still
            for worker in self._workers.values():
                worker.heard += away
                worker.moved += away
        if self._verdict:
            return
        if not any(now - worker.moved > self._allowed(worker.beat) for worker in self._workers.values()):
            self._since = None
            for worker in self._workers.values():
                worker.beat = replace(worker.beat, stack=(), threads="")
            return
        self._since = now if self._since is None else self._since
        untold = [w for rank, w in self._workers.items() if not w.beat.stack and rank not in self._silent(now)]
        if not untold or now - self._since > _TELL_SECONDS:
            self._verdict = self._judge(now)

    def _allowed(self, beat: Beat) -> float:
        if beat.doing in _SLOW_MOVES:
            return _SLOW * self._limit
        return min(max(_STEPS * beat.usual, self._limit), _SLOW * self._limit)

    def _silent(self, now: float) -> list[int]:
        """Ranks that speak no more, or never did."""
        longest = max(5.0, 3 * interval(self._limit))
        quiet = [rank for rank, worker in self._workers.items() if now - worker.heard > longest]
        return sorted({*quiet, *(self._ranks - self._workers.keys())})

    def _judge(self, now: float) -> Verdict:
        silent, ranks = self._silent(now), sorted(self._workers)
        culprits = silent or _behind([self._workers[rank].beat for rank in ranks])
        first = self._workers.get(culprits[0])
        seconds = max(now - worker.moved for worker in self._workers.values())
        who = " and ".join(self._named(rank) for rank in culprits[:_MOST_NAMED])
        who += f" and {len(culprits) - _MOST_NAMED} more" if len(culprits) > _MOST_NAMED else ""
        waiting = len(self._ranks) - len(culprits)
        others = "" if not waiting else f"; {'1 other waits' if waiting == 1 else f'{waiting} others wait'} for it"
        step = max(worker.beat.step for worker in self._workers.values())
        if silent:
            what = f"{who} no longer answered: stopped, out of memory, or stuck outside of Python{_place(first)}"
        elif waiting or len(self._ranks) == 1:
            what = f"{who} stood still for {seconds:.0f} s{_place(first)}"
        else:
            what = f"all workers stood still for {seconds:.0f} s, and none of them is behind{_place(first)}"
        stacks = [_told(rank, self._workers.get(rank)) for rank in sorted({*ranks, *culprits})]
        hang = Hang(
            what + others,
            hint="error.log has the stacks of all workers. A rank that computes for long needs a longer "
            "limits.hangTimeout.",
            rank=culprits[0] if waiting or len(culprits) == 1 else None,
            node=first.beat.node if first else None,
        )
        return Verdict(hang, step, "\n".join(stacks))

    def _named(self, rank: int) -> str:
        worker = self._workers.get(rank)
        return f"rank {rank} on {worker.beat.node}" if worker and worker.beat.node else f"rank {rank}"


def _behind(beats: Sequence[Beat]) -> list[int]:
    """Ranks that the others wait for; all of them when nothing tells them apart."""
    fewest = min(beat.moves for beat in beats)
    behind = [beat.rank for beat in beats if beat.moves == fewest]
    if len(behind) == len(beats):
        behind = [beat.rank for beat in beats if not in_collective(beat.stack)] or behind
    return behind


def _place(worker: _Worker | None) -> str:
    if worker is None:
        return ""
    beat = worker.beat
    during = f" in step {beat.step + 1}" if beat.doing not in _SLOW_MOVES else ""
    at = blocked_at(beat.stack)
    return f"{during}, after {beat.doing}" + (f", at {at}" if at else "")


def _told(rank: int, worker: _Worker | None) -> str:
    if worker is None:
        return f"rank {rank} never said anything\n"
    beat = worker.beat
    head = f"rank {rank} on {beat.node or 'this node'}: step {beat.step + 1}, after {beat.doing}"
    return f"{head}\n{beat.threads or '  (it told no stack)'}\n"
