"""The service as a platform engineer installs it: operator, runtime, object storage, and a namespace for a team."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from finetune_api.base import API_VERSION
from finetune_operator.children.labels import JOB_LABEL, STAGE_LABEL
from tests.api import plugin
from tests.api.cluster import install_crds
from tests.api.objects import Api, Object, eventually
from tests.api.prometheus import Prometheus
from tests.chart.helm import CHART, helm, template
from tests.cluster import monitoring
from tests.cluster.images import OPERATOR, TRAINER
from tests.cluster.kubectl import Kubectl
from tests.cluster.lab import Lab
from tests.s3 import S3Server, s3_server
from tests.tiny import tiny_llama
from tests.tools.build import build

JOB: Final = f"{API_VERSION}/FinetuneJob"
RELEASE: Final = "finetune"
BUCKET: Final = "team"
OPERATOR_NAMESPACE: Final = "finetune-system"
_MONITORING: Final = ("podmonitors", "prometheusrules")
HELM_TEST: Final = {"training": {"maxSteps": 4, "precision": "fp32"}, "output": {"uri": f"s3://{BUCKET}/helm-test"}}
_RESTRICTED: Final = {"pod-security.kubernetes.io/enforce": "restricted"}


@dataclass(frozen=True)
class Service:
    """The installed service, and the team's namespace."""

    lab: Lab
    api: Api
    s3: S3Server
    kubectl: Kubectl
    namespace: str
    prometheus: Prometheus

    @property
    def bucket(self) -> Path:
        """The team's bucket, as the folder that the S3 server keeps it in."""
        return self.s3.root / BUCKET

    @property
    def values(self) -> Object:
        """What this cluster's engineer gives the chart."""
        return _values(self.s3, self.lab.address)

    def helm(self, verb: str, *arguments: str | Path, given: bool = True) -> str:
        """A command about the release, with the values of this cluster if it takes any; what it prints."""
        where = (f"--namespace={OPERATOR_NAMESPACE}",)
        return helm(
            verb,
            RELEASE,
            *arguments,
            *where,
            values=self.values if given else None,
            kubeconfig=self.lab.cluster.kubeconfig,
        )

    def install(self, chart: Path = CHART) -> None:
        """Installs the release or brings it to this chart, and returns when its operators are ready."""
        self.helm("upgrade", chart, "--install", "--wait", "--timeout=3m")

    def plugin(self, *arguments: str) -> str:
        """What `kubectl finetune` prints about the team's jobs."""
        done = plugin.run(self.lab.cluster.kubeconfig, self.namespace, *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def submit(self, name: str, **changes: Any) -> None:
        """Creates a small chat job with two workers; `changes` replace fields of its spec."""
        spec = {"runtimeRef": {"name": "lab"}} | chat_job() | changes
        manifest = {
            "apiVersion": API_VERSION,
            "kind": "FinetuneJob",
            "metadata": {"name": name},
            "spec": spec,
        }
        self.api.create(manifest, namespace=self.namespace)

    def submit_long(self, name: str, steps: int) -> None:
        """Creates a job of many short steps, some 60 ms each, and returns after its first checkpoint."""
        training = {"maxSteps": steps, "sequencesPerBatch": 4, "precision": "fp32"}
        self.submit(name, training=training, checkpoint={"everySteps": 50}, output={"uri": f"s3://{BUCKET}/{name}"})
        self.wait(name, lambda status: status.get("checkpoint", {}).get("step", 0) > 0, 420)

    def remove(self, name: str) -> None:
        """Deletes the job, and waits until its pods are gone."""
        self.api.delete(JOB, name, self.namespace)
        eventually(lambda: not self.api.list("v1/Pod", self.namespace, {JOB_LABEL: name}), f"{name}'s end", 180)

    def status(self, name: str) -> Object:
        """The job's status now."""
        status: Object = self.api.get(JOB, name, self.namespace)["status"]
        return status

    def pods(self, name: str, label: str, value: str) -> list[str]:
        """Names of the job's pods with this label that run."""
        found = self.api.list("v1/Pod", self.namespace, {JOB_LABEL: name, label: value})
        return [pod["metadata"]["name"] for pod in found if pod["status"]["phase"] == "Running"]

    def uids(self, name: str) -> set[str]:
        """UIDs of the job's pods that train."""
        found = self.api.list("v1/Pod", self.namespace, {JOB_LABEL: name, STAGE_LABEL: "train"})
        return {pod["metadata"]["uid"] for pod in found}

    @contextmanager
    def another_runtime(self, name: str, **changes: Any) -> Iterator[None]:
        """A runtime like the lab's, with `changes` in its spec."""
        spec = self.values["runtimes"]["lab"] | changes
        self.api.create(
            {"apiVersion": API_VERSION, "kind": "FinetuneRuntime", "metadata": {"name": name}, "spec": spec}
        )
        try:
            yield
        finally:
            self.api.delete(f"{API_VERSION}/FinetuneRuntime", name)

    def wait(self, name: str, until: Callable[[Object], object], seconds: float = 300) -> Object:
        """The job's status as soon as `until` holds for it."""
        job = self.api.wait_for(JOB, name, self.namespace, lambda job: until(job.get("status", {})), seconds)
        status: Object = job.get("status", {})
        return status

    def phase(self, name: str, *phases: str, seconds: float = 300) -> Object:
        """The job's status as soon as it is in one of `phases`."""
        return self.wait(name, lambda status: status.get("phase") in phases, seconds)


@contextmanager
def service(lab: Lab, api: Api, folder: Path) -> Iterator[Service]:
    """Installs everything into the lab."""
    with s3_server(folder, host=lab.address) as s3:
        namespace = "team"
        bucket = s3.root / BUCKET
        bucket.mkdir()
        fill(bucket)
        keys = {key: s3.environment[key] for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
        secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "storage"}, "stringData": keys}
        for name in (OPERATOR_NAMESPACE, namespace):
            api.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": _RESTRICTED}})
            api.create(secret, namespace=name)
        install_crds(api, [build("prometheus-operator") / f"monitoring.coreos.com_{each}.yaml" for each in _MONITORING])
        kubectl, chart = Kubectl(lab.cluster.kubeconfig), template(_values(s3, lab.address))
        with monitoring.prometheus(kubectl, chart, lab.address) as prometheus:
            installed = Service(lab, api, s3, kubectl, namespace, prometheus)
            installed.install()
            installed.install()  # runtimes come with the second: before, the cluster has no such kind
            yield installed


