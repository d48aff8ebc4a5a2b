"""The live attempt, where it takes more than one look to know what became of it."""

from __future__ import annotations

from typing import Any

from finetune_api.status import EgressResult
from finetune_operator.actions import Event
from finetune_operator.decide import decide
from finetune_operator.observe import Stop
from tests.unit.operator_world import NOW, RESULT, TIMING, again, pod, ray_job, report, runtime_spec, training


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


def test_workers_that_reached_what_a_policy_should_keep_from_them_are_warned_of_once() -> None:
    def warnings(reached: bool, policy: bool = True) -> list[Event]:
        egress = [EgressResult(to="apiServer", address="10.96.0.1:443", reached=reached)]
        result = RESULT.model_copy(update={"egress": egress}).model_dump(by_alias=True)
        runtime = runtime_spec(networkPolicy={"enabled": policy})
        ended = training(report=report(state="finished", result=result), runtime=runtime)
        first = decide(ended, NOW, TIMING)
        assert first.status.phase == "Complete"
        after = decide(again(ended, first), NOW, TIMING)
        return [each for each in (*first.events, *after.events) if each.reason == "EgressOpen"]

    (warning,) = warnings(reached=True)
    assert warning.type == "Warning"
    assert "reached the API server" in warning.message
    assert warnings(reached=False) == []
    assert warnings(reached=True, policy=False) == [], "the admin has asked for none"
