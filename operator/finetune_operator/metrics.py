"""What Prometheus reads: the operator's own work, and the jobs as the store has them when they are asked for."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, get_args

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from finetune_api.status import FailureReason
from finetune_operator.observe import parse_time
from finetune_operator.store import Key, Object

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


@dataclass(frozen=True, slots=True)
class JobSummary:
    """What is wanted of all jobs at once, kept beside the compressed job.

    Attributes:
        runtime_ref: the runtime that the spec names; empty: the only one there is.
        runtime: the runtime that the job has been using.
        gpus: accelerators that the spec asks for.
        max_cost: the spec's own bound; the runtime may have a lower one.
        training: seconds of steps that counted.
        lost: seconds that were lost, by cause.
        progressed, checkpointed: when training last got on and when its newest checkpoint was complete, Unix seconds.
        failures: attempt and reason of the failed attempts that the status still has.
    """

    uid: str
    phase: str
    attempt: int
    runtime_ref: str
    runtime: str
    objective: str
    tuning: str
    currency: str
    cost: float | None
    gpus: int
    max_cost: float | None
    training: float | None
    lost: tuple[tuple[str, float], ...]
    progressed: float | None
    checkpointed: float | None
    failures: tuple[tuple[int, str], ...]


def summarize(job: Object) -> JobSummary:
    """The summary of a FinetuneJob, whatever its spec and status hold."""
    spec, status = job.get("spec") or {}, job.get("status") or {}
    method, cost, workers = spec.get("method") or {}, status.get("cost") or {}, spec.get("workers") or {}
    goodput = status.get("goodput") or {}
    return JobSummary(
        uid=job["metadata"].get("uid", ""),
        phase=status.get("phase") or "Pending",
        attempt=status.get("attempt") or 0,
        runtime_ref=(spec.get("runtimeRef") or {}).get("name", ""),
        runtime=status.get("runtime") or "",
        objective=method.get("objective", ""),
        tuning=method.get("tuning", ""),
        currency=cost.get("currency") or "",
        cost=cost.get("spent"),
        gpus=workers.get("count", 0) * workers.get("gpusEach", 0),
        max_cost=(spec.get("limits") or {}).get("maxCost"),
        training=goodput.get("trainingSeconds"),
        lost=tuple((goodput.get("lostSeconds") or {}).items()),
        progressed=parse_time((status.get("progress") or {}).get("updatedTime")),
        checkpointed=parse_time((status.get("checkpoint") or {}).get("time")),
        failures=tuple((failure["attempt"], failure["reason"]) for failure in status.get("failures") or []),
    )


class Metrics:
    """The operator's metrics, in a registry of their own."""

    def __init__(self) -> None:
        prometheus_client.disable_created_metrics()  # series that double the page and that nobody reads
        self.registry = CollectorRegistry(auto_describe=False)
        self.duration = Histogram(
            "finetune_operator_reconcile_duration_seconds",
            "Time that one reconcile of a job took.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.errors = Counter(
            "finetune_operator_reconcile_errors_total",
            "Reconciles that failed and are tried again, by reason.",
            ["reason"],
            registry=self.registry,
        )
        self.requests = Counter(
            "finetune_operator_api_requests_total",
            "Requests to the API server; code 0 is no answer.",
            ["verb", "resource", "code"],
            registry=self.registry,
        )
        self.depth = Gauge(
            "finetune_operator_queue_depth", "Jobs that wait to be reconciled now.", registry=self.registry
        )
        self.watch_age = Gauge(
            "finetune_operator_watch_age_seconds",
            "Time since the cache of a resource was last known to be complete.",
            ["resource"],
            registry=self.registry,
        )
        self.leader = Gauge("finetune_operator_leader", "1 on the replica that writes.", registry=self.registry)
        self.failures = Counter(
            "finetune_job_failures_total",
            "Failed attempts that this replica has recorded while it was leading.",
            ["reason"],
            registry=self.registry,
        )
        for reason in get_args(FailureReason):
            self.failures.labels(reason)  # from 0, or the first failure of a kind would be no increase

    def count_request(self, verb: str, resource: str, code: str) -> None:
        """Counts one request; for `Client.count`."""
        self.requests.labels(verb, resource, code).inc()

    def count_failures(self, before: JobSummary | None, after: JobSummary | None) -> None:
        """Counts the failures that a job's status has gained."""
        if before and after and before.uid == after.uid:
            for attempt, reason in after.failures:
                if (attempt, reason) not in before.failures:
                    self.failures.labels(reason).inc()

    def text(self) -> bytes:
        """The page that Prometheus reads."""
        return generate_latest(self.registry)


class JobCollector(Collector):
    """Series of the jobs. Only the replica that leads has them, or every job would count twice.

    Args:
        jobs: all of them.
        bounds: the highest cost that a runtime allows a job, by the runtime's name; asked at each scrape.
    """

    def __init__(
        self, jobs: Callable[[], Iterable[tuple[Key, JobSummary]]], bounds: Callable[[], Mapping[str, float]]
    ) -> None:
        self._jobs, self._bounds = jobs, bounds

    def collect(self) -> Iterator[Metric]:
        """One gauge for each question."""
        phases: Tally[tuple[str, str]] = Tally()
        bounds = self._bounds()
        info = _gauge("info", "1 for each job.", "uid", "phase", "runtime", "objective", "tuning")
        gpus = _gauge("gpus", "Accelerators that a job's workers ask for.")
        cost = _gauge("cost", "What a job's accelerators have cost so far, in the runtime's currency.", "currency")
        limit = _gauge("cost_limit", "What a job may cost, by its own bound or its runtime's, whichever is lower.")
        training = _gauge("training_seconds", "Time of a job's steps that counted, over all attempts.")
        lost = _gauge("lost_seconds", "Time that a job held nodes and no new step came of it, by cause.", "cause")
        progressed = _gauge("progress_timestamp_seconds", "When a job's training last got on, Unix time.")
        checkpointed = _gauge("checkpoint_timestamp_seconds", "When a job's newest checkpoint was complete, Unix time.")
        for (namespace, name), job in self._jobs():
            where = [namespace, name]
            phases[namespace, job.phase] += 1
            runtime = job.runtime or job.runtime_ref
            info.add_metric([*where, job.uid, job.phase, runtime, job.objective, job.tuning], 1)
            gpus.add_metric(where, job.gpus)
            if job.cost is not None:
                cost.add_metric([*where, job.currency], job.cost)
            most = min((each for each in (job.max_cost, bounds.get(runtime)) if each is not None), default=None)
            for gauge, value in (
                (limit, most),
                (training, job.training),
                (progressed, job.progressed),
                (checkpointed, job.checkpointed),
            ):
                if value is not None:
                    gauge.add_metric(where, value)
            for cause, seconds in job.lost:
                lost.add_metric([*where, cause], seconds)
        count = GaugeMetricFamily("finetune_jobs", "Jobs by phase.", labels=["namespace", "phase"])
        for (namespace, phase), number in sorted(phases.items()):
            count.add_metric([namespace, phase], number)
        yield from (count, info, gpus, cost, limit, training, lost, progressed, checkpointed)


def _gauge(name: str, about: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"finetune_job_{name}", about, labels=["namespace", "name", *labels])