def _values(s3: S3Server, address: str) -> Object:
    registry, _, repository = OPERATOR.rpartition("/")
    repository, tag = repository.split(":")
    return {
        "image": {"registry": registry, "repository": repository, "tag": tag, "pullPolicy": "Never"},
        "resources": {"cpu": "50m", "memory": "512Mi"},
        "runtimes": {"lab": _runtime(s3, address)},
        "monitoring": {
            "namespaces": [monitoring.NAMESPACE],
            "podMonitors": {"enabled": True},
            "rules": {"enabled": True},
            "dashboards": {"enabled": True},
        },
        "test": {"job": {"runtimeRef": {"name": "lab"}} | chat_job() | HELM_TEST},
    }


def _runtime(s3: S3Server, address: str) -> Object:
    """A runtime of small CPU workers that reach the S3 server and nothing else."""
    port = int(s3.endpoint.rpartition(":")[2])
    return {
        "images": {"trainer": TRAINER, "pullPolicy": "Never"},
        "accelerator": {"pricePerHour": 0.5},
        "limits": {"maxCost": 100},
        "resources": {"memoryPerCpu": "4Gi", "sharedMemory": "256Mi", "scratch": "8Gi", "prepareCpus": 0.5},
        "storage": {"endpoint": s3.endpoint, "region": "us-east-1", "pathStyle": True, "secretName": "storage"},
        "networkPolicy": {"egress": [{"cidr": f"{address}/32", "ports": [port]}]},
    }


def fill(bucket: Path) -> None:
    """A model and rows to learn, written where the S3 server keeps its buckets."""
    tiny_llama(bucket / "base")
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"What is {i} and {i * i}?"},
                {"role": "assistant", "content": f"It is {i * 7}, {i * 11} and {i * 13}."},
            ]
        }
        for i in range(200)
    ]
    (bucket / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def chat_job() -> dict[str, Any]:
    """Spec of a chat job of 20 steps by two workers under ZeRO-2."""
    return {
        "model": {"source": f"s3://{BUCKET}/base"},
        "method": {"tuning": "full"},
        "data": {"train": [{"uri": f"s3://{BUCKET}/rows.jsonl"}], "sequenceLength": 128, "evaluationFraction": 0.1},
        "training": {"maxSteps": 20, "sequencesPerBatch": 4, "precision": "fp32", "evaluateEverySteps": 10},
        "deepspeed": {"zeroStage": 2},
        "workers": {"count": 2, "gpusEach": 0, "cpusEach": 0.5},
        "checkpoint": {"everySteps": 5},
        "output": {"uri": f"s3://{BUCKET}/output"},
    }
