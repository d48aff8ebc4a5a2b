"""Leader election on the real API server: one writer at a time, whatever happens to it."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest

from finetune_operator import rights
from finetune_operator.client import Client, Object
from finetune_operator.election import Election, LeadershipLost
from finetune_operator.settings import Settings
from tests.api import jobs
from tests.api.behind import made_by_operators
from tests.api.cluster import Cluster
from tests.api.kubelet import Kubelet
from tests.api.objects import Api, eventually
from tests.api.operator import operator
from tests.api.proxy import Proxy
from tests.api.script import Script, Training

LEASE_SECONDS = 3.0
LEASE = "coordination.k8s.io/v1/Lease"
RBAC = "rbac.authorization.k8s.io"


class Candidate(NamedTuple):
    election: Election
    task: asyncio.Task[None]


@asynccontextmanager
async def candidate(kubeconfig: Path, namespace: str) -> AsyncIterator[Candidate]:
    settings = Settings(
        kubeconfig=str(kubeconfig), operator_namespace=namespace, lease_duration=LEASE_SECONDS, request_timeout=1
    )
    async with Client.connect(settings) as client:
        election = Election(client, settings)
        task = asyncio.create_task(election.run())
        try:
            yield Candidate(election, task)
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def leads(election: Election, seconds: float) -> float:
    """Seconds until it leads."""
    start = time.monotonic()
    async with asyncio.timeout(seconds):
        await election.leading.wait()
    return time.monotonic() - start


def test_one_of_two_leads_and_the_other_follows_at_once_when_it_steps_down(
    api_cluster: Cluster, api: Api, namespace: str
) -> None:
    async def test() -> None:
        async with candidate(api_cluster.kubeconfig, namespace) as first:
            await leads(first.election, 5)
            first.election.guard()
            async with candidate(api_cluster.kubeconfig, namespace) as second:
                await asyncio.sleep(LEASE_SECONDS * 2)
                assert not second.election.leading.is_set()
                with pytest.raises(LeadershipLost):
                    second.election.guard()
                first.task.cancel()
                await first.election.release()
                with pytest.raises(LeadershipLost):
                    first.election.guard()
                assert await leads(second.election, 5) < LEASE_SECONDS
                second.election.guard()

    asyncio.run(test())
    spec = api.get(LEASE, "finetune-operator", namespace)["spec"]
    assert spec["leaseTransitions"] == 1
    assert spec["leaseDurationSeconds"] == LEASE_SECONDS


def test_a_leader_that_cannot_reach_the_server_stops_before_another_begins(
    local_cluster: Cluster, namespace: str, tmp_path: Path
) -> None:
    async def test(proxy: Proxy) -> None:
        behind_proxy = proxy.kubeconfig(tmp_path / "proxy.kubeconfig", local_cluster.token("admin"))
        async with candidate(behind_proxy, namespace) as first:
            await leads(first.election, 5)
            async with candidate(local_cluster.kubeconfig, namespace) as second:
                await asyncio.sleep(LEASE_SECONDS / 2)
                proxy.faults.away = True
                start = time.monotonic()
                with pytest.raises(LeadershipLost):
                    await first.task
                assert not second.election.leading.is_set()
                with pytest.raises(LeadershipLost):
                    first.election.guard()
                await leads(second.election, 10)
                assert time.monotonic() - start <= LEASE_SECONDS * 4 / 3 + 1  # 20 s of a lease of 15 s, and a bit

    with Proxy(local_cluster.url, local_cluster.ca) as proxy:
        asyncio.run(test(proxy))


def test_a_leader_goes_on_through_failures_shorter_than_its_deadline(
    local_cluster: Cluster, namespace: str, tmp_path: Path
) -> None:
    async def test(proxy: Proxy) -> None:
        kubeconfig = proxy.kubeconfig(tmp_path / "proxy.kubeconfig", local_cluster.token("admin"))
        async with candidate(kubeconfig, namespace) as only:
            await leads(only.election, 5)
            for _ in range(3):
                proxy.faults.away = True
                await asyncio.sleep(LEASE_SECONDS / 3)
                proxy.faults.away = False
                await asyncio.sleep(LEASE_SECONDS / 2)
            only.election.guard()
            assert not only.task.done()

    with Proxy(local_cluster.url, local_cluster.ca) as proxy:
        asyncio.run(test(proxy))


def test_a_leader_whose_lease_is_deleted_ends(api_cluster: Cluster, api: Api, namespace: str) -> None:
    async def test() -> None:
        async with candidate(api_cluster.kubeconfig, namespace) as only:
            await leads(only.election, 5)
            await asyncio.to_thread(api.delete, LEASE, "finetune-operator", namespace)
            with pytest.raises(LeadershipLost):
                await asyncio.wait_for(only.task, 5)

    asyncio.run(test())


@contextmanager
def replica(kubeconfig: Path, namespace: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "tests.api.candidate", str(kubeconfig), namespace, str(LEASE_SECONDS)]
    with log.open("wb") as file, subprocess.Popen(command, stderr=file) as process:
        try:
            yield process
        finally:
            process.kill()


def test_a_leader_that_was_stopped_past_its_lease_writes_nothing_more(
    local_cluster: Cluster, api: Api, namespace: str, tmp_path: Path
) -> None:
    verbs, resources = ["get", "create", "patch"], ["configmaps", "leases"]
    rule = {"apiGroups": ["", "coordination.k8s.io"], "resources": resources, "verbs": verbs}
    bind(api, "Role", "candidate", [rule], namespace)
    with ExitStack() as stack:
        replicas = {
            user: stack.enter_context(replica(local_cluster.user(user), namespace, tmp_path / f"{user}.log"))
            for user in ("operator-0", "operator-1")
        }
        first = eventually(lambda: newest_writer(local_cluster, namespace), "a leader that writes")
        second = next(user for user in replicas if user != first)
        replicas[first].send_signal(signal.SIGSTOP)
        stopped = time.monotonic()
        eventually(lambda: newest_writer(local_cluster, namespace) == second, "the other to take over")
        assert time.monotonic() - stopped <= LEASE_SECONDS * 4 / 3 + 1
        time.sleep(1)
        replicas[first].send_signal(signal.SIGCONT)
        assert replicas[first].wait(10) == 1
        time.sleep(1)
        assert replicas[second].poll() is None
    writers = [event["user"]["username"] for event in writes(local_cluster, namespace)]
    changes = sum(before != after for before, after in pairwise(writers))
    assert changes == 1, "the first wrote, then the second only"
    assert "the Lease" in (tmp_path / f"{first}.log").read_text()


def test_two_operators_of_which_the_first_is_stopped_past_its_lease_bring_jobs_to_their_end(
    local_cluster: Cluster, api: Api, namespace: str, tmp_path: Path
) -> None:
    """The lease is as long as it is by default; the jobs make the leader write all the time."""
    names = [f"job-{number}" for number in range(4)]
    with ExitStack() as stack:
        stack.enter_context(rights_of_operators(api, namespace))
        runtime = stack.enter_context(jobs.runtime(api))
        stack.enter_context(Kubelet(local_cluster, Script(attempts=(Training(steps=150),))))
        replicas = {}
        for user in ("operator-0", "operator-1"):
            started = operator(
                local_cluster,
                tmp_path / user,
                namespace,
                kubeconfig=local_cluster.user(user),
                flags={"leader-elect": "", "operator-namespace": namespace},
            )
            replicas[user] = stack.enter_context(started)
        for name in names:
            api.create(jobs.job(name, runtime), namespace=namespace)
        for name in names:
            api.wait_for(jobs.JOB_KIND, name, namespace, partial(is_in, "Training"), 60)
        first = newest_writer(local_cluster, namespace)
        second = next(user for user in replicas if user != first)
        replicas[first].signal(signal.SIGSTOP)
        stopped = time.monotonic()
        eventually(lambda: newest_writer(local_cluster, namespace) == second, "the other to take over")
        takeover = time.monotonic() - stopped
        print(f"takeover after {takeover:.1f} s")
        assert takeover <= 20
        replicas[first].signal(signal.SIGCONT)
        assert eventually(replicas[first].poll, "the one that was stopped to end", 10) == 1
        for name in names:
            done = api.wait_for(jobs.JOB_KIND, name, namespace, partial(is_in, "Complete"), 90)
            assert (done["status"]["attempt"], done["status"].get("failures", [])) == (1, [])
        assert replicas[second].tracebacks() == []
        assert [json.loads(line)["event"] for line in replicas[first].tracebacks()] == ["leadership lost"]
    writers = [event["user"]["username"] for event in writes(local_cluster, namespace)]
    assert sum(before != after for before, after in pairwise(writers)) == 1, "the first wrote, then the second only"
    ray_jobs = [made for made in made_by_operators(local_cluster)[namespace] if made["kind"] == "RayJob"]
    assert sorted(made["metadata"]["name"] for made in ray_jobs) == [f"{name}-a1" for name in names]


def is_in(phase: str, job: Object) -> bool:
    return bool(job.get("status", {}).get("phase") == phase)


@contextmanager
def rights_of_operators(api: Api, namespace: str) -> Iterator[None]:
    """Gives the operators' group what install.yaml gives the operator, with `namespace` as its own."""
    role = f"operator-of-{namespace}"
    everywhere = [right.rule() for right in (*rights.IN_JOB_NAMESPACES, *rights.IN_CLUSTER)]
    bind(api, "ClusterRole", role, everywhere)
    bind(api, "Role", role, [right.rule() for right in rights.IN_OWN_NAMESPACE], namespace)
    try:
        yield
    finally:
        for kind in ("ClusterRoleBinding", "ClusterRole"):
            api.delete(f"{RBAC}/v1/{kind}", role)


