"""Many ended jobs, some that train and one new one each second: what the operator costs, and how old its word is."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.scale.load import JOBS_API, MERGE, STRATEGIC, Json, Loader, all_of, loader
from benchmarks.scale.measure import Audit, Scrape, Usage, delays, programs, scrape, summary, usage
from benchmarks.scale.operator import running
from tests.api import jobs
from tests.api.attempt import Attempt
from tests.api.cluster import Cluster, cluster
from tests.api.kubelet import Kubelet
from tests.api.objects import Api, eventually, fresh_namespace
from tests.api.script import Script, Training

from finetune_api.job import FinetuneJobSpec
from finetune_api.runtime import FinetuneRuntimeSpec
from finetune_api.stage import ProgressReport
from finetune_operator.children.owner import Owner
from finetune_operator.children.prepare import prepare_job

AT_REST: Final = "bench-at-rest"  # label of pods that the scripted kubelet leaves alone
STEP_SECONDS: Final = 11.0  # with the operator's own 10 a job would be asked at one moment of its steps for ever
SETTLING_SECONDS: Final = 15.0
LONG: Final = Script(attempts=(Training(steps=100_000, step_seconds=STEP_SECONDS, checkpoint_every=6),))
LIMIT_SECONDS: Final = 600.0


@dataclass(frozen=True)
class Rest:
    """What was seen; delays and times in seconds, memory in bytes.

    Attributes:
        start_seconds: from the operator's start until every job at rest was reconciled.
        start_reconciles_per_second: meanwhile, from its first one.
        answer_delay: from the head's first answer with a new step until a watcher of the job reads that step.
        step_delay: the same from the step itself, so with the wait for the next look at the head.
        new_job_delay: from the answer to a job's creation to its first status.
        cpu: share of one core, by program.
        requests: per second, of the operator, by verb and resource.
    """

    at_rest: int
    training: int
    window_seconds: float
    start_seconds: float
    start_reconciles_per_second: float
    resident_bytes: int
    peak_bytes: int
    reconciles_per_second: float
    requests_per_second: float
    writes_per_second: float
    requests: dict[str, float]
    answer_delay: dict[str, float]
    step_delay: dict[str, float]
    new_job_delay: dict[str, float]
    errors: dict[str, int]
    cpu: dict[str, float]
    kuberay_requests_per_second: float
    kuberay_resident_bytes: int
    metrics_seconds: float
    metrics_bytes: int


class TimedAttempt(Attempt):
    """An attempt that remembers when each step was done and when the operator was first told."""

    def report(self) -> ProgressReport:
        report, now = super().report(), time.monotonic()
        if report.state == "training" and self.run:
            told = self._kubelet.told if isinstance(self._kubelet, TimedKubelet) else {}
            told.setdefault((self.run.name, report.step), (now - report.age, now))
        return report


class TimedKubelet(Kubelet):
    """Makes timed attempts, and leaves the pods of jobs at rest alone."""

    def __init__(self, c: Cluster) -> None:
        super().__init__(c)
        self.told: dict[tuple[str, int], tuple[float, float]] = {}

    def attempt_of(self, namespace: str, cluster: str, job: str, number: int) -> Attempt:
        if (namespace, cluster) not in self.attempts:
            script, work = self.script_of(namespace, job).attempt(number), self.work(namespace, job)
            self.attempts[namespace, cluster] = TimedAttempt(self, namespace, number, script, work)
        return self.attempts[namespace, cluster]

    def _see(self, event: str, manifest: Json) -> None:
        if AT_REST not in manifest["metadata"]["labels"]:
            super()._see(event, manifest)


def rest(folder: Path, at_rest: int, training: int, seconds: float) -> Rest:
    """Fills a cluster and measures for `seconds`."""
    with _world(folder) as (c, api, namespace, runtime, kubelet), running(c, folder) as (operator, port):
        ended = _one_life(api, namespace, runtime)
        operator.stop()
        asyncio.run(_fill(c, api, ended, at_rest))
        started = time.monotonic()
        operator.start()
        ready = time.monotonic()
        caught_up = _catch_up(port, at_rest)
        begun = caught_up.at - (time.time() - time.monotonic())
        return asyncio.run(
            _Measurement(c, kubelet, operator.pid, port, namespace, runtime).run(
                training,
                seconds,
                at_rest=at_rest,
                start_seconds=round(begun - started, 1),
                start_reconciles_per_second=round(caught_up.reconciles / (begun - ready), 1),
            )
        )


@contextmanager
def _world(folder: Path) -> Iterator[tuple[Cluster, Api, str, str, TimedKubelet]]:
    with (
        cluster(folder / "cluster") as c,
        Api(c.kubeconfig) as api,
        fresh_namespace(api) as namespace,
        jobs.runtime(api) as runtime,
        (kubelet := TimedKubelet(c)),
    ):
        yield c, api, namespace, runtime, kubelet


def _one_life(api: Api, namespace: str, runtime: str) -> Json:
    """A job that has gone all its way."""
    api.create(jobs.job("sample", runtime), namespace=namespace)
    return api.wait_for(
        jobs.JOB_KIND,
        "sample",
        namespace,
        lambda job: job.get("status", {}).get("phase") == "Complete",
        60,
    )


def _catch_up(port: int, count: int) -> Scrape:
    found: list[Scrape] = []

    def reconciled() -> bool:
        found.append(scrape(port))
        time.sleep(0.5)  # reading costs the operator time, too
        return found[-1].reconciles >= count and found[-1].depth == 0

    eventually(reconciled, "every job to be reconciled", LIMIT_SECONDS)
    return found[-1]


async def _fill(c: Cluster, api: Api, ended: Json, count: int) -> None:
    """Copies of an ended job, with what is left of it: its prepare Job and that one's pod."""
    namespace = ended["metadata"]["namespace"]
    runtime = FinetuneRuntimeSpec.model_validate(api.get(jobs.RUNTIME_KIND, ended["status"]["runtime"])["spec"])
    job = api.get("batch/v1/Job", "sample-prepare", namespace)
    (pod,) = api.list("v1/Pod", namespace, {"finetune.dev/job": "sample", "finetune.dev/stage": "prepare"})
    async with loader(c) as load:
        await all_of(_copy(load, f"rest-{number:05}", ended, job, pod, runtime) for number in range(count))


