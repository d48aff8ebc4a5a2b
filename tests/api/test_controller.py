"""The controller's parts together on the real API server: what wakes a job, what is exposed, how it ends."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from finetune_operator.client import FINETUNE_JOBS, FINETUNE_RUNTIMES, PODS, ApiError, Client
from finetune_operator.controller import Controller, Stores
from finetune_operator.election import Election
from finetune_operator.settings import Settings
from finetune_operator.store import JOB_LABEL, Key
from tests.api.cluster import Cluster
from tests.api.objects import Api, eventually
from tests.api.proxy import Proxy
from tests.unit.api_cases import JOB, RUNTIME, changed


class Recorder:
    """A reconciler that notes its keys, and fails when told to. The real one has its own tests."""

    def __init__(self, stores: Stores) -> None:
        self.stores = stores
        self.seen: list[Key] = []
        self.errors: list[Exception] = []
        self.again: float | None = None
        self.holds = asyncio.Event()
        self.holds.set()
        self.finished = 0
        self.closed = False

    async def reconcile(self, key: Key) -> float | None:
        self.seen.append(key)
        await self.holds.wait()
        if self.errors:
            raise self.errors.pop(0)
        self.finished += 1
        return self.again

    async def close(self) -> None:
        self.closed = True


@dataclass
class Running:
    """A replica, and a client of somebody else."""

    controller: Controller
    recorder: Recorder
    outside: Client
    stop: asyncio.Event
    task: asyncio.Task[None]

    def count(self, key: Key) -> int:
        return self.recorder.seen.count(key)

    async def page(self, path: str) -> tuple[int, str]:
        """Status and text of a page, wherever it is served."""
        async with aiohttp.ClientSession() as session:
            for host, port in self.controller.listening:
                async with session.get(f"http://{host}:{port}{path}") as answer:
                    if answer.status != 404:
                        return answer.status, await answer.text()
        raise AssertionError(f"nobody serves {path}")


@pytest.fixture
def settings(api_cluster: Cluster, namespace: str) -> Settings:
    return Settings(
        kubeconfig=str(api_cluster.kubeconfig),
        namespaces=(namespace,),
        operator_namespace=namespace,
        lease_duration=3,
        metrics_bind_address="127.0.0.1:0",
        health_bind_address="127.0.0.1:0",
    )


@asynccontextmanager
async def running(settings: Settings, elect: bool = False) -> AsyncIterator[Running]:
    stop = asyncio.Event()
    recorders: list[Recorder] = []

    def recorder(_client: Client, stores: Stores, _settings: Settings) -> Recorder:
        recorders.append(Recorder(stores))
        return recorders[0]

    async with Client.connect(settings) as client, Client.connect(settings) as outside:
        election = Election(outside, settings) if elect else None
        controller = Controller(settings, client, recorder, election)
        task = asyncio.create_task(controller.run(stop))
        try:
            yield Running(controller, recorders[0], outside, stop, task)
        finally:
            stop.set()
            await asyncio.wait_for(task, 30)


async def until(holds: Callable[[], object], seconds: float = 15) -> None:
    start = time.monotonic()
    while not holds():
        assert time.monotonic() - start < seconds, f"not within {seconds} s"
        await asyncio.sleep(0.02)


def job(name: str, runtime: str = "h200") -> dict[str, Any]:
    return changed(JOB, {"metadata.name": name, "spec.runtimeRef.name": runtime})


def pod_of(name: str) -> dict[str, Any]:
    """A pod that belongs to a job."""
    metadata = {"name": f"{name}-pod", "labels": {JOB_LABEL: name}}
    spec = {"containers": [{"name": "c", "image": "none"}]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def test_a_job_its_children_and_its_runtime_wake_it(settings: Settings, namespace: str) -> None:
    async def test() -> None:
        async with running(settings) as replica:
            client, key, other = replica.outside, (namespace, "one"), (namespace, "two")
            runtime = f"r-{namespace}"

            async def wakes(change: Awaitable[object], who: Key) -> None:
                before = replica.count(who)
                await change
                await until(lambda: replica.count(who) > before)

            for each in (key, other):
                await wakes(client.create(FINETUNE_JOBS, namespace, job(each[1], runtime)), each)
            found = replica.recorder.stores.jobs.get(key)
            assert found
            assert "managedFields" not in found["metadata"]

            alone = replica.count(other)
            await wakes(client.create(PODS, namespace, pod_of("one")), key)
            [stored] = replica.recorder.stores.pods.of_job(key)
            assert stored["spec"]["containers"] == [{"name": "c", "resources": {}}]
            await wakes(client.delete(PODS, namespace, "one-pod", grace_seconds=0), key)
            assert replica.count(other) == alone

            made = client.create(FINETUNE_RUNTIMES, None, changed(RUNTIME, {"metadata.name": runtime}))
            await wakes(made, other)
            await wakes(client.delete(FINETUNE_RUNTIMES, None, runtime), other)

    asyncio.run(test())


def test_what_fails_is_tried_again_and_said_once(
    settings: Settings, namespace: str, capsys: pytest.CaptureFixture[str]
) -> None:
    async def test() -> None:
        async with running(settings) as replica:
            key = (namespace, "one")
            replica.recorder.errors = [ApiError(500, "InternalError", "etcd is busy"), KeyError("spec")]
            await replica.outside.create(FINETUNE_JOBS, namespace, job("one"))
            await until(lambda: replica.recorder.finished == 1)
            assert replica.count(key) == 3
            _, text = await replica.page("/metrics")
            assert 'finetune_operator_reconcile_errors_total{reason="InternalError"} 1.0' in text
            assert 'finetune_operator_reconcile_errors_total{reason="KeyError"} 1.0' in text

    asyncio.run(test())
    log = capsys.readouterr().out
    assert log.count("etcd is busy") == 1
    assert log.count("Traceback") == 1, "of what nobody foresaw only"


def test_a_job_is_looked_at_again_when_it_wishes_so(settings: Settings, namespace: str) -> None:
    async def test() -> None:
        async with running(settings) as replica:
            replica.recorder.again = 0.1
            await replica.outside.create(FINETUNE_JOBS, namespace, job("one"))
            await until(lambda: replica.count((namespace, "one")) >= 5)

    asyncio.run(test())


def test_only_the_leader_works_and_the_next_one_looks_at_every_job(settings: Settings, namespace: str) -> None:
    async def test() -> None:
        async with running(settings, elect=True) as first:
            await until(lambda: first.controller.election and first.controller.election.leading.is_set())
            await first.outside.create(FINETUNE_JOBS, namespace, job("one"))
            await until(lambda: first.recorder.seen)
            async with running(settings, elect=True) as second:
                await until(lambda: not second.controller.unready())
                assert await second.page("/readyz") == (200, "ok\n"), "a standby is ready to take over"
                assert len(second.recorder.stores.jobs) == 1
                assert "finetune_operator_leader 0.0" in (await second.page("/metrics"))[1]
                assert "finetune_jobs{" not in (await second.page("/metrics"))[1], "or every job counted twice"
                assert "finetune_jobs{" in (await first.page("/metrics"))[1]
                await asyncio.sleep(1)
                assert not second.recorder.seen
                first.stop.set()
                await first.task
                await until(lambda: second.recorder.seen == [(namespace, "one")])

    asyncio.run(test())


def test_a_new_leader_knows_what_a_dead_watch_has_kept_from_it(
    settings: Settings, namespace: str, local_cluster: Cluster, tmp_path: Path
) -> None:
    async def test(proxy: Proxy) -> None:
        kubeconfig = proxy.kubeconfig(tmp_path / "kubeconfig", local_cluster.token("admin"))
        behind = replace(settings, kubeconfig=str(kubeconfig))
        async with running(settings, elect=True) as first:
            await until(lambda: first.controller.election and first.controller.election.leading.is_set())
            async with running(behind, elect=True) as second:
                await until(lambda: not second.controller.unready())
                proxy.faults.only, proxy.faults.silent_watches = "/pods", True
                await asyncio.sleep(0.5)
                await first.outside.create(PODS, namespace, pod_of("one"))
                await first.outside.create(FINETUNE_JOBS, namespace, job("one"))
                await until(lambda: second.recorder.stores.jobs.get((namespace, "one")))
                assert not second.recorder.stores.pods.of_job((namespace, "one"))
                first.stop.set()
                await until(lambda: second.recorder.seen)
                assert second.recorder.stores.pods.of_job((namespace, "one"))

    with Proxy(local_cluster.url, local_cluster.ca) as proxy:
        asyncio.run(test(proxy))


def test_a_replica_that_is_told_to_end_finishes_what_it_has_begun(settings: Settings, namespace: str) -> None:
    async def test() -> None:
        async with running(settings, elect=True) as replica:
            replica.recorder.holds.clear()
            await replica.outside.create(FINETUNE_JOBS, namespace, job("one"))
            await until(lambda: replica.recorder.seen)
            replica.stop.set()
            await replica.outside.create(FINETUNE_JOBS, namespace, job("two"))
            await asyncio.sleep(0.5)
            assert not replica.task.done()
            replica.recorder.holds.set()
            await replica.task
            assert replica.recorder.finished == 1
            assert replica.recorder.seen == [(namespace, "one")]
            assert replica.recorder.closed

    asyncio.run(test())


def test_health_says_what_is_wrong(settings: Settings, namespace: str) -> None:
    async def test() -> None:
        async with running(settings) as replica:
            await until(lambda: not replica.controller.unready())
            assert await replica.page("/healthz") == (200, "ok\n")
            jobs = replica.controller.reflectors[0]
            jobs._proved -= 100
            status, text = await replica.page("/healthz")
            assert status == 503
            assert "finetunejobs: nothing certain for 100 s" in text
            jobs.failed = ApiError(0, "Unreachable", "connection refused")
            assert (await replica.page("/healthz"))[0] == 200, "a restart brings no API server back"
            assert "connection refused" in (await replica.page("/readyz"))[1]

    asyncio.run(test())


def test_a_missing_kubeconfig_is_a_sentence(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "finetune_api", "operator", "--kubeconfig", str(tmp_path / "none")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "--kubeconfig" in done.stderr


def test_the_command_ends_well_on_sigterm(settings: Settings, api: Api, namespace: str, tmp_path: Path) -> None:
    flags = asdict(settings)
    command = [sys.executable, "-m", "finetune_api", "operator", "--log-format=json"]
    names = ("kubeconfig", "operator_namespace", "metrics_bind_address", "health_bind_address")
    command += [f"--{name.replace('_', '-')}={flags[name]}" for name in names]
    log = tmp_path / "operator.log"
    lease = "coordination.k8s.io/v1/Lease"
    with log.open("wb") as file, subprocess.Popen([*command, f"--namespaces={namespace}"], stderr=file) as process:
        try:
            eventually(lambda: b"leading" in log.read_bytes() or process.poll() is not None, "a leader")
            holder = api.get(lease, "finetune-operator", namespace)["spec"]["holderIdentity"]
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0, log.read_text()
        finally:
            process.kill()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["event"] for line in lines] == ["starting", "leading", "stopping"]
    assert lines[1]["identity"] == holder
    assert [line["level"] for line in lines] == ["info"] * len(lines)
    assert not api.get(lease, "finetune-operator", namespace)["spec"].get("holderIdentity")
