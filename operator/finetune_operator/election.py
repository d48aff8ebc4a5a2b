"""Leader election on a Lease: of several replicas one writes.

No clock of another machine is believed. A holder goes on until `renew_deadline` after it *sent* its last good renewal,
by its own clock, which counts a suspended machine's time too. A rival takes over when it has *seen* the Lease unchanged
for the whole lease, by its own clock. The first is shorter than the second, so they do not overlap.
"""

from __future__ import annotations

import asyncio
import random
import socket
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final

import structlog

from finetune_operator.client import LEASES, ApiError, Client, Object
from finetune_operator.settings import Settings

_log = structlog.get_logger(__name__)
_RELEASED: Final = ""


class LeadershipLost(Exception):
    """This replica may no longer write. The process must end: what it knows may be old."""


def boot_time() -> float:
    """Seconds since boot, suspension included: a machine that slept through its lease must notice."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


def new_identity() -> str:
    """A holder's name that no other process has, nor this one after a restart."""
    return f"{socket.gethostname()[:200]}_{uuid.uuid4().hex[:8]}"


class Rival:
    """What was seen of the Lease. Pure: times are arguments."""

    def __init__(self) -> None:
        self._record: object = None
        self._since = 0.0

    def seconds_left(self, lease: Object, identity: str, now: float, least_seconds: float) -> float:
        """How long the lease seen at `now` still binds: 0 when it is ours, was given up or ran out unchanged."""
        spec = lease.get("spec") or {}
        holder = spec.get("holderIdentity") or _RELEASED
        if holder in (_RELEASED, identity):
            return 0.0
        record = (holder, spec.get("renewTime"), spec.get("leaseTransitions"), lease["metadata"]["resourceVersion"])
        if record != self._record:
            self._record, self._since = record, now
        lasts = max(least_seconds, float(spec.get("leaseDurationSeconds") or 0))
        return max(0.0, self._since + lasts - now)


class Election:
    """One candidate. `client` should be its own, so that renewals do not queue behind other requests.

    Attributes:
        identity: what the Lease says while this candidate holds it.
        leading: set once the Lease is held; never unset, since losing it ends the process.
    """

    def __init__(self, client: Client, settings: Settings, clock: Callable[[], float] = boot_time) -> None:
        self.identity = settings.lease_identity or new_identity()
        self.leading = asyncio.Event()
        self._client = client
        self._settings = settings
        self._namespace = settings.lease_namespace or settings.operator_namespace
        self._clock = clock
        self._rival = Rival()
        self._deadline = 0.0
        self._lease: Object | None = None

    def guard(self) -> None:
        """Lets a write pass while the Lease is surely ours.

        Raises:
            LeadershipLost: it may be somebody else's by now.
        """
        if self._clock() >= self._deadline:
            raise LeadershipLost(f"the Lease was not renewed within {self._settings.renew_deadline:g} s")

    async def run(self) -> None:
        """Waits for the Lease, then keeps it.

        Raises:
            LeadershipLost: it could not be renewed in time, or somebody else has it.
        """
        while wait := await self._try_to_get():
            await asyncio.sleep(min(wait, self._period()))
        self.leading.set()
        _log.info("leading", identity=self.identity, lease=self._settings.lease_name)
        while True:
            # It wakes at the deadline at the latest, to say that it has lost.
            await asyncio.sleep(max(0.0, min(self._period(), self._deadline - self._clock())))
            await self._renew()

    async def release(self) -> None:
        """Gives the Lease up, so that another replica need not wait for its end. Call when nothing writes any more."""
        if not (self.leading.is_set() and self._lease):
            return
        self._deadline = 0.0
        body = self._body(self._lease, _RELEASED, 1)
        try:
            self._lease = await self._client.patch(LEASES, self._namespace, self._settings.lease_name, body)
        except ApiError as error:
            _log.warning("could not release the lease", error=str(error))

    async def _try_to_get(self) -> float:
        """Takes the Lease if it is free; answers after how many seconds to try again, 0 when it is ours."""
        name, later = self._settings.lease_name, self._period()
        try:
            lease = await self._client.get(LEASES, self._namespace, name)
        except ApiError as error:
            if not error.not_found:
                _log.warning("cannot read the lease", error=str(error))
                return later
            lease = None
        now = self._clock()
        if lease and (left := self._rival.seconds_left(lease, self.identity, now, self._settings.lease_duration)):
            return left
        try:
            if lease:
                body = self._body(lease, self.identity, self._settings.lease_duration)
                self._lease = await self._client.patch(LEASES, self._namespace, name, body)
            else:
                self._lease = await self._client.create(LEASES, self._namespace, self._new())
        except ApiError as error:
            if not (error.conflict or error.already_exists):  # else another candidate was faster
                _log.warning("cannot take the lease", error=str(error))
            return later
        self._deadline = now + self._settings.renew_deadline
        return 0.0

    async def _renew(self) -> None:
        assert self._lease
        sent = self._clock()
        self.guard()
        try:
            async with asyncio.timeout(self._deadline - sent):
                body = self._body(self._lease, self.identity, self._settings.lease_duration)
                try:
                    self._lease = await self._client.patch(LEASES, self._namespace, self._settings.lease_name, body)
                    self._deadline = sent + self._settings.renew_deadline
                except ApiError as error:
                    if error.conflict or error.not_found:
                        await self._look_again()
                        return
                    left = round(self._deadline - self._clock(), 1)
                    _log.warning("cannot renew the lease", error=str(error), seconds_left=left)
        except TimeoutError as error:
            raise LeadershipLost("the API server did not answer the Lease's renewal in time") from error

    async def _look_again(self) -> None:
        """After a conflict: it may have been a renewal of ours whose answer was lost."""
        try:
            lease = await self._client.get(LEASES, self._namespace, self._settings.lease_name)
        except ApiError as error:
            if error.not_found:
                raise LeadershipLost("the Lease was deleted") from error
            return
        holder = (lease.get("spec") or {}).get("holderIdentity")
        if holder != self.identity:
            raise LeadershipLost(f"the Lease is {holder or 'nobody'}'s")
        self._lease = lease

    def _period(self) -> float:
        return self._settings.retry_period * (1 + random.random() / 5)

    def _new(self) -> Object:
        now = _micro_time(self._client.clock.now())
        return {
            "apiVersion": LEASES.api_version,
            "kind": LEASES.kind,
            "metadata": {"name": self._settings.lease_name, "namespace": self._namespace},
            "spec": self._spec(self.identity, self._settings.lease_duration, 0) | {"acquireTime": now},
        }

    def _body(self, lease: Object, holder: str, seconds: float) -> Object:
        """A merge patch that fails when the Lease has changed since it was read."""
        old = lease.get("spec") or {}
        transitions = int(old.get("leaseTransitions") or 0)
        spec = self._spec(holder, seconds, transitions)
        if holder and holder != old.get("holderIdentity"):
            spec |= {"leaseTransitions": transitions + 1, "acquireTime": spec["renewTime"]}
        return {"metadata": {"resourceVersion": lease["metadata"]["resourceVersion"]}, "spec": spec}

    def _spec(self, holder: str, seconds: float, transitions: int) -> Object:
        return {
            "holderIdentity": holder,
            "leaseDurationSeconds": max(1, round(seconds)),
            "leaseTransitions": transitions,
            "renewTime": _micro_time(self._client.clock.now()),
        }


def _micro_time(seconds: float) -> str:
    """A time as Leases have it; for people, nobody decides by it."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
