"""Who hangs: told from how far each worker is, from silence, and from stacks."""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from dataclasses import replace

import pytest

from finetune_api.errors import Hang
from finetune_trainer.stacks import Stack
from finetune_trainer.watch import Beat, Order, Verdict, Watch, collective_timeout, interval

LIMIT = 60.0
WAITING: Stack = (
    ("/x/finetune_trainer/train.py", 7, "train_step"), ("/x/torch/distributed/distributed_c10d.py", 1, "all_reduce")
)  # fmt: skip
READING: Stack = (("/x/finetune_trainer/dataset.py", 44, "__getitem__"), ("/x/lib/socket.py", 9, "recv"))


class World:
    """Workers that beat every two seconds of a clock of their own, and answer when they are asked for stacks."""

    def __init__(self, size: int) -> None:
        self.now = 0.0
        self.watch = Watch(range(size), LIMIT, lambda: self.now)
        self.beats = {rank: Beat(rank, f"node-{rank}", 0, "start", 0, 1.0) for rank in range(size)}
        self.stacks = dict.fromkeys(range(size), WAITING)
        self.silent: set[int] = set()
        self.orders: dict[int, Order] = {}

    def run(self, seconds: float, moving: Iterable[int] = ()) -> Verdict | None:
        """Lets time pass; the verdict at its end."""
        until = self.now + seconds
        while self.now < until:
            self.now += 2.0
            for rank, beat in self.beats.items():
                if rank in self.silent:
                    continue
                if rank in moving:
                    self.move(rank, "forward")
                    beat = self.beats[rank]
                self.orders[rank] = self.watch.beat(beat)
                if self.orders[rank] == "tell":
                    told = replace(beat, stack=self.stacks[rank], threads=f"stack of {rank}")
                    self.orders[rank] = self.watch.beat(told)
        return self.watch.verdict()

    def move(self, rank: int, doing: str, **changes: float) -> None:
        beat = self.beats[rank]
        self.beats[rank] = replace(beat, moves=beat.moves + 1, doing=doing, **changes)  # type: ignore[arg-type]


def stuck(size: int) -> World:
    """A world in which all have moved and then wait in a collective."""
    world = World(size)
    assert world.run(20, moving=range(size)) is None
    return world


def hang(verdict: Verdict | None) -> Hang:
    assert verdict is not None
    return verdict.hang


def test_workers_that_get_on_are_left_alone() -> None:
    world = World(3)
    assert world.run(1000, moving=range(3)) is None
    assert set(world.orders.values()) == {"go on"}


def test_the_worker_that_is_behind_is_the_one_that_hangs() -> None:
    world = stuck(3)
    for rank in (0, 2):
        world.move(rank, "data")
    world.stacks[1] = READING
    assert world.run(LIMIT - 2) is None
    found = world.run(6)
    assert hang(found).rank == 1
    assert hang(found).node == "node-1"
    assert "rank 1 on node-1 stood still for" in hang(found).what
    assert "lib/socket.py:9 recv < finetune_trainer/dataset.py:44 __getitem__" in hang(found).what
    assert "2 others wait for it" in hang(found).what
    assert found is not None
    assert all(f"stack of {rank}" in found.stacks for rank in range(3))
    world.run(2)
    assert set(world.orders.values()) == {"leave"}


def test_among_equals_it_is_the_one_that_is_in_no_collective() -> None:
    world = stuck(4)
    world.stacks[3] = READING
    assert hang(world.run(LIMIT + 6)).rank == 3


def test_a_worker_that_no_longer_speaks_is_named_first() -> None:
    world = stuck(3)
    world.move(2, "data")  # rank 0 is behind as well, since it waits for rank 1
    world.silent = {1}
    found = world.run(LIMIT + 20)
    assert hang(found).rank == 1
    assert "no longer answered" in hang(found).what


def test_without_a_difference_nobody_is_accused() -> None:
    found = hang(stuck(2).run(LIMIT + 6))
    assert found.rank is None
    assert "none of them is behind" in found.what


def test_a_slow_step_is_given_twenty_times_its_usual_time() -> None:
    world = stuck(2)
    for rank in range(2):
        world.move(rank, "forward", usual=10.0)
    assert world.run(195) is None
    assert world.run(10) is not None


@pytest.mark.parametrize("doing", ["start", "last step", "export"])
def test_loading_storing_and_writing_may_take_longer_but_not_for_ever(doing: str) -> None:
    world = World(2)
    for rank in range(2):
        world.move(rank, doing)
    assert world.run(6 * LIMIT - 4) is None
    assert world.run(8) is not None
    assert collective_timeout(LIMIT) > 6 * LIMIT + 20, "the watch speaks before a collective gives up"


def test_a_worker_that_gets_on_after_all_is_forgiven() -> None:
    world = stuck(2)
    world.silent = {1}
    assert world.run(LIMIT - 4) is None
    world.silent = set()
    assert world.run(4, moving=[0, 1]) is None
    assert world.run(LIMIT - 6) is None


def test_when_the_watch_itself_was_stopped_nobody_is_accused() -> None:
    world = stuck(2)
    world.now += 10 * LIMIT
    assert world.run(LIMIT - 4) is None
    assert world.run(8) is not None


def test_workers_that_have_ended_are_not_waited_for() -> None:
    world = stuck(2)
    world.silent = {0, 1}
    world.watch.done(0)
    world.watch.done(1)
    assert world.run(10 * LIMIT) is None


@pytest.mark.parametrize("limit", [5.0, 600.0])
def test_beats_are_many_within_the_limit(limit: float) -> None:
    assert interval(limit) <= limit / 10


def test_a_hang_crosses_process_borders_whole() -> None:
    found = pickle.loads(pickle.dumps(Hang("stood still", where="w", hint="h", rank=3, node="n")))
    assert (found.what, found.where, found.hint, found.rank, found.node) == ("stood still", "w", "h", 3, "n")
