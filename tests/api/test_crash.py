"""The operator is killed right after each of its writes, and started again: every job ends as if nothing had happened.

The process gets SIGKILL when the API server has answered and the operator has not heard of it yet. Events do not count
as writes, nor to what must be equal in the end: they are best effort, and the status says the same.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest

from tests.api import jobs
from tests.api.behind import Behind, behind_proxy, made_by_operators
from tests.api.cluster import Cluster
from tests.api.kubelet import Kubelet
from tests.api.lives import LOST_PEER, hangs, tells
from tests.api.objects import Api, Object
from tests.api.proxy import Write
from tests.api.script import Script, Training

NAME: Final = "job"  # of every job
LANES: Final = 6  # operators at a time
LIFE_SECONDS: Final = 90.0
CATCH_UP_SECONDS: Final = 15.0
KINDS: Final = ("batch/v1/Job", "v1/ConfigMap", "networking.k8s.io/v1/NetworkPolicy", jobs.RAY_JOB)
MEASURED: Final = ("cost", "goodput", "accounted")
UNIQUE: Final = ("uid", "countedUid", "managedFields", "resourceVersion")


@dataclass(frozen=True)
class Story:
    """A job's life.

    Attributes:
        changes: what its user does: as soon as the status is so, the spec gets this.
        fields: of the job, as for `jobs.job`.
    """

    name: str
    script: Script
    changes: Sequence[tuple[Callable[[Object], object], Object]] = ()
    fields: Mapping[str, Any] = field(default_factory=dict)


def _suspends(status: Object) -> bool:
    return bool(status.get("phase") == "Training" and status["progress"]["step"] == 3)


def _resumes(status: Object) -> bool:
    return bool(status.get("phase") == "Suspended")


def _short(**more: Any) -> Training:
    return Training(step_seconds=0.1, load_seconds=0.1, finish_seconds=0.2, **more)


GOOD: Final = Story("good", Script(attempts=(_short(),)))
MANY_ROWS: Final = Story("many-rows", Script(attempts=(_short(),)), fields={"data__prepare": {"workers": 2}})
STORIES: Final = (  # those that take longest first
    Story("retried", Script(attempts=(_short(fault=tells("Network", LOST_PEER)), _short()))),
    Story(
        "suspended",
        Script(attempts=(_short(fault=hangs), _short())),
        ((_suspends, {"suspend": True}), (_resumes, {"suspend": False})),
    ),
    MANY_ROWS,
    GOOD,
)


@dataclass(frozen=True)
class End:
    """How a life ended.

    Attributes:
        writes: of the operator, events left out.
        killed: that of them after which it was killed; None: it was not.
        work_done: training had ended well when the operator was started again.
        seconds: from that start, or from the job's creation, until the job had ended and held nothing.
        status: at the end, without what differs from life to life.
        there: kind and name of what is there at the end.
    """

    namespace: str
    uid: str
    writes: Sequence[Write]
    killed: Write | None
    work_done: bool
    seconds: float
    status: Object
    there: Sequence[str]
    tracebacks: Sequence[str]

    @property
    def title(self) -> str:
        """What was done to it, for a failing test's message."""
        if self.killed is None:
            return "never killed"
        where = self.killed.path.partition(self.namespace)[2]
        return f"killed after write {self.writes.index(self.killed) + 1}: {self.killed.method} {where}"


class Life:
    """A job that is being lived.

    Attributes:
        killed: the write after which the operator was killed.
    """

    def __init__(self, behind: Behind, kubelet: Kubelet, story: Story, kill_after: int) -> None:
        self.killed: Write | None = None
        self._behind, self._kubelet, self._story, self._kill_after = behind, kubelet, story, kill_after
        behind.proxy.after_write = self._after_write

    def writes(self) -> list[Write]:
        return [write for write in self._behind.proxy.writes if _counts(write)]

    def _after_write(self, _: int) -> None:
        last = self._behind.proxy.writes[-1]
        if self.killed is None and _counts(last) and len(self.writes()) == self._kill_after:
            os.kill(self._behind.op.pid, signal.SIGKILL)
            self.killed = last

    def live(self) -> tuple[float, bool]:
        """Returns when the job has ended and holds nothing: `seconds` and `work_done` of its End."""
        api, namespace = self._behind.api, self._behind.namespace
        changes = list(self._story.changes)
        started, restarted, work_done = time.monotonic(), False, False
        while True:
            status = self._behind.status(NAME)
            if changes and changes[0][0](status):
                api.patch(jobs.JOB_KIND, NAME, namespace, {"spec": changes.pop(0)[1]})
            if self.killed and not restarted:
                work_done = self._kubelet.work(namespace, NAME).result is not None
                started, restarted = time.monotonic(), True
                self._behind.op.restart()
            ended = status.get("phase") in ("Complete", "Failed") and restarted == bool(self.killed)
            if ended and not api.list(jobs.RAY_JOB, namespace):
                return time.monotonic() - started, work_done
            state = self.killed, status, self._behind.op.log_text[-2000:]
            assert time.monotonic() - started < LIFE_SECONDS, state
            time.sleep(0.2)


@dataclass(frozen=True)
class World:
    """What all lives share."""

    cluster: Cluster
    kubelet: Kubelet
    runtime: str
    folder: Path

    def live(self, story: Story, kill_after: int = 0) -> End:
        """Lives a life, with the operator killed after its write of this number, from 1; 0: never."""
        with behind_proxy(self.cluster, self.folder / f"{story.name}-{kill_after}") as behind:
            self.kubelet.script(behind.namespace, NAME, story.script)
            life = Life(behind, self.kubelet, story, kill_after)
            behind.api.create(jobs.job(NAME, self.runtime, **story.fields), namespace=behind.namespace)
            seconds, work_done = life.live()
            time.sleep(1.0)  # for what it would do in addition
            job = behind.job(NAME)
            uid = job["metadata"]["uid"]
            return End(
                behind.namespace,
                uid,
                life.writes(),
                life.killed,
                work_done,
                seconds,
                normal(job["status"], behind.namespace, uid),
                there(behind.api, behind.namespace),
                behind.op.tracebacks(),
            )


