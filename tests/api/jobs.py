"""Jobs and runtimes as the tests of this tier use them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from finetune_api.base import API_VERSION
from tests.api.objects import Api, Object
from tests.unit.api_cases import JOB, changed

JOB_KIND = f"{API_VERSION}/FinetuneJob"
RUNTIME_KIND = f"{API_VERSION}/FinetuneRuntime"
RAY_JOB, RAY_CLUSTER = "ray.io/v1/RayJob", "ray.io/v1/RayCluster"


def job(name: str, runtime: str, **fields: Any) -> Object:
    """A job with two workers of one GPU; `fields` are changes such as limits__maxCost=5."""
    changes = {
        "metadata.name": name,
        "spec.runtimeRef": {"name": runtime},
        "spec.output.uri": f"s3://models/{name}",
        "spec.workers": {"count": 2, "gpusEach": 1},
    }
    more = {f"spec.{path.replace('__', '.')}": value for path, value in fields.items()}
    return changed(JOB, changes | more)


@contextmanager
def runtime(api: Api, name: str = "", **fields: Any) -> Iterator[str]:
    """A new runtime, whose GPUs cost 3.60 an hour each; its name, which is made up if none is given."""
    manifest: Object = {
        "apiVersion": API_VERSION,
        "kind": "FinetuneRuntime",
        "metadata": {"name": name} if name else {"generateName": "test-"},
        "spec": {
            "images": {"trainer": "registry.example.com/trainer:1"},
            "accelerator": {"pricePerHour": 3.6},
            "storage": {"workUri": "s3://work"},
        },
    }
    changes = {f"spec.{path.replace('__', '.')}": value for path, value in fields.items()}
    made: str = api.create(changed(manifest, changes))["metadata"]["name"]
    try:
        yield made
    finally:
        api.delete(RUNTIME_KIND, made)