async def _copy(load: Loader, name: str, ended: Json, job: Json, pod: Json, runtime: FinetuneRuntimeSpec) -> None:
    namespace = ended["metadata"]["namespace"]
    path = f"{JOBS_API}/namespaces/{namespace}/finetunejobs"
    manifest = jobs.job(name, ended["status"]["runtime"])
    uid = (await load.send("POST", path, manifest))["metadata"]["uid"]
    await load.send("PATCH", f"{path}/{name}/status", {"status": ended["status"]}, MERGE)
    prepare = prepare_job(Owner(name, namespace, uid), FinetuneJobSpec.model_validate(manifest["spec"]), runtime)
    prepare["spec"]["managedBy"] = "example.com/benchmark"  # so that nobody makes it a pod
    path = f"/apis/batch/v1/namespaces/{namespace}/jobs"
    made = (await load.send("POST", path, prepare))["metadata"]
    await load.send("PATCH", f"{path}/{made['name']}/status", {"status": job["status"]}, MERGE)
    labels = pod["metadata"]["labels"] | {"finetune.dev/job": name, AT_REST: "", "job-name": made["name"]}
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": made["name"], "uid": made["uid"], "controller": True}
    metadata = {"name": f"{made['name']}-{pod['metadata']['name'][-5:]}", "labels": labels, "ownerReferences": [owner]}
    path = f"/api/v1/namespaces/{namespace}/pods"
    await load.send("POST", path, {"metadata": metadata, "spec": pod["spec"]})
    await load.send("PATCH", f"{path}/{metadata['name']}/status", {"status": pod["status"]}, STRATEGIC)


