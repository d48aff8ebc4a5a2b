"""What Prometheus reads: the operator's own work, and the jobs as the store has them when they are asked for."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from finetune_operator.store import Key, Object

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


@dataclass(frozen=True, slots=True)
class JobSummary:
    """What is wanted of all jobs at once, kept beside the compressed job.

    Attributes:
        runtime_ref: the runtime that the spec names; empty: the only one there is.
        runtime: the runtime that the job has been using.
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
    failures: tuple[tuple[int, str], ...]


def summarize(job: Object) -> JobSummary:
    """The summary of a FinetuneJob, whatever its spec and status hold."""
    spec, status = job.get("spec") or {}, job.get("status") or {}
    method, cost = spec.get("method") or {}, status.get("cost") or {}
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
    """Series of the jobs. Only the replica that leads has them, or every job would count twice."""

    def __init__(self, jobs: Callable[[], Iterable[tuple[Key, JobSummary]]]) -> None:
        self._jobs = jobs

    def collect(self) -> Iterator[Metric]:
        """One gauge for each question."""
        phases: Tally[tuple[str, str]] = Tally()
        info = GaugeMetricFamily(
            "finetune_job_info",
            "1 for each job.",
            labels=["namespace", "name", "uid", "phase", "runtime", "objective", "tuning"],
        )
        cost = GaugeMetricFamily(
            "finetune_job_cost",
            "What a job's accelerators have cost so far, in the runtime's currency.",
            labels=["namespace", "name", "currency"],
        )
        for (namespace, name), job in self._jobs():
            phases[namespace, job.phase] += 1
            runtime = job.runtime or job.runtime_ref
            info.add_metric([namespace, name, job.uid, job.phase, runtime, job.objective, job.tuning], 1)
            if job.cost is not None:
                cost.add_metric([namespace, name, job.currency], job.cost)
        count = GaugeMetricFamily("finetune_jobs", "Jobs by phase.", labels=["namespace", "phase"])
        for (namespace, phase), number in sorted(phases.items()):
            count.add_metric([namespace, phase], number)
        yield from (count, info, cost)
