"""The live attempt, where it takes more than one look to know what became of it."""

from __future__ import annotations

from typing import Any

from finetune_operator.decide import decide
from finetune_operator.observe import Stop
from tests.unit.operator_world import NOW, TIMING, pod, ray_job, report, training


def test_a_lost_peer_is_blamed_only_when_no_pod_says_better_within_seconds() -> None:
    words = {"reason": "Network", "message": "Connection closed by peer"}
    seen: dict[str, Any] = {
        "attempts": {1: ray_job(deployment="Failed", outcome="FAILED")},
        "report": report(state="failed", failure=words),
    }
    first = decide(training(**seen, ended=NOW), NOW, TIMING)
    assert (first.status.failures, first.actions, first.wake) == ([], (), 1.0)
    later = decide(training(**seen, ended=NOW - 6), NOW, TIMING)
    assert later.status.failures[-1].reason == "Network"
    killed = pod(stops=(Stop("ray-worker", 137, "OOMKilled", ""),))
    known = decide(training(**seen, ended=NOW, pods=[killed]), NOW, TIMING)
    assert known.status.failures[-1].reason == "OutOfHostMemory"


def test_a_head_whose_clock_is_ahead_is_not_waited_for_any_longer() -> None:
    """Only the operator's own time of the end counts; an operator that has just been started counts anew."""
    ended = {1: ray_job(deployment="Complete", outcome="SUCCEEDED")}
    assert decide(training(attempts=ended, ended=NOW - 19), NOW, TIMING).actions == ()
    assert len(decide(training(attempts=ended, ended=NOW - 20), NOW, TIMING).actions) == 1
