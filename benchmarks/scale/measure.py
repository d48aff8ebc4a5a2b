"""What is read off while the operator works: its metrics, processes, and the API server's audit log."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final, TypeVar

import psutil
import urllib3
from prometheus_client.parser import text_string_to_metric_families
from tests.api.cluster import Cluster

K = TypeVar("K")
WRITES: Final = frozenset({"create", "update", "patch", "delete"})


def percentile(values: Iterable[float], share: float) -> float:
    """The smallest value that is no less than `share` of them (nearest rank); NaN without values."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else math.nan


@dataclass(frozen=True)
class Scrape:
    """One reading of the operator's /metrics.

    Attributes:
        at: Unix seconds, when it was asked for.
        seconds: until the page was there.
        requests: to the API server so far, by verb and resource.
    """

    at: float
    seconds: float
    size: int
    reconciles: float
    depth: float
    phases: Counter[str]
    requests: Counter[tuple[str, str]]
    errors: Counter[str]

    @property
    def writes(self) -> int:
        return sum(count for (verb, _), count in self.requests.items() if verb not in ("get", "list", "watch"))


def scrape(port: int) -> Scrape:
    """Reads /metrics on loopback."""
    at = time.time()
    page = urllib3.request("GET", f"http://127.0.0.1:{port}/metrics", timeout=30).data
    seconds = time.time() - at
    samples = [sample for family in text_string_to_metric_families(page.decode()) for sample in family.samples]

    def total(name: str, *labels: str) -> Counter[Any]:
        counted: Counter[Any] = Counter()
        for sample in samples:
            if sample.name == name:
                key = tuple(sample.labels[label] for label in labels)
                counted[key if len(key) != 1 else key[0]] += int(sample.value)
        return counted

    return Scrape(
        at,
        seconds,
        len(page),
        total("finetune_operator_reconcile_duration_seconds_count")[()],
        total("finetune_operator_queue_depth")[()],
        total("finetune_jobs", "phase"),
        total("finetune_operator_api_requests_total", "verb", "resource"),
        total("finetune_operator_reconcile_errors_total", "reason"),
    )


@dataclass(frozen=True)
class Usage:
    """CPU seconds used so far and resident memory, now and at its highest, in bytes."""

    cpu: float
    resident: int
    peak: int


def usage(pid: int) -> Usage:
    """Of a process."""
    process = psutil.Process(pid)
    times = process.cpu_times()
    status = Path(f"/proc/{pid}/status").read_text()
    peak = next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM"))
    return Usage(times.user + times.system, process.memory_info().rss, peak)


def programs() -> dict[str, int]:
    """Process ids of what the cluster runs, by the programs' names; etcd's is `server`."""
    return {child.name(): child.pid for child in psutil.Process().children(recursive=True)}


@dataclass(frozen=True)
class Audited:
    """One request, answered. Times are Unix seconds by the API server's clock."""

    user: str
    agent: str
    verb: str
    resource: str  # with the subresource, such as rayjobs/status
    namespace: str
    name: str
    received: float
    answered: float


class Audit:
    """Successful requests of an audit log, without watches."""

    def __init__(self, cluster: Cluster) -> None:
        self.entries = [
            _audited(each)
            for each in cluster.audited()
            if each["stage"] == "ResponseComplete"
            and each["verb"] != "watch"
            and "objectRef" in each
            and each["responseStatus"]["code"] < 400
        ]

    def of(self, who: str, verbs: str, resource: str) -> dict[str, float]:
        """When each object first had such an answer, by name. `who` begins the user's or the client's name."""
        found: dict[str, float] = {}
        for each in self.entries:
            if each.verb in verbs.split("|") and each.resource == resource and _is(each, who):
                found.setdefault(each.name, each.answered)
        return found

    def requests(self, who: str, since: float, until: float = math.inf) -> Counter[tuple[str, str]]:
        """Requests by verb and resource in a time."""
        return Counter(
            (each.verb, each.resource) for each in self.entries if since <= each.received <= until and _is(each, who)
        )


def delays(before: Mapping[K, float], after: Mapping[K, float]) -> list[float]:
    """Seconds between two moments of each object that has both."""
    return [after[name] - moment for name, moment in before.items() if name in after]


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Count, median, p99 and maximum."""
    return {
        "count": len(seconds),
        "p50": round(percentile(seconds, 0.5), 3),
        "p99": round(percentile(seconds, 0.99), 3),
        "max": round(max(seconds, default=math.nan), 3),
    }


def _is(entry: Audited, who: str) -> bool:
    return entry.user == who or entry.agent.startswith(who)


def _audited(entry: Mapping[str, Any]) -> Audited:
    what = entry["objectRef"]
    resource = "/".join(filter(None, (what.get("resource", ""), what.get("subresource", ""))))
    return Audited(
        entry["user"]["username"],
        entry.get("userAgent", ""),
        entry["verb"],
        resource,
        what.get("namespace", ""),
        what.get("name", ""),
        _time(entry["requestReceivedTimestamp"]),
        _time(entry["stageTimestamp"]),
    )


def _time(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()