class _Measurement:
    """Lets jobs train, and watches them."""

    def __init__(self, c: Cluster, kubelet: TimedKubelet, pid: int, port: int, namespace: str, runtime: str) -> None:
        self._cluster, self._kubelet, self._port = c, kubelet, port
        self._namespace, self._runtime = namespace, runtime
        self._path = f"{JOBS_API}/namespaces/{namespace}/finetunejobs"
        ids = programs()
        self._pids = {
            "operator": pid,
            "KubeRay": ids["ray-operator"],
            "kube-apiserver": ids["kube-apiserver"],
            "etcd": ids["server"],
        }
        self._phases: dict[str, str] = {}
        self._shown: dict[tuple[str, int], float] = {}

    async def run(self, training: int, seconds: float, **more: Any) -> Rest:
        names = [f"training-{number:04}" for number in range(training)]
        for name in names:
            self._kubelet.script(self._namespace, name, LONG)
        async with loader(self._cluster) as load:
            watching = asyncio.create_task(self._watch(load))
            await all_of(self._create(load, name, "training") for name in names)
            async with asyncio.timeout(LIMIT_SECONDS):
                while Counter(self._phases.values())["Training"] < training:
                    await asyncio.sleep(0.5)
            await asyncio.sleep(SETTLING_SECONDS)
            before, used, since = await self._read()
            for number in range(int(seconds)):
                await asyncio.sleep(max(0.0, since + number + 1 - time.monotonic()))
                await self._create(load, f"new-{number:04}", "new")
            until = time.monotonic()
            after, now_used, _ = await self._read()
            await asyncio.sleep(SETTLING_SECONDS)  # for the last one's status
            watching.cancel()
        return self._rest(training, before, after, used, now_used, (since, until), more)

    async def _create(self, load: Loader, name: str, mark: str) -> None:
        manifest = jobs.job(name, self._runtime)
        manifest["metadata"]["labels"] = {"bench": mark}
        await load.send("POST", self._path, manifest)

    async def _watch(self, load: Loader) -> None:
        async for event in load.watch(f"{self._path}?watch=1&labelSelector=bench%3Dtraining"):
            now, job = time.monotonic(), event["object"]
            name, status = job["metadata"]["name"], job.get("status", {})
            self._phases[name] = status.get("phase", "")
            if "progress" in status:
                self._shown.setdefault((name, status["progress"]["step"]), now)

    def _when_shown(self, name: str, step: int) -> float:
        """When the status first had this step or a later one; never, if it has not."""
        return min(at for (job, shown), at in self._shown.items() if job == name and shown >= step)

    async def _read(self) -> tuple[Scrape, dict[str, Usage], float]:
        page = await asyncio.to_thread(scrape, self._port)
        return page, {name: usage(pid) for name, pid in self._pids.items()}, time.monotonic()

    def _rest(
        self,
        training: int,
        before: Scrape,
        after: Scrape,
        used: dict[str, Usage],
        now_used: dict[str, Usage],
        window: tuple[float, float],
        more: dict[str, Any],
    ) -> Rest:
        seconds = after.at - before.at
        told = {each: moments for each, moments in self._kubelet.told.items() if window[0] <= moments[1] <= window[1]}
        shown = {each: self._when_shown(*each) for each in told}
        requests = after.requests - before.requests
        audit = Audit(self._cluster)
        status = audit.of("finetune-operator", "patch", "finetunejobs/status")
        created = audit.of("admin", "create", "finetunejobs")
        kuberay = audit.requests("kuberay", before.at, after.at)
        return Rest(
            training=training,
            window_seconds=round(seconds, 1),
            resident_bytes=now_used["operator"].resident,
            peak_bytes=now_used["operator"].peak,
            reconciles_per_second=round((after.reconciles - before.reconciles) / seconds, 1),
            requests_per_second=round(requests.total() / seconds, 1),
            writes_per_second=round((after.writes - before.writes) / seconds, 1),
            requests={
                f"{verb} {resource}": round(number / seconds, 2)
                for (verb, resource), number in sorted(requests.items())
            },
            answer_delay=summary(delays({each: moments[1] for each, moments in told.items()}, shown)),
            step_delay=summary(delays({each: moments[0] for each, moments in told.items()}, shown)),
            new_job_delay=summary(
                delays({name: at for name, at in created.items() if name.startswith("new-")}, status)
            ),
            errors=dict(after.errors - before.errors),
            cpu={name: round((now_used[name].cpu - used[name].cpu) / seconds, 3) for name in used},
            kuberay_requests_per_second=round(kuberay.total() / seconds, 1),
            kuberay_resident_bytes=now_used["KubeRay"].resident,
            metrics_seconds=round(after.seconds, 3),
            metrics_bytes=after.size,
            **more,
        )
