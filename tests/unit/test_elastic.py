"""How many processes train when nodes go and come, decided without a cluster."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from finetune_api.errors import FinetuneError, Preempted, StorageError, TrainingError
from finetune_trainer import elastic
from finetune_trainer.elastic import Bounds

COMPLETE = {"event": "end", "step": 9, "reason": "complete"}
INTERRUPTED = {"event": "end", "step": 5, "reason": "interrupted"}


class Cluster:
    """Nodes with room for this many processes."""

    def __init__(self, room: int) -> None:
        self.there, self.drains = room, False

    def drain(self, room: int) -> None:
        """One node is told to end; the others have room for this many."""
        self.there, self.drains = room, True

    def room(self) -> int:
        return self.there

    def leaving(self) -> set[str]:
        return {"node"} if self.drains else set()


Life = Callable[[Any, Callable[[], bool]], FinetuneError | None]


def lives(cluster: Cluster, bounds: Bounds, *each: Life, retries: int = 0) -> tuple[list[int], list[dict[str, Any]]]:
    """Sizes of the groups that were started, and the events."""
    sizes: list[int] = []
    events: list[Any] = []

    def start(number: int, size: int, on_event: Any, should_stop: Callable[[], bool]) -> FinetuneError | None:
        sizes.append(size)
        return each[number](on_event, should_stop)

    elastic.train(
        start, cluster, bounds, events.append, lambda: False, again=(TrainingError,), retries=retries, patience=0.0
    )
    return sizes, events


def completes(on_event: Any, should_stop: Callable[[], bool]) -> None:
    on_event(COMPLETE)


def stops_when_asked(on_event: Any, should_stop: Callable[[], bool]) -> None:
    assert should_stop()
    on_event(INTERRUPTED)


def test_a_lost_node_leaves_a_smaller_group_that_uses_no_retry() -> None:
    cluster = Cluster(4)

    def dies(on_event: Any, should_stop: Callable[[], bool]) -> FinetuneError:
        cluster.there = 3
        return TrainingError("a worker died")

    sizes, events = lives(cluster, Bounds(2, 4), dies, completes)
    assert sizes == [4, 3]
    assert [event["event"] for event in events] == ["retry", "end"]


def test_a_worker_that_dies_on_a_node_that_stays_uses_a_retry() -> None:
    died = TrainingError("a worker died")
    assert lives(Cluster(4), Bounds(2, 4), lambda *_: died, completes, retries=1)[0] == [4, 4]
    with pytest.raises(TrainingError, match="a worker died"):
        lives(Cluster(4), Bounds(2, 4), lambda *_: died, retries=0)


def test_a_node_that_is_taken_away_makes_the_group_leave_and_the_rest_go_on() -> None:
    cluster = Cluster(4)

    def drained(on_event: Any, should_stop: Callable[[], bool]) -> None:
        cluster.drain(2)
        stops_when_asked(on_event, should_stop)

    def goes_on(on_event: Any, should_stop: Callable[[], bool]) -> None:
        assert not should_stop(), "the node is still going, but nothing runs on it"
        on_event(COMPLETE)

    sizes, events = lives(cluster, Bounds(1, 4), drained, goes_on)
    assert sizes == [4, 2]
    assert events[-1] == COMPLETE
    assert INTERRUPTED not in events, "the run did not end there"


def test_a_job_that_needs_all_of_its_workers_is_preempted() -> None:
    cluster = Cluster(4)
    cluster.drains = True
    with pytest.raises(Preempted, match="a node is being taken away"):
        lives(cluster, Bounds(4, 4), stops_when_asked)


def test_nodes_that_come_back_are_taken_again() -> None:
    cluster = Cluster(1)

    def dies(on_event: Any, should_stop: Callable[[], bool]) -> FinetuneError:
        return TrainingError("a worker died")

    def grows(on_event: Any, should_stop: Callable[[], bool]) -> None:
        cluster.there = 2
        stops_when_asked(on_event, should_stop)

    assert lives(cluster, Bounds(1, 2), dies, grows, completes)[0] == [2, 1, 2]


def test_a_run_that_became_complete_in_spite_of_the_notice_is_complete() -> None:
    cluster = Cluster(4)
    cluster.drains = True

    def just_done(on_event: Any, should_stop: Callable[[], bool]) -> None:
        assert should_stop()
        on_event(COMPLETE)

    assert lives(cluster, Bounds(1, 4), just_done) == ([4], [COMPLETE])


def test_what_no_other_group_would_mend_is_raised() -> None:
    with pytest.raises(StorageError, match="no bucket"):
        lives(Cluster(4), Bounds(1, 4), lambda *_: StorageError("no bucket"), retries=5)


def test_sizes_are_multiples_of_the_processes_that_share_a_sequence() -> None:
    assert [Bounds(2, 8, 2).size(room) for room in (1, 2, 5, 9)] == [None, 2, 4, 8]