def bind(api: Api, kind: str, name: str, rules: Sequence[Object], namespace: str = "") -> None:
    """Makes a role and gives it to the operators' group."""
    meta = {"name": name} | ({"namespace": namespace} if namespace else {})
    api.create({"apiVersion": f"{RBAC}/v1", "kind": kind, "metadata": meta, "rules": rules})
    group = {"apiGroup": RBAC, "kind": "Group", "name": "finetune-operators"}
    binding = {"apiVersion": f"{RBAC}/v1", "kind": f"{kind}Binding", "metadata": meta}
    api.create(binding | {"roleRef": {"apiGroup": RBAC, "kind": kind, "name": name}, "subjects": [group]})


def writes(cluster: Cluster, namespace: str) -> list[Object]:
    """The API server's own record of the operators' good writes, in the order in which they reached it."""
    lines = (line for line in cluster.audit_log.read_text().splitlines(keepends=True) if namespace in line)
    events = [json.loads(line) for line in lines if line.endswith("\n")]
    good = [
        event
        for event in events
        if event["user"]["username"] in ("operator-0", "operator-1")
        and event["verb"] in ("create", "patch", "delete")
        and event["responseStatus"]["code"] < 300
        and event["objectRef"].get("namespace") == namespace
    ]
    return sorted(good, key=lambda event: str(event["requestReceivedTimestamp"]))


def newest_writer(cluster: Cluster, namespace: str) -> str:
    events = writes(cluster, namespace)
    return str(events[-1]["user"]["username"]) if events else ""
