"""The job that a child belongs to, and the metadata that says so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from finetune_api.base import API_VERSION
from finetune_api.runtime import FinetuneRuntimeSpec
from finetune_operator.children.labels import Stage, extra_labels, labels

Manifest = dict[str, Any]


@dataclass(frozen=True)
class Owner:
    """A FinetuneJob."""

    name: str
    namespace: str
    uid: str


def child_metadata(
    owner: Owner, runtime: FinetuneRuntimeSpec, name: str, stage: Stage | None = None, attempt: int | None = None
) -> Manifest:
    """Metadata of a child object. The API server deletes it after the job: no finalizer is needed."""
    reference = {
        "apiVersion": API_VERSION,
        "kind": "FinetuneJob",
        "name": owner.name,
        "uid": owner.uid,
        "controller": True,
    }
    marks = pod_metadata(owner, runtime, stage, attempt)
    return {"name": name, "namespace": owner.namespace, "ownerReferences": [reference]} | marks


def pod_metadata(
    owner: Owner, runtime: FinetuneRuntimeSpec, stage: Stage | None = None, attempt: int | None = None
) -> Manifest:
    """Labels and annotations: all that the metadata of a pod template holds."""
    return {
        "labels": extra_labels(runtime.labels) | labels(owner.name, stage, attempt),
        "annotations": dict(runtime.annotations),
    }
