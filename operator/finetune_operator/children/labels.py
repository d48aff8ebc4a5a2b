"""Labels of a job's children, by which they are found again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal

from finetune_api.base import GROUP

Stage = Literal["prepare", "train", "result"]

JOB_LABEL: Final = f"{GROUP}/job"
STAGE_LABEL: Final = f"{GROUP}/stage"
ATTEMPT_LABEL: Final = f"{GROUP}/attempt"
QUEUE_LABEL: Final = "kueue.x-k8s.io/queue-name"

# KubeRay finds a head pod, and its Service selects it, by labels that a pod template could overwrite.
_KUBERAY_PREFIX: Final = "ray.io/"
_KUBERAY_LABELS: Final = frozenset({"app.kubernetes.io/name", "app.kubernetes.io/created-by"})


def labels(job: str, stage: Stage | None = None, attempt: int | None = None) -> dict[str, str]:
    """Labels of a child of `job`; what serves every stage, or every attempt, has none of that."""
    found = {JOB_LABEL: job}
    if stage is not None:
        found[STAGE_LABEL] = stage
    if attempt is not None:
        found[ATTEMPT_LABEL] = str(attempt)
    return found


def extra_labels(chosen: Mapping[str, str]) -> dict[str, str]:
    """Those of the admin's labels that we and KubeRay do not find our objects by."""
    return {key: value for key, value in chosen.items() if not _reserved(key)}


def _reserved(key: str) -> bool:
    return key.startswith((f"{GROUP}/", _KUBERAY_PREFIX)) or key in _KUBERAY_LABELS
