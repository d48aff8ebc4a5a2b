"""Where jobs of a test file live: namespaces, a runtime, operators, a kubelet, and a record of every status."""

from __future__ import annotations

import json
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import urllib3

from finetune_api.base import API_VERSION
from tests.api import jobs
from tests.api.cluster import Cluster
from tests.api.golden import Golden, as_text
from tests.api.kubelet import Kubelet
from tests.api.objects import Api, Object, eventually, fresh_namespace
from tests.api.operator import Operator, operator
from tests.api.script import Script

SECONDS: Final = 150.0  # for a job to get where it must: all of a file's live at the same time, on few cores


@dataclass
class World:
    """The jobs' surroundings.

    Attributes:
        namespaces: the first is for most jobs.
        runtime: whose GPUs have a price.
        histories: every status that a job had, in their order.
    """

    api: Api
    kubelet: Kubelet
    golden: Golden
    runtime: str
    namespaces: Sequence[str]
    operators: Sequence[Operator]
    histories: Histories

    def submit(self, name: str, script: Script | None = None, namespace: str = "", **fields: Any) -> Object:
        """Creates a job; `fields` as for `jobs.job`, `runtime` for another one than the world's."""
        namespace = namespace or self.namespaces[0]
        if script:
            self.kubelet.script(namespace, name, script)
        return self.api.create(jobs.job(name, fields.pop("runtime", self.runtime), **fields), namespace=namespace)

    def wait(
        self, name: str, until: Callable[[Object], object], namespace: str = "", seconds: float = SECONDS
    ) -> Object:
        """The job's status as soon as `until` holds of it."""
        namespace = namespace or self.namespaces[0]
        found = self.api.wait_for(
            jobs.JOB_KIND, name, namespace, lambda job: "status" in job and until(job["status"]), seconds
        )
        return dict(found["status"])

    def finished(self, name: str, namespace: str = "", seconds: float = SECONDS) -> Object:
        """The job's status when it has ended."""
        return self.wait(name, lambda status: status.get("phase") in ("Complete", "Failed"), namespace, seconds)

    def patch(self, name: str, spec: Object) -> None:
        """Changes the job's spec."""
        self.api.patch(jobs.JOB_KIND, name, self.namespaces[0], {"spec": spec})

    def say(self, story: str, status: Object) -> None:
        """Compares with the golden file what the status tells its user."""
        self.golden.check(story, as_text(status))

    def wait_released(self, job: str, namespace: str = "", seconds: float = 60) -> None:
        """Returns as soon as nothing of the job holds a GPU, or could take one."""
        namespace = namespace or self.namespaces[0]
        eventually(lambda: not self.holding(job, namespace), f"GPUs of {job} to be free", seconds)

    def holding(self, job: str, namespace: str = "") -> list[str]:
        """Names of the job's RayJobs and of pods that have not ended; who knows of those on lost nodes."""
        namespace = namespace or self.namespaces[0]
        labels = {"finetune.dev/job": job, "finetune.dev/stage": "train"}
        pods = self.api.list("v1/Pod", namespace, labels)
        living = [
            pod
            for pod in pods
            if pod["status"]["phase"] not in ("Succeeded", "Failed") and not self.kubelet.lost(pod["metadata"]["uid"])
        ]
        return [each["metadata"]["name"] for each in self.api.list(jobs.RAY_JOB, namespace, labels) + living]


@contextmanager
def world(
    cluster: Cluster, folder: Path, golden: str, operators: Sequence[Mapping[str, str]] = ({},), namespaces: int = 1
) -> Iterator[World]:
    """A world with its operators, which are started when the block is entered.

    Args:
        operators: flags of each.
        namespaces: of the first operator; the others have one each, which come last.
    """
    with ExitStack() as stack:
        api = stack.enter_context(Api(cluster.kubeconfig))
        names = [stack.enter_context(fresh_namespace(api)) for _ in range(namespaces + len(operators) - 1)]
        runtime = stack.enter_context(jobs.runtime(api))
        words = Golden(golden)
        stack.callback(words.close)
        kubelet = stack.enter_context(Kubelet(cluster))
        histories = stack.enter_context(Histories(cluster, names))
        served = [names[:namespaces], *([name] for name in names[namespaces:])]
        running = [
            stack.enter_context(operator(cluster, folder / str(number), *mine, flags=flags))
            for number, (mine, flags) in enumerate(zip(served, operators, strict=True))
        ]
        yield World(api, kubelet, words, runtime, names, running, histories)


class Histories:
    """Every status that the jobs of some namespaces had, recorded in a thread."""

    def __init__(self, cluster: Cluster, namespaces: Sequence[str]) -> None:
        self._statuses: dict[tuple[str, str], list[Object]] = defaultdict(list)
        self._namespaces, self._url = frozenset(namespaces), f"{cluster.url}/apis/{API_VERSION}/finetunejobs"
        self._headers = {"Authorization": f"Bearer {cluster.token('admin')}"}
        self._pool = urllib3.PoolManager(ca_certs=str(cluster.ca))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._record, name="histories", daemon=True)

    def __enter__(self) -> Histories:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def of(self, namespace: str, job: str) -> list[Object]:
        """The job's statuses, oldest first."""
        return list(self._statuses[namespace, job])

    def all(self) -> list[list[Object]]:
        """Those of every job."""
        return [list(each) for each in self._statuses.values()]

    def _record(self) -> None:
        version = self._pool.request("GET", self._url, headers=self._headers).json()["metadata"]["resourceVersion"]
        while not self._stop.is_set():
            query = f"?watch=1&timeoutSeconds=1&resourceVersion={version}"
            answer = self._pool.request("GET", self._url + query, headers=self._headers, preload_content=False)
            for line in b"".join(answer.stream()).splitlines():
                found = json.loads(line)["object"]
                metadata = found["metadata"]
                version = metadata["resourceVersion"]
                if metadata["namespace"] in self._namespaces and "status" in found:
                    self._statuses[metadata["namespace"], metadata["name"]].append(found["status"])
