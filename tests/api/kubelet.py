"""A scripted kubelet: `with Kubelet(cluster) as kubelet: kubelet.script(namespace, job, Script(...))`.

Nothing runs in this tier's pods. This moves them: it finds them a node, starts their containers, ends them by their
script and removes them when they are deleted. It mounts what they mount, and so waits for what is missing. For heads
it answers as Ray's dashboard, for KubeRay, and as the trainer, for the operator. Each head has an address of its own
on loopback, which takes Linux. It is scheduler, kubelet and Ray; all else is done by the real parts.
"""

from __future__ import annotations

import asyncio
import json
import random
import ssl
import threading
from collections.abc import Coroutine, Iterator
from contextlib import suppress
from types import TracebackType
from typing import Any, Final

import aiohttp
from aiohttp import web

from tests.api.attempt import Attempt
from tests.api.cluster import Cluster
from tests.api.pods import NODES, STRATEGIC, LivingPod, now
from tests.api.script import Fault, Script, Stage, Work

Json = dict[str, Any]
_SELECTOR: Final = "finetune.dev/job,finetune.dev/stage"  # a test may make pods without a stage, for itself


class Kubelet:
    """Plays all kubelets of a cluster, in a thread of its own. A job without a script gets `default`."""

    def __init__(self, cluster: Cluster, default: Script | None = None) -> None:
        self.default = default or Script()
        self.attempts: dict[tuple[str, str], Attempt] = {}  # by namespace and RayCluster
        self.nodes: list[str] = []
        self._cluster = cluster
        self._scripts: dict[tuple[str, str], Script] = {}
        self._works: dict[tuple[str, str], Work] = {}
        self._pods: dict[str, LivingPod] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._errors: list[BaseException] = []
        self._word = f"{random.randrange(16**5):05x}"
        self._addresses = _addresses(random.randrange(1, 255))
        self._started = threading.Event()
        self._stopping: asyncio.Event
        self._session: aiohttp.ClientSession
        self._loop: asyncio.AbstractEventLoop
        self._thread = threading.Thread(target=self._run, name="kubelet", daemon=True)

    def __enter__(self) -> Kubelet:
        self._thread.start()
        self._started.wait(30)
        self._raise()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join()
        if error is None:
            self._raise()

    def script(self, namespace: str, job: str, script: Script) -> None:
        """Says what is to happen to a job's pods, before it is created."""
        self._scripts[namespace, job] = script

    def work(self, namespace: str, job: str) -> Work:
        """What the job has left in storage."""
        return self._works.setdefault((namespace, job), Work())

    def meet(self, namespace: str, job: str, fault: Fault) -> None:
        """Lets something happen to the job's newest attempt, now."""
        attempt = max(
            (
                each
                for each in self.attempts.values()
                if each.run and (each.run.name, each.namespace) == (job, namespace)
            ),
            key=lambda each: each.number,
        )
        asyncio.run_coroutine_threadsafe(fault(attempt), self._loop).result(30)

    def lost(self, uid: str) -> bool:
        """Whether this pod's node is lost, so that nobody can say whether the pod still runs."""
        pod = self._pods.get(uid)
        return pod is not None and pod.silent

    # For pods and attempts, in the kubelet's thread.

    def script_of(self, namespace: str, job: str) -> Script:
        return self._scripts.get((namespace, job), self.default)

    def prepare_of(self, namespace: str, job: str) -> Stage:
        """What the job's next pod that prepares does."""
        script, work = self.script_of(namespace, job), self.work(namespace, job)
        work.prepared += 1
        return script.prepare_again if script.prepare_again and work.prepared > 1 else script.prepare

    def attempt_of(self, namespace: str, cluster: str, job: str, number: int) -> Attempt:
        """The attempt with a RayCluster of this name."""
        if (namespace, cluster) not in self.attempts:
            script = self.script_of(namespace, job).attempt(number)
            self.attempts[namespace, cluster] = Attempt(self, namespace, number, script, self.work(namespace, job))
        return self.attempts[namespace, cluster]

    def address(self) -> str:
        return next(self._addresses)

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """A task whose error is the test's."""
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    async def exchange(
        self, verb: str, path: str, body: object = None, kind: str = "application/json", *, may_fail: bool = False
    ) -> Json | None:
        """Asks the API server; None when the object is going or has changed, and with `may_fail` at any refusal.

        Raises:
            RuntimeError: the API server refused.
        """
        data = None if body is None else json.dumps(body)
        async with self._session.request(verb, path, data=data, headers={"Content-Type": kind}) as answer:
            text = await answer.text()
        leaving = answer.status == 403 and "being terminated" in text  # its namespace is, and it with that
        if answer.status in (404, 409) or leaving or (may_fail and answer.status >= 400):
            return None
        if answer.status >= 400:
            raise RuntimeError(f"{verb} {path}: {answer.status}: {text}")
        found: Json = json.loads(text)
        return found

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            self._errors.append(error)

    def _raise(self) -> None:
        if self._errors:
            raise self._errors[0]

    def _run(self) -> None:
        try:
            asyncio.run(self._live())
        except BaseException as error:  # it is raised in the test's thread
            self._errors.append(error)
        finally:
            self._started.set()

    async def _live(self) -> None:
        self._loop, self._stopping = asyncio.get_running_loop(), asyncio.Event()
        connector = aiohttp.TCPConnector(ssl=ssl.create_default_context(cafile=self._cluster.ca), limit=64)
        headers = {"Authorization": f"Bearer {self._cluster.token('admin')}"}
        dashboards = web.ServerRunner(web.Server(self._answer_kuberay))
        await dashboards.setup()
        await web.TCPSite(dashboards, "127.0.0.1", self._cluster.ray_proxy_port).start()
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10)
        try:
            async with aiohttp.ClientSession(
                self._cluster.url, connector=connector, headers=headers, timeout=timeout
            ) as self._session:
                for _ in range(NODES):
                    await self.add_node()
                self.spawn(self._watch())
                self._started.set()
                await self._stopping.wait()
                for task in list(self._tasks):
                    task.cancel()
                await asyncio.gather(*self._tasks, return_exceptions=True)
                for attempt in self.attempts.values():
                    await attempt.close()
                for node in self.nodes:
                    await self.exchange("DELETE", f"/api/v1/nodes/{node}")
        finally:
            await dashboards.cleanup()

    async def add_node(self) -> str:
        """A new node, which is well."""
        name = f"node-{self._word}-{len(self.nodes)}"
        self.nodes.append(name)
        await self.exchange("POST", "/api/v1/nodes", {"metadata": {"name": name}})
        await self.set_node(name, ready=True)
        return name

    async def set_node(self, name: str, *, ready: bool) -> None:
        """Says of a node that it is well, or not heard of."""
        condition = {
            "type": "Ready",
            "status": "True" if ready else "Unknown",
            "reason": "KubeletReady" if ready else "NodeStatusUnknown",
            "message": "kubelet is posting ready status" if ready else "Kubelet stopped posting node status.",
            "lastTransitionTime": now(),
        }
        await self.exchange("PATCH", f"/api/v1/nodes/{name}/status", {"status": {"conditions": [condition]}}, STRATEGIC)

    async def _watch(self) -> None:
        """Follows the pods of all jobs, for ever."""
        query = f"/api/v1/pods?labelSelector={_SELECTOR}"
        while True:
            pods = await self.exchange("GET", query)
            assert pods is not None
            for pod in pods["items"]:
                self._see("ADDED", pod)
            version = pods["metadata"]["resourceVersion"]
            with suppress(aiohttp.ClientError):  # cut: listed anew
                async with self._session.get(
                    f"{query}&watch=1&resourceVersion={version}", read_bufsize=1 << 22
                ) as answer:
                    async for line in answer.content:
                        event = json.loads(line)
                        if event["type"] == "ERROR":
                            break
                        self._see(event["type"], event["object"])

    def _see(self, event: str, manifest: Json) -> None:
        uid = manifest["metadata"]["uid"]
        if event == "DELETED":
            if pod := self._pods.pop(uid, None):
                self.spawn(pod.gone())
        elif uid in self._pods:
            self._pods[uid].see(manifest)
        elif not (node := manifest["spec"].get("nodeName")) or node in self.nodes:  # else another one's, who has gone
            self._pods[uid] = LivingPod(self, manifest)

    async def _answer_kuberay(self, request: web.BaseRequest) -> web.StreamResponse:
        service, namespace, *_ = [*(request.url.host or "").split("."), ""]
        if not request.headers.get("x-ray-authorization"):
            return web.Response(status=401, text="Unauthorized: Missing authentication token")
        attempt = self.attempts.get((namespace, service.removesuffix("-head-svc")))
        if attempt is None:
            return web.Response(status=502, text="Bad Gateway")
        body = json.loads(await request.text() or "{}")
        status, said = attempt.answer(request.method, request.path, body)
        if isinstance(said, str):
            return web.Response(status=status, text=said)
        return web.json_response(said, status=status)


def _addresses(second: int) -> Iterator[str]:
    """Loopback addresses; another kubelet on this machine most probably has others."""
    return (f"127.{second}.{third}.{fourth}" for third in range(256) for fourth in range(1, 255))