def _counts(write: Write) -> bool:
    return not write.path.endswith("/events") and write.status < 300


def there(api: Api, namespace: str) -> list[str]:
    """Kind and name of what is there of the job."""
    found = [(kind, each) for kind in KINDS for each in api.list(kind, namespace, {"finetune.dev/job": NAME})]
    clusters = api.list(jobs.RAY_CLUSTER, namespace, {"finetune.dev/stage": "prepare"})
    found += [(jobs.RAY_CLUSTER, each) for each in clusters]
    return sorted(f"{kind} {each['metadata']['name']}" for kind, each in found)


def normal(value: Any, namespace: str, uid: str) -> Any:
    """Without times, measured figures and names that differ from life to life."""
    if isinstance(value, dict):
        kept = {key: each for key, each in value.items() if key not in UNIQUE}
        return {
            key: "differs" if key in MEASURED or key.lower().endswith("time") else normal(each, namespace, uid)
            for key, each in kept.items()
        }
    if isinstance(value, list):
        return [normal(each, namespace, uid) for each in value]
    if isinstance(value, str):
        text = value.replace(uid, "UID").replace(uid[:8], "UID").replace(namespace, "NAMESPACE")
        return re.sub(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", "TIME", text)
    return value


def kills(story: Story, undisturbed: End) -> range:
    """Numbers of the writes after which the operator is killed: those in which the life is not like a good one."""
    methods = [write.method for write in undisturbed.writes]
    if story is MANY_ROWS:
        return range(1, methods.index("DELETE") + 3)  # the cluster that prepares is deleted, and training begins
    first = 1 if story is GOOD else methods.index("DELETE") - 1  # the end of the first attempt is recorded before that
    return range(first, len(methods) + 1)


@pytest.fixture(scope="module")
def world(local_cluster: Cluster, api: Api, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with jobs.runtime(api) as runtime, Kubelet(local_cluster) as kubelet:
        yield World(local_cluster, kubelet, runtime, tmp_path_factory.mktemp("crash"))


@pytest.fixture(scope="module")
def ends(world: World) -> Mapping[str, Sequence[End]]:
    """By story, the end of the undisturbed life, then those of lives with a kill."""
    with ThreadPoolExecutor(LANES) as lanes:
        undisturbed = list(lanes.map(world.live, STORIES))
        disturbed = [
            [lanes.submit(world.live, story, number) for number in kills(story, whole)]
            for story, whole in zip(STORIES, undisturbed, strict=True)
        ]
        return {
            story.name: [whole, *(life.result() for life in lives)]
            for story, whole, lives in zip(STORIES, undisturbed, disturbed, strict=True)
        }


@pytest.fixture(scope="module")
def made(world: World, ends: Mapping[str, Sequence[End]]) -> Mapping[str, Sequence[Object]]:
    """By namespace, what the operator has made, in the order of names."""
    found = made_by_operators(world.cluster)
    return {
        end.namespace: sorted(
            (normal(each, end.namespace, end.uid) for each in found[end.namespace]),
            key=lambda each: (each["kind"], each["metadata"]["name"]),
        )
        for lives in ends.values()
        for end in lives
    }


@pytest.mark.parametrize("story", STORIES, ids=lambda story: story.name)
def test_a_kill_after_any_write_changes_nothing_in_the_end(
    story: Story, ends: Mapping[str, Sequence[End]], made: Mapping[str, Sequence[Object]]
) -> None:
    whole, *others = ends[story.name]
    for end in others:
        assert end.status == whole.status, end.title
        assert end.there == whole.there, end.title
        assert made[end.namespace] == made[whole.namespace], end.title
        assert end.tracebacks == [], end.title


@pytest.mark.parametrize("story", STORIES, ids=lambda story: story.name)
def test_each_thing_is_made_once(
    story: Story, ends: Mapping[str, Sequence[End]], made: Mapping[str, Sequence[Object]]
) -> None:
    attempts = 1 if story in (GOOD, MANY_ROWS) else 2
    stages = ["prepare", *(f"a{number}" for number in range(1, attempts + 1))]
    expected = [("ConfigMap", f"{NAME}-{stage}") for stage in stages]
    expected += [("Job", f"{NAME}-prepare"), ("NetworkPolicy", NAME)]
    expected += [("RayCluster", f"{NAME}-prepare-ray")] if story is MANY_ROWS else []
    expected += [("RayJob", f"{NAME}-a{number}") for number in range(1, attempts + 1)]
    for end in ends[story.name]:
        found = [(each["kind"], each["metadata"]["name"]) for each in made[end.namespace]]
        assert sorted(found) == sorted(expected), end.title


def test_what_is_left_to_do_is_done_soon_after_the_restart(ends: Mapping[str, Sequence[End]]) -> None:
    killed = [end for lives in ends.values() for end in lives if end.killed]
    late = [end for end in killed if end.work_done]
    slowest = max(late, key=lambda end: end.seconds)
    print(f"{len(killed)} kills; slowest of {len(late)} after the work: {slowest.seconds:.1f} s, {slowest.title}")
    assert slowest.seconds <= CATCH_UP_SECONDS
    # Progress is written when it is heard of, so a life may have a write less than the undisturbed one.
    assert len(killed) >= 0.9 * sum(len(lives) - 1 for lives in ends.values())
