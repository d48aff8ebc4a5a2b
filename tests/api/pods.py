"""One pod in the scripted kubelet's hands: from Pending over Running to its end and its removal."""

from __future__ import annotations

import asyncio
import itertools
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from finetune_api.run import RunConfig
from finetune_api.stage import StageFailure, StageReport
from tests.api.attempt import Attempt
from tests.api.script import Hold, Stage

if TYPE_CHECKING:
    from tests.api.kubelet import Kubelet

Json = dict[str, Any]
STRATEGIC: Final = "application/strategic-merge-patch+json"
NODES: Final = 4  # that all pods share
PLACING: Final = 0.05  # seconds, as all below
STARTING: Final = 0.1
GETTING_READY: Final = 0.1
LOOKING_AGAIN: Final = 1.0  # for what a volume is made of
RESTARTING: Final = 0.5
STOPPING: Final = 0.2
_LOST: Final = Stage(
    StageReport(failure=StageFailure(reason="Storage", message="There is no result.json in the job's work folder.")), 5
)
_turns = itertools.count()


def now() -> str:
    """The time as the API server writes it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class LivingPod:
    """A pod and what it does.

    Attributes:
        role: head, worker, or the stage of a pod that runs once.
        attempt: that it belongs to; None for a pod of prepare or result.
        ready: its containers run.
        silent: its node is lost.
    """

    def __init__(self, kubelet: Kubelet, manifest: Json) -> None:
        metadata = manifest["metadata"]
        labels = metadata["labels"]
        self.name, self.namespace, self.uid = metadata["name"], metadata["namespace"], metadata["uid"]
        self.job = labels["finetune.dev/job"]
        self.role = labels.get("ray.io/node-type") or labels["finetune.dev/stage"]
        self.node, self.ip = manifest["spec"].get("nodeName", ""), ""
        self.attempt: Attempt | None = None
        self._kubelet, self._manifest = kubelet, manifest
        if number := labels.get("finetune.dev/attempt") if "ray.io/cluster" in labels else None:
            self.attempt = kubelet.attempt_of(self.namespace, labels["ray.io/cluster"], self.job, int(number))
            self.attempt.pods[self.name] = self
        self._restarts = 0
        self._running = self.ready = self.silent = False
        self._ending: asyncio.Task[None] | None = None
        self._life = kubelet.spawn(self._live())
        self.see(manifest)

    def see(self, manifest: Json) -> None:
        """The pod has changed; when it is deleted it is told to end."""
        self._manifest = manifest
        if "deletionTimestamp" in manifest["metadata"] and not self.silent and self._ending is None:
            self._ending = self._kubelet.spawn(self._end())

    async def gone(self) -> None:
        """It is no more."""
        self._life.cancel()
        if self.attempt:
            self.attempt.pods.pop(self.name, None)
            if self.role == "head":
                await self.attempt.close()

    # What faults are made of.

    async def ends(self, exit_code: int, reason: str = "Error", message: str = "") -> None:
        """Its container ends; a worker's is started again, since its restartPolicy is Always."""
        ended = self._terminated(exit_code, reason, message)
        if self._manifest["spec"]["restartPolicy"] == "Never":
            await self._over("Succeeded" if exit_code == 0 else "Failed", ended)
            return
        await self._report("Running", ended, ready=False)
        await asyncio.sleep(RESTARTING)
        self._restarts += 1
        await self._report("Running", {"running": {"startedAt": now()}}, ready=True, last=ended)

    async def fails(self, reason: str, message: str) -> None:
        """Its node puts it out: the pod has failed, for want of memory or disk."""
        target = _condition("DisruptionTarget", True, "TerminationByKubelet", message)
        await self._over("Failed", self._terminated(137, "Error", ""), reason=reason, message=message, more=[target])

    async def is_taken(self, reason: str, message: str) -> None:
        """Somebody takes it away, with notice: a scheduler, an eviction, a drain."""
        target = _condition("DisruptionTarget", True, reason, message)
        await self._patch({"conditions": [target]})
        await self._kubelet.exchange("DELETE", self._path)

    async def vanishes(self) -> None:
        """It is removed at once."""
        await self._remove()

    async def loses_node(self) -> None:
        """Nobody hears from its node any more: the pod is not seen to end, even if it is deleted."""
        self.silent = True
        await self._kubelet.set_node(self.node, ready=False)

    # Its life.

    async def _live(self) -> None:
        script = self._kubelet.script_of(self.namespace, self.job)
        if self.attempt is not None:
            stage, hold = None, self.attempt.script.hold
        elif self.role in ("head", "worker"):
            stage, hold = None, script.gathering
        elif self.role == "prepare":
            stage = self._kubelet.prepare_of(self.namespace, self.job)
            hold = stage.hold
        else:
            found = self._kubelet.work(self.namespace, self.job).result
            stage = script.result or (Stage(StageReport(result=found)) if found else _LOST)
            hold = stage.hold
        if hold and hold.role not in ("", self.role):
            hold = None
        if not self.node:
            await self._find_node(hold)
        await self._patch(
            {"phase": "Pending", "startTime": now(), "hostIP": "127.0.0.1", "hostIPs": [{"ip": "127.0.0.1"}]}
        )
        await self._report("Pending", _waits("ContainerCreating"), ready=False)
        await self._mount()
        if hold and hold.reason != "Unschedulable":
            await self._report("Pending", _waits(hold.reason, hold.words), ready=False)
            await asyncio.sleep(hold.seconds)
        self.ip = self._kubelet.address()
        if self.attempt and self.role == "worker":
            await self._report("Pending", _waits("PodInitializing"), ready=False)
            await self.attempt.head_ready.wait()
        await asyncio.sleep(STARTING)
        self._running = True
        running = {"running": {"startedAt": now()}}
        await self._report("Running", running, ready=False)
        if stage:
            await self._run_once(stage)
            return
        await asyncio.sleep(GETTING_READY)
        await self._report("Running", running, ready=True)
        self.ready = True
        if self.attempt and self.role == "head":
            self.attempt.head_ready.set()

    async def _find_node(self, hold: Hold | None) -> None:
        if hold and hold.reason == "Unschedulable":
            await self._patch({"conditions": [_condition("PodScheduled", False, "Unschedulable", hold.words)]})
            await self._warn("FailedScheduling", hold.words, "default-scheduler")
            await asyncio.sleep(hold.seconds)
        await asyncio.sleep(PLACING)
        self.node = self._kubelet.nodes[next(_turns) % NODES]
        if self.attempt and self.attempt.script.own_node:
            self.node = await self._kubelet.add_node()
        await self._kubelet.exchange(
            "POST",
            f"{self._path}/binding",
            {"metadata": {"name": self.name}, "target": {"kind": "Node", "name": self.node}},
        )

    async def _mount(self) -> None:
        """Waits until there is everything that it mounts, and reads its configuration."""
        for volume in self._manifest["spec"]["volumes"]:
            for source, key, plural in (("secret", "secretName", "secrets"), ("configMap", "name", "configmaps")):
                if wanted := volume.get(source, {}).get(key):
                    found = await self._wait_for_source(volume["name"], source, wanted, plural)
                    if self.attempt and "run.json" in found.get("data", {}):
                        self.attempt.run = RunConfig.model_validate_json(found["data"]["run.json"])

    async def _wait_for_source(self, volume: str, source: str, name: str, plural: str) -> Json:
        path = f"/api/v1/namespaces/{self.namespace}/{plural}/{name}"
        while (found := await self._kubelet.exchange("GET", path)) is None:
            words = f'MountVolume.SetUp failed for volume "{volume}" : {source.lower()} "{name}" not found'
            await self._warn("FailedMount", words, "kubelet")
            await asyncio.sleep(LOOKING_AGAIN)
        return found

    async def _run_once(self, stage: Stage) -> None:
        await asyncio.sleep(stage.seconds)
        message = stage.report.model_dump_json(exclude_none=True) if stage.report else ""
        reason = stage.reason or ("Error" if stage.exit_code else "Completed")
        await self.ends(stage.exit_code, reason, message)

    async def _end(self) -> None:
        """It was deleted: its containers are told to stop, and it is removed."""
        self._life.cancel()
        if self._running:
            await asyncio.sleep(self.attempt.script.stopping_seconds if self.attempt else STOPPING)
            if self._running:
                await self._over("Failed", self._terminated(143, "Error", ""))
        await self._remove()

    async def _over(
        self, phase: str, ended: Json, reason: str = "", message: str = "", more: list[Json] | None = None
    ) -> None:
        self._running = False
        if self.attempt and self.role == "head":
            await self.attempt.close()
        await self._report(phase, ended, ready=False, more=more, reason=reason, message=message)

    async def _remove(self) -> None:
        body = {"gracePeriodSeconds": 0, "preconditions": {"uid": self.uid}}
        await self._kubelet.exchange("DELETE", self._path, body)

    async def _report(
        self,
        phase: str,
        state: Json,
        *,
        ready: bool,
        last: Json | None = None,
        more: list[Json] | None = None,
        **words: str,
    ) -> None:
        """Writes how its containers are, as a kubelet does."""
        spec = self._manifest["spec"]
        beginning = "waiting" in state
        containers = [
            {
                "name": each["name"],
                "image": each["image"],
                "imageID": "" if beginning else f"{each['image']}@sha256:{'0' * 64}",
                "ready": ready,
                "restartCount": self._restarts,
                "state": state,
                "lastState": last or {},
            }
            for each in spec["containers"]
        ]
        ip = {"podIP": self.ip, "podIPs": [{"ip": self.ip}]} if self.ip else {}
        conditions = [_condition(kind, ready) for kind in ("Ready", "ContainersReady")] + (more or [])
        await self._patch(
            {"phase": phase, "containerStatuses": containers, "conditions": conditions}
            | ip
            | {k: v for k, v in words.items() if v}
        )

    async def _patch(self, status: Json) -> None:
        await self._kubelet.exchange(
            "PATCH", f"{self._path}/status", {"metadata": {"uid": self.uid}, "status": status}, STRATEGIC
        )

    async def _warn(self, reason: str, words: str, component: str) -> None:
        about = {"apiVersion": "v1", "kind": "Pod", "name": self.name, "namespace": self.namespace, "uid": self.uid}
        event = {
            "metadata": {"generateName": f"{self.name}."},
            "involvedObject": about,
            "type": "Warning",
            "reason": reason,
            "message": words,
            "firstTimestamp": now(),
            "lastTimestamp": now(),
            "count": 1,
            "source": {"component": component},
        }
        # A namespace that is on its way out takes no new objects.
        await self._kubelet.exchange("POST", f"/api/v1/namespaces/{self.namespace}/events", event, may_fail=True)

    @property
    def _path(self) -> str:
        return f"/api/v1/namespaces/{self.namespace}/pods/{self.name}"

    def _terminated(self, exit_code: int, reason: str, message: str) -> Json:
        times = {"startedAt": self._manifest.get("status", {}).get("startTime") or now(), "finishedAt": now()}
        return {"terminated": {"exitCode": exit_code, "reason": reason, "message": message} | times}


def _waits(reason: str, words: str = "") -> Json:
    return {"waiting": {"reason": reason, "message": words}}


def _condition(kind: str, holds: bool, reason: str = "", message: str = "") -> Json:
    found = {"type": kind, "status": str(holds), "lastTransitionTime": now()}
    return found | ({"reason": reason, "message": message} if reason else {})
