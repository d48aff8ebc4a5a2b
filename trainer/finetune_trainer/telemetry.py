"""What a run tells while it goes on: Prometheus metrics for graphs, and a ProgressReport for whoever waits for it.

Both are made from the events of docs/design/run-folder.md, so that the loop knows nothing of them. This module loads
nothing heavy: an actor on the head of a cluster can hold it as well as the driver on one machine.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Summary, disable_created_metrics, generate_latest

from finetune_api.run import CHECKPOINTS, checkpoint_name
from finetune_api.stage import ProgressReport, ReportedCheckpoint, SpentSeconds, StageFailure
from finetune_api.status import Result
from finetune_trainer.reporter import Event

State = Literal["starting", "training", "finishing", "finished", "failed", "stopped"]
PARTS: Final = ("data", "forward", "backward", "optimizer", "other")
_SMOOTHING: Final = 0.1  # weight of the newest step in the mean that the ETA is made of


class Telemetry:
    """Takes events in, gives metrics and reports out. Times are seconds on the caller's monotonic clock.

    Args:
        work: the run's folder, where checkpoints are.
        attempt: number of the attempt, from 1.
        now: when it begins.
    """

    def __init__(self, work: str, attempt: int, now: float) -> None:
        disable_created_metrics()  # series that double the page and that nobody reads
        self.registry = CollectorRegistry()
        self._metrics = Metrics(self.registry)
        self._metrics.attempt.set(attempt)
        self._work, self._attempt = work.rstrip("/"), attempt
        self._state: State = "starting"
        self._moved = self._exporting = now
        self._step = self._total = 0
        self._tokens: int | None = 0
        self._last_step: Event | None = None
        self._eval_loss: float | None = None
        self._step_seconds: float | None = None
        self._checkpoint: tuple[int, float] | None = None
        self._training = self._checkpointing = self._finishing = 0.0
        self._written, self._safe = (0, 0.0), 0.0  # step of the last checkpoint, seconds trained before it
        self._failure: StageFailure | None = None
        self._result: Result | None = None

    def event(self, event: Event, now: float) -> None:
        """Takes one event in."""
        self._moved = now
        self._metrics.count(event["event"])
        match event["event"]:
            case "start":
                self._start(event)
            case "step":
                self._take_step(event)
            case "evaluation":
                self._eval_loss = event["loss"]
                self._metrics.take_evaluation(event)
            case "checkpoint":
                self._written = event["step"], self._training
                self._stood_still(event["seconds"])
            case "checkpoint-complete":
                self._checkpoint = event["step"], now
                if self._written[0] == event["step"]:  # what was trained until it was written is safe now
                    self._safe = self._written[1]
                self._stood_still(event["waited"])
                self._metrics.complete(event)
            case "retry":
                self._state = "starting"
            case "export":
                self._state, self._exporting = "finishing", now
            case "end" if event["reason"] == "interrupted":
                self._state = "stopped"

    def finish(self, result: Result, now: float) -> None:
        """The run has ended well."""
        self._end("finished", now)
        self._result = result

    def fail(self, failure: StageFailure, now: float, result: Result | None = None) -> None:
        """The run has ended badly; with a missed gate there is a result all the same."""
        self._end("failed", now)
        self._failure, self._result = failure, result

    def stop(self, now: float) -> None:
        """The run has ended on request."""
        self._end("stopped", now)

    def report(self, now: float) -> ProgressReport:
        """Where the run is."""
        step = self._last_step
        finishing = self._finishing + (now - self._exporting if self._state == "finishing" else 0.0)
        return ProgressReport(
            attempt=self._attempt,
            state=self._state,
            age=now - self._moved,
            step=self._step,
            total_steps=self._total,
            epoch=step["epoch"] if step else None,
            tokens=self._tokens,
            tokens_per_second=step["tokensPerSecond"] if step else None,
            loss=step["loss"] if step else None,
            eval_loss=self._eval_loss,
            eta=self._eta() if self._state == "training" else None,
            checkpoint=self._newest(now),
            seconds=SpentSeconds(
                training=self._training,
                checkpoint=self._checkpointing,
                finish=finishing,
                at_risk=self._training - self._safe,
            ),
            failure=self._failure,
            result=self._result,
        )

    def metrics(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    def _start(self, event: Event) -> None:
        self._state = "training"
        self._step, self._total = event["resumedFromStep"] or 0, event["totalSteps"]
        if self._step:
            self._tokens = None  # what was trained on before is not known here
        self._metrics.start(event)

    def _take_step(self, event: Event) -> None:
        self._step, self._last_step = event["step"], event
        self._training += event["seconds"]
        if self._tokens is not None:
            self._tokens += event["tokens"]
        last = self._step_seconds
        new = event["seconds"]
        self._step_seconds = new if last is None else (1 - _SMOOTHING) * last + _SMOOTHING * new
        self._metrics.take_step(event)

    def _stood_still(self, seconds: float) -> None:
        self._checkpointing += seconds
        if seconds:
            self._metrics.checkpoint_seconds.observe(seconds)

    def _eta(self) -> float | None:
        return None if self._step_seconds is None else (self._total - self._step) * self._step_seconds

    def _newest(self, now: float) -> ReportedCheckpoint | None:
        if self._checkpoint is None:
            return None
        step, written = self._checkpoint
        return ReportedCheckpoint(
            step=step, uri=f"{self._work}/{CHECKPOINTS}/{checkpoint_name(step)}", age=now - written
        )

    def _end(self, state: State, now: float) -> None:
        if self._state == "finishing":
            self._finishing += now - self._exporting
        self._state, self._moved = state, now


class Metrics:
    """The trainer's metrics; docs/reference/metrics.md is made from their help."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def gauge(name: str, about: str) -> Gauge:
            return Gauge(f"finetune_{name}", about, registry=registry)

        self.loss = gauge("train_loss", "Training loss of the last step, in nats per token.")
        self.evaluation_loss = gauge("eval_loss", "Loss of the last evaluation, in nats per token.")
        self.margin = gauge("train_reward_margin", "Reward of chosen less rejected answers, last step (objective dpo).")
        self.accuracy = gauge("train_reward_accuracy_ratio", "Share of pairs with such a margin above 0, last step.")
        self.evaluation_margin = gauge("eval_reward_margin", "Reward margin of the last evaluation (objective dpo).")
        self.evaluation_accuracy = gauge("eval_reward_accuracy_ratio", "Share of its pairs with a margin above 0.")
        self.likelihood_accuracy = gauge(
            "eval_likelihood_accuracy_ratio", "Share of its pairs whose chosen answer is likelier, per token."
        )
        self.step = gauge("train_step", "Optimizer steps done.")
        self.total_steps = gauge("train_planned_steps", "Optimizer steps of the whole run.")
        self.epoch = gauge("train_epochs", "Passes over the rows so far.")
        self.tokens = Counter(
            "finetune_train_tokens", "Tokens that went through the model in this process.", registry=registry
        )
        self.speed = gauge("train_tokens_per_second", "Tokens of the last step over its time, all workers together.")
        self.mfu = gauge("train_mfu_ratio", "Model FLOPs utilisation of the last step (docs/design/training.md).")
        self.norm = gauge("train_grad_norm", "Norm of the last step's gradient over all parameters, before clipping.")
        self.rate = gauge("train_learning_rate", "Learning rate of the last step.")
        self.step_seconds = Summary(
            "finetune_train_step_seconds",
            "Time of optimizer steps by part; the parts add up to the step.",
            ["part"],
            registry=registry,
        )
        self.checkpoint_seconds = Summary(
            "finetune_checkpoint_seconds", "Time that training stood still for a checkpoint.", registry=registry
        )
        self.checkpoint_complete = Summary(
            "finetune_checkpoint_complete_seconds",
            "Time from the beginning of a checkpoint until it was whole and stored, beside training.",
            registry=registry,
        )
        self.checkpoint_step = gauge("checkpoint_step", "Optimizer steps in the newest complete checkpoint.")
        self.checkpoint_bytes = gauge("checkpoint_size_bytes", "Size of the newest complete checkpoint.")
        self.evaluation_seconds = Summary("finetune_eval_seconds", "Time of evaluations.", registry=registry)
        self.gpu_memory = gauge("gpu_memory_bytes", "Most memory of rank 0's GPU in use so far.")
        self.memory = gauge("train_memory_bytes", "Most resident memory of rank 0 so far, where it has no GPU.")
        self.on_gpu = False
        self.hangs = Counter("finetune_train_hangs", "Times that a worker stood still for too long.", registry=registry)
        self.spikes = Counter(
            "finetune_train_loss_spikes", "Steps whose loss jumped far above those before.", registry=registry
        )
        self.workers = gauge("train_workers", "Processes that train.")
        self.attempt = gauge("train_attempt", "Number of the attempt, from 1.")
        self.warnings = Counter(
            "finetune_train_warnings", "Warnings, such as a damaged checkpoint that was passed over.", registry=registry
        )
        self.restarts = Counter(
            "finetune_train_restarts", "Times that the workers were started again in this process.", registry=registry
        )

    def start(self, event: Event) -> None:
        """Takes what is fixed until the next start."""
        self.on_gpu = event["device"] != "cpu"
        self.step.set(event["resumedFromStep"] or 0)
        self.total_steps.set(event["totalSteps"])
        self.workers.set(event["worldSize"])

    def count(self, kind: str) -> None:
        """Counts an event, if events of its kind are counted."""
        counters = {"spike": self.spikes, "hang": self.hangs, "warning": self.warnings, "retry": self.restarts}
        if counter := counters.get(kind):
            counter.inc()

    def complete(self, event: Event) -> None:
        """Takes a checkpoint that became complete."""
        self.checkpoint_complete.observe(event["seconds"])
        self.checkpoint_step.set(event["step"])
        self.checkpoint_bytes.set(event["bytes"])

    def take_step(self, event: Event) -> None:
        """Takes a step's figures; those that it does not have stay as they are."""
        parts = dict(event["parts"])
        parts["other"] = max(0.0, event["seconds"] - sum(parts.values()))
        for part in PARTS:
            self.step_seconds.labels(part).observe(parts[part])
        self.tokens.inc(event["tokens"])
        figures = (
            (self.step, "step"),
            (self.epoch, "epoch"),
            (self.loss, "loss"),
            (self.margin, "rewardMargin"),
            (self.accuracy, "rewardAccuracy"),
            (self.speed, "tokensPerSecond"),
            (self.mfu, "mfu"),
            (self.norm, "gradNorm"),
            (self.rate, "learningRate"),
            (self.gpu_memory if self.on_gpu else self.memory, "memoryBytes"),
        )
        _set(figures, event)

    def take_evaluation(self, event: Event) -> None:
        """Takes an evaluation's figures."""
        self.evaluation_seconds.observe(event["seconds"])
        figures = (
            (self.evaluation_loss, "loss"),
            (self.evaluation_margin, "rewardMargin"),
            (self.evaluation_accuracy, "rewardAccuracy"),
            (self.likelihood_accuracy, "likelihoodAccuracy"),
        )
        _set(figures, event)


def _set(figures: Iterable[tuple[Gauge, str]], event: Event) -> None:
    for gauge, name in figures:
        if event.get(name) is not None:
            gauge.set(event[name])
