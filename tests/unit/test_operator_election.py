"""Who holds a Lease, by what was seen of it."""

from __future__ import annotations

from typing import Any

from finetune_operator.election import Rival, new_identity

SECONDS = 15.0


def lease(holder: str, renewal: int, seconds: int = 15, renew_time: str = "") -> dict[str, Any]:
    spec = {"holderIdentity": holder, "renewTime": renew_time, "leaseDurationSeconds": seconds}
    return {"metadata": {"resourceVersion": str(renewal)}, "spec": spec}


def left(rival: Rival, seen: dict[str, Any], now: float) -> float:
    return rival.seconds_left(seen, "me", now, SECONDS)


def test_a_lease_that_nobody_holds_is_free() -> None:
    assert left(Rival(), lease("", 1), 0) == 0
    assert left(Rival(), lease("me", 1), 0) == 0


def test_a_lease_is_bound_for_its_duration_after_it_was_first_seen() -> None:
    rival = Rival()
    assert left(rival, lease("other", 1), 100) == 15
    assert left(rival, lease("other", 1), 110) == 5
    assert left(rival, lease("other", 1), 115) == 0


def test_each_renewal_starts_it_anew() -> None:
    rival = Rival()
    left(rival, lease("other", 1), 0)
    assert left(rival, lease("other", 2), 14) == 15
    assert left(rival, lease("other", 2), 28) == 1


def test_the_holders_clock_is_not_believed() -> None:
    rival = Rival()
    assert left(rival, lease("other", 1, renew_time="1970-01-01T00:00:00.000000Z"), 0) == 15
    assert left(Rival(), lease("other", 1, renew_time="2970-01-01T00:00:00.000000Z"), 0) == 15


def test_a_holder_that_asks_for_longer_gets_it() -> None:
    assert left(Rival(), lease("other", 1, seconds=60), 0) == 60
    assert left(Rival(), lease("other", 1, seconds=1), 0) == 15


def test_identities_differ() -> None:
    assert new_identity() != new_identity()
