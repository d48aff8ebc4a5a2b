"""What an API server can do to the operator, each with a promise and a figure; with -s the figures are printed.

Each fault has an operator, a proxy and four jobs of its own: two train all through the fault, one's training ends in
it, one is created in it. All live at the same time, beside a quiet run, with whose requests theirs are compared.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import pytest

from tests.api import jobs
from tests.api.behind import Behind, behind_proxy, made_by_operators
from tests.api.cluster import Cluster
from tests.api.kubelet import Kubelet
from tests.api.objects import Api, Object, eventually
from tests.api.script import Script, Training

LIFE_SECONDS: Final = 75.0  # that the longest training takes, beyond the longest fault
END_SECONDS: Final = 8.0  # of the training that ends meanwhile
RECOVERY_SECONDS: Final = 15.0
SILENCE_SECONDS: Final = 60.0
STEP: Final = 0.25
THROUGH: Final = ("through-1", "through-2")
JOBS: Final[Mapping[str, float]] = dict.fromkeys(THROUGH, LIFE_SECONDS) | {"ends": END_SECONDS, "meanwhile": 2.0}


@dataclass(frozen=True)
class Fault:
    """What goes wrong for `seconds`; `promise` counts from its end, unless it lasts beyond."""

    name: str
    seconds: float
    what: Mapping[str, Any]
    promise: float = RECOVERY_SECONDS


QUIET: Final = Fault("quiet", 0, {})
FAULTS: Final = (
    Fault("a fifth of all answers are errors or never come", 45, {"refused": 0.2}),
    Fault("watches are cut every 3 s", 45, {"cut_watches": 3.0}),
    Fault("away", 60, {"away": True}),
    # Those that have fallen silent stay so; new ones do not.
    Fault("open watches fall silent", 0.5, {"silent_watches": True}, SILENCE_SECONDS),
    Fault("every watch is answered with 410", 45, {"cut_watches": 0.0, "expired_watches": 1_000_000}),
    Fault("lists are from the past, and no watch works", 45,
          {"cut_watches": 0.0, "expired_watches": 1_000_000, "stale_lists": True}),
)  # fmt: skip


@dataclass(frozen=True)
class Figures:
    """What was measured.

    Attributes:
        requests: that the proxy has got, in the whole life.
        recovery: seconds from the fault's end until the statuses said what was so.
        healthy: the operator at the fault's end: nothing would have started it again.
        statuses: of the jobs, in the end.
        tracebacks: in the operator's log.
        exit_code: the operator's; None: it ran until the end.
    """

    namespace: str
    requests: int
    recovery: float
    healthy: bool
    statuses: Mapping[str, Object]
    tracebacks: list[str]
    exit_code: int | None


@dataclass(frozen=True)
class World:
    """What all share."""

    cluster: Cluster
    kubelet: Kubelet
    runtime: str
    folder: Path

    def meet(self, fault: Fault) -> Figures:
        """Lets the jobs live, with the fault in the middle."""
        with behind_proxy(self.cluster, self.folder / fault.name.replace(" ", "-")) as behind:
            for name, seconds in JOBS.items():
                training = Training(steps=int(seconds / STEP), step_seconds=STEP, checkpoint_every=4)
                self.kubelet.script(behind.namespace, name, Script(attempts=(training,)))
            for name in (*THROUGH, "ends"):
                self._create(behind, name)
            for name in (*THROUGH, "ends"):
                _reach(behind, name, "Training")
            ended, healthy = self._break(behind, fault)
            since = datetime.now(UTC)
            eventually(lambda: _is_right(behind, since), "the statuses to be right", 90, lambda: _state(behind))
            recovery = time.monotonic() - ended
            statuses = {name: _reach(behind, name, "Complete") for name in JOBS}
            requests = behind.proxy.requests.total()
            return Figures(
                behind.namespace, requests, recovery, healthy, statuses, behind.op.tracebacks(), behind.op.poll()
            )

    def _break(self, behind: Behind, fault: Fault) -> tuple[float, bool]:
        """Lets the fault be for its time, with a new job early in it; answers when it was over, and `healthy`."""
        faults = behind.proxy.faults
        before = dataclasses.replace(faults)
        for name, value in fault.what.items():
            setattr(faults, name, value)
        began = time.monotonic()
        time.sleep(0.5)
        if fault.seconds >= 1:
            self._create(behind, "meanwhile")
            time.sleep(began + fault.seconds - time.monotonic())
        healthy = behind.op.healthy()
        for name in fault.what:
            setattr(faults, name, getattr(before, name))
        ended = time.monotonic()
        if fault.seconds < 1:
            self._create(behind, "meanwhile")
        return ended, healthy

    def _create(self, behind: Behind, name: str) -> None:
        behind.api.create(jobs.job(name, self.runtime), namespace=behind.namespace)


def _reach(behind: Behind, name: str, phase: str) -> Object:
    """The job's status, once it has the phase."""
    found = eventually(
        lambda: status if (status := behind.status(name)).get("phase") == phase else None,
        f"{name} to be {phase}", 150, lambda: _state(behind),
    )  # fmt: skip
    assert found
    return found


def _is_right(behind: Behind, since: datetime) -> bool:
    """Whether the statuses say what is so: progress is new, what has ended has ended, what is new has begun."""
    time.sleep(0.2)  # beside eventually's own: the answers cost more than they are worth
    *through, ends, meanwhile = (behind.status(name) for name in JOBS)
    return (
        all(datetime.fromisoformat(each["progress"]["updatedTime"]) >= since for each in through)
        and ends["phase"] == "Complete"
        and meanwhile.get("phase", "Pending") != "Pending"
    )


def _state(behind: Behind) -> str:
    return str([behind.status(name) for name in JOBS]) + behind.op.log_text[-3000:]


@pytest.fixture(scope="module")
def figures(local_cluster: Cluster, api: Api, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Figures]:
    with jobs.runtime(api) as runtime, Kubelet(local_cluster) as kubelet:
        world = World(local_cluster, kubelet, runtime, tmp_path_factory.mktemp("faults"))
        with ThreadPoolExecutor(len(FAULTS) + 1) as threads:
            met = dict(
                zip((fault.name for fault in (QUIET, *FAULTS)), threads.map(world.meet, (QUIET, *FAULTS)), strict=True)
            )
    for name, each in met.items():
        ratio = each.requests / met[QUIET.name].requests
        print(f"| {name} | {each.requests} requests ({ratio:.2f}) | {each.recovery:.1f} s |")
    return met


@pytest.fixture(scope="module")
def made(local_cluster: Cluster, figures: Mapping[str, Figures]) -> Mapping[str, Sequence[Object]]:
    return made_by_operators(local_cluster)


@pytest.mark.parametrize("fault", [QUIET, *FAULTS], ids=lambda fault: fault.name)
def test_a_fault_costs_no_job_and_few_requests(
    figures: Mapping[str, Figures], made: Mapping[str, Sequence[Object]], fault: Fault
) -> None:
    found = figures[fault.name]
    assert found.recovery <= fault.promise
    assert found.requests <= 2 * figures[QUIET.name].requests
    for name, status in found.statuses.items():
        assert (name, status["attempt"], status.get("failures", [])) == (name, 1, [])
    ray_jobs = [each["metadata"]["name"] for each in made[found.namespace] if each["kind"] == "RayJob"]
    assert sorted(ray_jobs) == sorted(f"{name}-a1" for name in JOBS)
    assert (found.tracebacks, found.exit_code, found.healthy) == ([], None, True)
