"""A Ray cluster as the outside sees it: its driver's life, Ray's job API and `/progress`; pods are the kubelet's."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any, Final, Literal

from aiohttp import web

from finetune_api.run import RunConfig
from finetune_api.stage import PROGRESS_PORT, ProgressReport, ReportedCheckpoint, SpentSeconds, StageFailure
from finetune_api.status import FailureReason, GateResult, Result
from tests.api.dashboards import MESSAGES
from tests.api.script import MANIFEST, Training, Work

if TYPE_CHECKING:
    from tests.api.kubelet import Kubelet
    from tests.api.pods import LivingPod

Json = dict[str, Any]
State = Literal["starting", "training", "finishing", "finished", "failed", "stopped"]
FINAL: Final = ("SUCCEEDED", "FAILED", "STOPPED")


class Attempt:
    """One attempt: what its pods do, by the script.

    Attributes:
        pods: those that are there, by name: head and workers; the kubelet keeps it.
        run: the job's run.json, as the pods have it mounted.
    """

    def __init__(self, kubelet: Kubelet, namespace: str, number: int, script: Training, work: Work) -> None:
        self.namespace, self.number, self.script, self.work = namespace, number, script, work
        self._kubelet = kubelet
        self.pods: dict[str, LivingPod] = {}
        self.run: RunConfig | None = None
        self.head_ready = asyncio.Event()
        self.step = 0
        self.state: State = "starting"
        self.job: Json = {}
        self.failure: StageFailure | None = None
        self.result: Result | None = None
        self._moved = self._saved = time.monotonic()
        self._spent = dict.fromkeys(("training", "checkpoint", "finish"), 0.0)
        self._stop = asyncio.Event()
        self._driver: asyncio.Task[None] | None = None
        self._progress: web.AppRunner | None = None

    def pod(self, role: Literal["head", "worker"]) -> LivingPod:
        """The head, or the first worker."""
        return next(pod for _, pod in sorted(self.pods.items()) if pod.role == role)

    # What the driver does.

    async def _drive(self) -> None:
        script = self.script
        self.step = self.work.checkpoint
        self.work.began.append(self.step)
        self._say("RUNNING")
        self._go("starting")
        await self._wait_for_workers()
        self._go("starting")
        if not await self._pause(script.load_seconds):
            return
        while self.step < script.steps:
            self._go("training")
            before = time.monotonic()
            if not await self._pause(script.step_seconds):
                return
            self._spent["training"] += time.monotonic() - before
            self.step += 1
            self._go("training")
            if self.step % script.checkpoint_every == 0:
                self.save()
            if script.fault and self.step == script.fault_at:
                await script.fault(self)
                if self._over:
                    return
        await self._finish()

    async def _wait_for_workers(self) -> None:
        """Ray Train starts when all have joined; KubeRay may call a cluster ready before it has seen them all."""
        assert self.run is not None, "the kubelet gives a head its configuration before it starts it"
        while sum(pod.ready for pod in self.pods.values() if pod.role == "worker") < self.run.spec.workers.count:
            await asyncio.sleep(0.05)

    async def _finish(self) -> None:
        self._go("finishing")
        if not await self._pause(self.script.finish_seconds):
            return
        self._spent["finish"] += self.script.finish_seconds
        assert self.run is not None, "the kubelet gives a head its configuration before it starts it"
        out = self.run.spec.output.uri.rstrip("/")
        gates = [
            GateResult(metric=gate.metric, value=1.25, passed=not self.script.gates_missed)
            for gate in self.run.spec.evaluation.gates
        ]
        self.result = Result(
            uri=f"{out}/{'rejected' if self.script.gates_missed else 'model'}",
            base_model_sha="a" * 40,
            manifest_sha256=MANIFEST,
            eval_loss_base=2.5,
            eval_loss_tuned=1.25,
            gates=gates,
            report=f"{out}/report.html",
        )
        if self.script.gates_missed:
            self.fail("GateMissed", "evalLoss is 1.25 and may be 1.0 (spec.evaluation.gates[0]).", 8)
            return
        self.work.result = self.result
        self._go("finished")
        self._say("SUCCEEDED")

    async def _pause(self, seconds: float) -> bool:
        """Lets time pass; when the driver is told to stop meanwhile it saves and ends, and the answer is False."""
        try:
            async with asyncio.timeout(seconds):
                await self._stop.wait()
        except TimeoutError:
            return not self._over
        if not self._over:
            self.save()
            self._go("stopped")
            self._say("STOPPED")
        return False

    @property
    def _over(self) -> bool:
        return self.job.get("status") in FINAL

    def _go(self, state: State) -> None:
        self.state, self._moved = state, time.monotonic()

    def _say(self, status: str, message: str = "") -> None:
        ended = {"end_time": int(time.time() * 1000)} if status in FINAL else {}
        started = {"start_time": self.job.get("start_time") or int(time.time() * 1000)}
        self.job |= {"status": status, "message": message or MESSAGES[status]} | started | ended

    # What faults are made of.

    def save(self) -> None:
        """Writes a checkpoint."""
        self.work.checkpoint, self._saved = self.step, time.monotonic()

    def fail(
        self, reason: FailureReason | None, message: str = "", exit_code: int = 6, *, rank: int | None = None
    ) -> None:
        """The driver ends badly; without a reason it does not get to say anything, and `message` is the log's end."""
        if reason:
            self.failure = StageFailure(reason=reason, message=message, rank=rank)
            self._go("failed")
        log = f", last available logs (truncated to 20,000 chars):\n{'' if reason else message}"
        self._say("FAILED", f"Job entrypoint command failed with exit code {exit_code}{log}")

    async def stand_still(self) -> None:
        """Does nothing more, until it is told to stop."""
        await self._stop.wait()
        await self._pause(0)

    # What the outside asks.

    def answer(self, method: str, path: str, body: Json) -> tuple[int, Json | str]:
        """Ray's job API."""
        if not self.head_ready.is_set():
            return 502, "Bad Gateway"
        job, _, verb = path.removeprefix("/api/jobs/").partition("/")
        if method == "POST" and not job:
            if self.job:
                used = f"Job with submission_id {body['submission_id']} already exists."
                return 500, f"{used} Please use a different submission_id."
            self.job = {"submission_id": body["submission_id"], "status": "PENDING", "message": MESSAGES["PENDING"]}
            self._driver = self._kubelet.spawn(self._serve_and_drive())
            return 200, {"job_id": body["submission_id"], "submission_id": body["submission_id"]}
        if self.job.get("submission_id") != job:
            return 404, f"Job {job} does not exist"
        if verb == "stop":
            stopped = not self._over
            self._stop.set()
            return 200, {"stopped": stopped}
        return 200, self.job

    async def _serve_and_drive(self) -> None:
        if not self.script.mute:
            application = web.Application()
            application.router.add_get("/progress", self._report)
            runner = web.AppRunner(application, access_log=None)
            await runner.setup()
            self._progress = runner
            await web.TCPSite(runner, self.pod("head").ip, PROGRESS_PORT).start()
        await self._drive()

    async def _report(self, _: web.Request) -> web.Response:
        return web.Response(text=self.report().model_dump_json(), content_type="application/json")

    def report(self) -> ProgressReport:
        """The answer to GET /progress."""
        now, script = time.monotonic(), self.script
        left = (script.steps - self.step) * script.step_seconds
        saved = ReportedCheckpoint(
            step=self.work.checkpoint,
            uri=f"{self.run.work if self.run else 's3://b'}/checkpoints/step-{self.work.checkpoint:08d}",
            age=now - self._saved,
        )
        risk = max(0, self.step - self.work.checkpoint) * script.step_seconds
        known = self.state != "starting"
        return ProgressReport(
            attempt=self.number,
            state=self.state,
            age=now - self._moved,
            step=self.step,
            total_steps=script.steps if known else 0,
            epoch=self.step / script.steps,
            tokens=self.step * 32_768,
            tokens_per_second=32_768 / script.step_seconds,
            loss=2.5 - 1.25 * self.step / script.steps,
            eta=left if known else None,
            checkpoint=saved if self.work.checkpoint else None,
            seconds=SpentSeconds(**self._spent, at_risk=min(risk, self._spent["training"])),
            failure=self.failure,
            result=self.result,
        )

    async def close(self) -> None:
        """The head has ended."""
        self.head_ready.clear()
        if self._driver:
            self._driver.cancel()
        runner, self._progress = self._progress, None
        if runner:
            await runner.cleanup()
