"""The runtime of a job: which one, whether the job may use it, and the bounds that both set together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from finetune_api.base import parse_duration
from finetune_api.job import FinetuneJobSpec
from finetune_api.runtime import FinetuneRuntimeSpec, NamespaceSelector
from finetune_operator.observe import Block


@dataclass(frozen=True)
class Choice:
    """The runtime of a job, or why there is none that it can use."""

    name: str = ""
    spec: FinetuneRuntimeSpec | None = None
    blocked: Block | None = None


def choose(
    spec: FinetuneJobSpec,
    namespace: str,
    namespace_labels: Mapping[str, str],
    runtimes: Mapping[str, FinetuneRuntimeSpec],
) -> Choice:
    """The runtime that the job names, or the only one there is.

    Args:
        runtimes: every runtime of the cluster, by name.
    """
    names = ", ".join(sorted(runtimes)) or "none"
    if spec.runtime_ref:
        name = spec.runtime_ref.name
        if name not in runtimes:
            message = (
                f"There is no FinetuneRuntime {name}; there are: {names}. Correct spec.runtimeRef or ask the admin."
            )
            return Choice(name, blocked=Block("RuntimeMissing", message))
    elif len(runtimes) == 1:
        (name,) = runtimes
    else:
        message = f"The cluster has {len(runtimes)} FinetuneRuntimes ({names}); say in spec.runtimeRef which one."
        return Choice(blocked=Block("RuntimeMissing", message))
    runtime = runtimes[name]
    return Choice(name, runtime, _refusal(spec, namespace, namespace_labels, name, runtime))


def active_deadline(spec: FinetuneJobSpec, runtime: FinetuneRuntimeSpec | None) -> int | None:
    """Longest life of the job, in seconds: the shorter of its own and the runtime's."""
    texts = [spec.limits.active_deadline, runtime.limits.max_active_deadline if runtime else None]
    return min((parse_duration(text) for text in texts if text), default=None)


def max_cost(spec: FinetuneJobSpec, runtime: FinetuneRuntimeSpec | None) -> float | None:
    """Most that the job may cost, in the runtime's currency: the lower of its own and the runtime's."""
    bounds = [spec.limits.max_cost, runtime.limits.max_cost if runtime else None]
    return min((bound for bound in bounds if bound is not None), default=None)


def selects(selector: NamespaceSelector, labels: Mapping[str, str]) -> bool:
    """Whether a label selector selects an object with these labels (metav1.LabelSelector)."""
    if any(labels.get(key) != value for key, value in selector.match_labels.items()):
        return False
    for requirement in selector.match_expressions:
        there, value = requirement.key in labels, labels.get(requirement.key)
        holds = {
            "In": there and value in requirement.values,
            "NotIn": not there or value not in requirement.values,
            "Exists": there,
            "DoesNotExist": not there,
        }
        if not holds[requirement.operator]:
            return False
    return True


def _refusal(
    spec: FinetuneJobSpec,
    namespace: str,
    namespace_labels: Mapping[str, str],
    name: str,
    runtime: FinetuneRuntimeSpec,
) -> Block | None:
    """Why the job may not use the runtime."""
    limits, workers = runtime.limits, spec.workers
    gpus = workers.count * workers.gpus_each
    if not selects(runtime.namespaces, namespace_labels):
        message = (
            f"Jobs of namespace {namespace} may not use runtime {name}: its spec.namespaces does not select the "
            "namespace's labels. Ask the admin, or use another runtime."
        )
        return Block("NamespaceNotAllowed", message)
    if limits.max_workers is not None and workers.count > limits.max_workers:
        message = f"spec.workers.count is {workers.count}; runtime {name} allows {limits.max_workers}."
        return Block("ExceedsRuntimeLimits", message)
    prepare = spec.data.prepare.workers or 1
    if limits.max_workers is not None and prepare > limits.max_workers:
        message = f"spec.data.prepare.workers is {prepare}; runtime {name} allows {limits.max_workers}."
        return Block("ExceedsRuntimeLimits", message)
    if limits.max_gpus is not None and gpus > limits.max_gpus:
        message = f"spec.workers asks for {gpus} GPUs (count × gpusEach); runtime {name} allows {limits.max_gpus}."
        return Block("ExceedsRuntimeLimits", message)
    if spec.limits.max_cost is not None and runtime.accelerator.price_per_hour is None:
        message = f"spec.limits.maxCost cannot be held: runtime {name} has no accelerator.pricePerHour. Remove maxCost."
        return Block("PriceMissing", message)
    return None
