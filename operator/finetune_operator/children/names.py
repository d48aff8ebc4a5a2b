"""Names of a job's children: deterministic, valid, and at most 47 characters, which is KubeRay's limit.

A name that would be longer keeps its beginning and its suffix, and gets a hash of the job's whole name between them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Final

from finetune_operator.children.labels import ATTEMPT_LABEL

MAX_LENGTH: Final = 47  # KubeRay adds up to 16 characters for its own children, and 63 is a label's limit
_HASH_LENGTH: Final = 8


def run_config_name(job: str, suffix: str) -> str:
    """The ConfigMap with a stage's run.json; `suffix` is `prepare`, or `a<N>` for attempt N."""
    return _name(job, suffix)


def prepare_name(job: str) -> str:
    """The Job that prepares data."""
    return _name(job, "prepare")


def prepare_cluster_name(job: str) -> str:
    """The RayCluster that the prepare Job's pod works with, when it is not enough alone."""
    return _name(job, "prepare-ray")


def ray_job_name(job: str, attempt: int) -> str:
    """The RayJob of an attempt, counted from 1."""
    return _name(job, attempt_suffix(attempt))


def result_name(job: str) -> str:
    """The Job that reads the result from storage."""
    return _name(job, "result")


def network_policy_name(job: str) -> str:
    """The NetworkPolicy of all pods of a job."""
    return _name(job)


def attempt_suffix(attempt: int) -> str:
    """What the children of an attempt end in."""
    return f"a{attempt}"


def attempt_of(labels: Mapping[str, str]) -> int | None:
    """The attempt that an object with these labels belongs to; None: it is of no attempt."""
    number = labels.get(ATTEMPT_LABEL, "")
    return int(number) if number.isascii() and number.isdecimal() else None


def _name(job: str, suffix: str = "") -> str:
    ending = f"-{suffix}" if suffix else ""
    if len(job + ending) <= MAX_LENGTH:
        return job + ending
    digest = hashlib.sha256(job.encode()).hexdigest()[:_HASH_LENGTH]
    beginning = job[: MAX_LENGTH - len(ending) - _HASH_LENGTH - 1].rstrip("-")
    return f"{beginning}-{digest}{ending}"
