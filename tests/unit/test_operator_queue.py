"""The keyed queue, with time and chance in the test's hands."""

from __future__ import annotations

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from finetune_operator.queue import FIRST_DELAY, LAST_DELAY, KeyedQueue


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def queue(clock: Clock | None = None) -> KeyedQueue[str]:
    return KeyedQueue(clock or Clock(), lambda: 0.0)


def drain(q: KeyedQueue[str]) -> list[str]:
    taken = []
    while (key := q.take()) is not None:
        taken.append(key)
        q.done(key)
    return taken


def test_a_key_waits_once_and_the_oldest_comes_first() -> None:
    q = queue()
    for key in "abcab":
        q.add(key)
    assert len(q) == 3
    assert drain(q) == ["a", "b", "c"]


def test_a_key_that_is_worked_on_is_worked_on_again_afterwards_not_meanwhile() -> None:
    q = queue()
    q.add("a")
    assert q.take() == "a"
    q.add("a")
    q.add("a")
    assert q.take() is None
    assert (len(q), q.working) == (1, 1)
    q.done("a")
    assert drain(q) == ["a"]


def test_the_earliest_of_several_wishes_wins() -> None:
    clock = Clock()
    q = queue(clock)
    q.add_after("a", 10)
    q.add_after("a", 5)
    q.add_after("a", 20)
    assert q.seconds_to_next() == 5
    clock.now = 4.9
    assert q.take() is None
    clock.now = 5
    assert drain(q) == ["a"]
    assert q.seconds_to_next() is None


def test_work_answers_the_wishes_made_before_it() -> None:
    clock = Clock()
    q = queue(clock)
    q.add_after("a", 10)
    q.add("a")
    assert drain(q) == ["a"]
    clock.now = 100
    assert drain(q) == []


def test_a_wish_made_during_the_work_stands() -> None:
    clock = Clock()
    q = queue(clock)
    q.add("a")
    assert q.take() == "a"
    q.add_after("a", 1)
    clock.now = 2
    assert q.take() is None, "it is still being worked on"
    q.done("a")
    assert drain(q) == ["a"]


def test_failures_wait_longer_each_time_until_one_goes_well() -> None:
    q = queue()
    delays = [q.add_limited("a") for _ in range(12)]
    assert delays[:3] == [FIRST_DELAY, 2 * FIRST_DELAY, 4 * FIRST_DELAY]
    assert delays[-1] == LAST_DELAY
    assert q.add_limited("b") == FIRST_DELAY, "keys do not wait for each other"
    assert q.add_limited("b", at_least=7) == 7, "what the server asks for"
    assert q.add_limited("a", at_most=3) == 3, "while it is the server's fault"
    q.forget("a")
    assert q.add_limited("a") == FIRST_DELAY


def test_what_failed_together_does_not_come_back_together() -> None:
    draws = iter((0.0, 0.5, 1.0))
    q: KeyedQueue[str] = KeyedQueue(Clock(), lambda: next(draws))
    assert len({q.add_limited(key) for key in "abc"}) == 3


def test_a_waiting_task_is_woken_by_a_key_and_by_a_timer() -> None:
    async def test() -> None:
        q: KeyedQueue[str] = KeyedQueue()
        waiting = asyncio.create_task(q.get())
        await asyncio.sleep(0)
        q.add("a")
        assert await asyncio.wait_for(waiting, 5) == "a"
        waiting = asyncio.create_task(q.get())
        await asyncio.sleep(0)
        q.add_after("b", 60)
        q.add_after("c", 0.05)
        assert await asyncio.wait_for(waiting, 5) == "c"

    asyncio.run(test())


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["add", "after", "limited", "take", "done", "wait"]), st.integers(0, 3), st.floats(0, 20)
    ),
    max_size=60,
)


@given(ACTIONS)
def test_no_wish_is_lost_and_no_key_is_worked_on_twice_at_once(actions: list[tuple[str, int, float]]) -> None:
    clock = Clock()
    q = queue(clock)
    wanted: set[str] = set()  # asked for since its last work began
    working: list[str] = []
    for action, number, seconds in actions:
        key = "abcd"[number]
        match action:
            case "add":
                q.add(key)
                wanted.add(key)
            case "after":
                q.add_after(key, seconds)
                wanted.add(key)
            case "limited":
                q.add_limited(key)
                wanted.add(key)
            case "take":
                if (taken := q.take()) is not None:
                    assert taken not in working
                    wanted.discard(taken)
                    working.append(taken)
            case "done":
                if working:
                    q.done(working.pop(0))
            case "wait":
                clock.now += seconds
    for key in working:
        q.done(key)
    clock.now += 2 * LAST_DELAY
    assert set(drain(q)) == wanted
