"""The logs of a job's pods: which ones in which order, one after the other or all of them as they come.

Logs live as long as their pods. The operator deletes the pods of an attempt when it has ended, so that nothing holds a
GPU; of such an attempt only what `status.failures` says is left.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from finetune_api.stage import RANK_MARK
from finetune_operator.children.labels import STAGE_LABEL
from finetune_operator.children.names import attempt_of
from finetune_operator.plugin.cluster import Cluster, ClusterError
from finetune_operator.plugin.reading import Shown, read

STAGES: Final = ("prepare", "train", "result")
_LOOK_SECONDS: Final = 2.0


@dataclass(frozen=True)
class Wanted:
    """What of a job's logs is asked for; None and False: all of it.

    Attributes:
        rank: only lines that this rank wrote.
        tail: that many last lines of each pod.
        previous: of the container that ran before the last restart.
    """

    stage: str | None = None
    attempt: int | None = None
    head: bool = False
    rank: int | None = None
    tail: int | None = None
    previous: bool = False

    def takes(self, source: Source) -> bool:
        """Whether a pod's log is asked for. Head and ranks are training's."""
        of_training = self.head or self.rank is not None or self.attempt is not None
        return (
            self.stage in (None, source.stage)
            and (not of_training or source.stage == "train")
            and (self.attempt in (None, source.attempt))
            and (not self.head or source.head)
            and (self.rank is None or not source.head)
        )

    def keeps(self, line: bytes) -> bool:
        return self.rank is None or line.startswith(RANK_MARK.format(self.rank).encode())


@dataclass(frozen=True)
class Source:
    """One container's log.

    Attributes:
        restarts: of the container; its log begins anew with each.
        waiting: why it has not started; empty: it has.
        running: it may still write.
    """

    pod: str
    uid: str
    container: str
    stage: str
    attempt: int
    head: bool
    restarts: int
    waiting: str
    running: bool


def sources(pods: Iterable[Mapping[str, Any]], wanted: Wanted) -> list[Source]:
    """The logs that are asked for: prepare, then each attempt with its head first, then result.

    Not those of the Ray cluster that prepare may have: all that it has to say is in its driver's.
    """
    telling = (pod for pod in pods if not _only_works(pod["metadata"].get("labels", {})))
    found = [source for source in map(_source, telling) if source.stage in STAGES and wanted.takes(source)]
    return sorted(found, key=lambda each: (STAGES.index(each.stage), each.attempt, not each.head, each.pod))


def _only_works(marks: Mapping[str, str]) -> bool:
    return marks.get(STAGE_LABEL) == "prepare" and "ray.io/node-type" in marks


def _source(pod: Mapping[str, Any]) -> Source:
    metadata, status = pod["metadata"], pod.get("status") or {}
    marks = metadata.get("labels", {})
    container = pod["spec"]["containers"][0]["name"]
    states = [each for each in status.get("containerStatuses", []) if each["name"] == container]
    state: Mapping[str, Any] = states[0] if states else {}
    now, ended = state.get("state") or {}, status.get("phase") in ("Succeeded", "Failed")
    started = "running" in now or "terminated" in now or state.get("restartCount", 0) > 0
    waiting = "" if started or ended else (now.get("waiting") or {}).get("reason") or status.get("phase", "Pending")
    return Source(
        pod=metadata["name"],
        uid=metadata["uid"],
        container=container,
        stage=marks.get(STAGE_LABEL, ""),
        attempt=attempt_of(marks) or 0,
        head=marks.get("ray.io/node-type") == "head",
        restarts=state.get("restartCount", 0),
        waiting=waiting,
        running="running" in now,
    )


def nothing(job: Shown, wanted: Wanted) -> tuple[str, str]:
    """Why there is no log to show, and a hint. For when no pod is there."""
    which = f" of attempt {wanted.attempt}" if wanted.attempt is not None else ""
    which += f" of stage {wanted.stage}" if wanted.stage else ""
    newest = job.status.attempt or 0
    if wanted.attempt is not None and wanted.attempt > newest:
        tried = f"its newest is {newest}" if newest else "it has none yet"
        return f"{job.name} has no attempt {wanted.attempt}: {tried}", "`kubectl finetune status` shows where it is"
    what = f"{job.name} has no pods{which}; logs go with their pods"
    failed = [failure for failure in job.status.failures if wanted.attempt in (None, failure.attempt)]
    if failed:
        return what, f"attempt {failed[-1].attempt} failed: {failed[-1].reason}: {failed[-1].message}"
    return what, f"it is {job.phase}: {job.status.message or 'the operator has not looked at it yet'}"


def lost_attempts(job: Shown, shown: Iterable[Source]) -> list[int]:
    """Attempts that were and of which no pod is left."""
    there = {source.attempt for source in shown if source.stage == "train"}
    return [number for number in range(1, (job.status.attempt or 0) + 1) if number not in there]


class Printer:
    """Writes lines of several logs to one stream, whole ones at a time."""

    def __init__(self, write: Callable[[bytes], object], remark: Callable[[str], object], *, prefix: bool) -> None:
        self._write, self._remark, self._prefix = write, remark, prefix
        self._lock = threading.Lock()

    def line(self, source: Source, line: bytes) -> None:
        head = f"[{source.pod}] ".encode() if self._prefix else b""
        with self._lock:
            self._write(head + line + b"\n")

    def remark(self, text: str) -> None:
        with self._lock:
            self._remark(text)


def show(cluster: Cluster, chosen: Sequence[Source], wanted: Wanted, printer: Printer) -> int:
    """Prints the logs one after the other; returns how many lines."""
    printed = 0
    for source in chosen:
        if source.waiting:
            printer.remark(f"{source.pod} has not started: {source.waiting}")
            continue
        printed += _copy(cluster, source, wanted, printer)
    return printed


def follow(cluster: Cluster, name: str, wanted: Wanted, printer: Printer) -> None:
    """Prints all logs as they come, also of pods that come later, until the job has ended and nothing more comes."""
    following: dict[tuple[str, int], _Following] = {}
    tail = wanted.tail
    while True:
        try:
            ended = read(cluster.job(name)).ended
            chosen = sources(cluster.pods(name), wanted)
        except ClusterError as error:
            if not error.passing:
                raise
            printer.remark(str(error))
            time.sleep(_LOOK_SECONDS)
            continue
        for source in chosen:
            key = (source.uid, source.restarts)
            before = following.get(key)
            if source.waiting or (before and (before.is_alive() or not source.running)):
                continue
            since = None if before is None else int(time.monotonic() - before.last) + 1
            following[key] = _Following(cluster, source, wanted, printer, None if before else tail, since)
            following[key].start()
        tail = None  # of pods that come later everything is new
        if ended and not any(thread.is_alive() for thread in following.values()):
            return
        time.sleep(_LOOK_SECONDS)


class _Following(threading.Thread):
    """Copies one log until it ends. `last` is when its last line came, by the monotonic clock."""

    def __init__(
        self, cluster: Cluster, source: Source, wanted: Wanted, printer: Printer, tail: int | None, since: int | None
    ) -> None:
        super().__init__(daemon=True, name=source.pod)
        self.last = time.monotonic()
        self._cluster, self._source, self._wanted, self._printer = cluster, source, wanted, printer
        self._tail, self._since = tail, since

    def run(self) -> None:
        source = self._source
        try:
            for line in self._cluster.log(
                source.pod,
                source.container,
                follow=True,
                previous=False,
                tail=self._tail,
                seconds=self._since,
            ):
                self.last = time.monotonic()
                if self._wanted.keeps(line):
                    self._printer.line(source, line)
        except ClusterError as error:
            self._printer.remark(f"{source.pod}: {error.what}")


def _copy(cluster: Cluster, source: Source, wanted: Wanted, printer: Printer) -> int:
    printed = 0
    try:
        for line in cluster.log(
            source.pod, source.container, follow=False, previous=wanted.previous, tail=wanted.tail, seconds=None
        ):
            if wanted.keeps(line):
                printer.line(source, line)
                printed += 1
    except ClusterError as error:
        if error.status not in (400, 404):
            raise
        printer.remark(f"{source.pod}: {error.what}")  # it has gone meanwhile, or never was started before
    return printed
