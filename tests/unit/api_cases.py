"""A valid job and runtime, and the changes that break a rule between fields: one row, one mistake."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from finetune_api.deepspeed_keys import REFUSED_KEYS

Value = Any

JOB: dict[str, Value] = {
    "apiVersion": "finetune.dev/v1alpha1",
    "kind": "FinetuneJob",
    "metadata": {"name": "support-chat"},
    "spec": {
        "model": {"source": "hf://org/name@main"},
        "data": {"train": [{"uri": "s3://rows/train.jsonl"}]},
        "output": {"uri": "s3://models/support-chat"},
    },
}
RUNTIME: dict[str, Value] = {
    "apiVersion": "finetune.dev/v1alpha1",
    "kind": "FinetuneRuntime",
    "metadata": {"name": "h200"},
    "spec": {"images": {"trainer": "registry.example.com/trainer:1"}},
}


def changed(document: dict[str, Value], changes: dict[str, Value]) -> dict[str, Value]:
    """A copy with the values at dotted paths set; `[0]` is an item that is there, None removes a key."""
    result = copy.deepcopy(document)
    for path, value in changes.items():
        node: Value = result
        *way, last = (int(part[1:-1]) if part[0] == "[" else part for part in path.replace("[", ".[").split("."))
        for part in way:
            node = node[part] if isinstance(part, int) else node.setdefault(part, {})
        if value is None and not isinstance(last, int):
            node.pop(last, None)
        else:
            node[last] = value
    return result


@dataclass(frozen=True)
class Broken:
    """Changes to the valid job, the field the error must be on, and words of its message."""

    changes: dict[str, Value]
    field: str
    words: str


def _gate(**fields: Value) -> dict[str, Value]:
    return {"spec.evaluation.gates": [{"metric": "evalLoss", **fields}], "spec.data.evaluationFraction": 0.1}


_ADDRESSES = {
    "spec.model.source": "spec.model.source",
    "spec.data.train[0].uri": "spec.data.train[0].uri",
    "spec.output.uri": "spec.output.uri",
}
_BAD_ADDRESSES = [
    ("http://host/x", "not an address"),
    ("s3:/bucket/key", "not an address"),
    ("S3://bucket/key", "not an address"),
    ("file://folder/rows", "not an address"),
    ("s3://key:secret@bucket/x", "user and password"),
    ("s3://key:se/cret@bucket/x", "user and password"),
    ("gs://someone@bucket/x", "user and password"),
    ("s3://bucket/x?endpoint_override=host", "must not have options"),
    ("s3://bucket/x#part", "must not have options"),
    ("../rows", "must not go upwards"),
    ("s3://bucket/a/../b", "must not go upwards"),
    ("rows/%2e%2E/x", "must not go upwards"),
    ("file:///a/..", "must not go upwards"),
]

BROKEN_JOBS: list[Broken] = [
    *(Broken({path: uri}, field, words) for path, field in _ADDRESSES.items() for uri, words in _BAD_ADDRESSES),
    *(
        Broken({"spec.data.evaluation": [{"uri": uri}]}, "spec.data.evaluation[0].uri", words)
        for uri, words in _BAD_ADDRESSES
    ),
    Broken({"spec.model.source": "hf://name"}, "spec.model.source", "not an address"),
    Broken({"spec.data.train[0].uri": "hf://org/name"}, "spec.data.train[0].uri", "not an address"),
    Broken({"spec.output.uri": "s3://rows/train.jsonl"}, "spec.output.uri", "would overwrite"),
    Broken({"spec.output.uri": "hf://org/name@main"}, "spec.output.uri", "would overwrite"),
    Broken(
        {"spec.data.evaluation": [{"uri": "s3://rows/eval.jsonl"}], "spec.data.evaluationFraction": 0.1},
        "spec.data.evaluationFraction",
        "given twice",
    ),
    Broken(
        {"spec.method.objective": "dpo", "spec.data.train[0].format": "chat"},
        "spec.method.objective",
        "preference rows only",
    ),
    Broken(
        {"spec.method.objective": "dpo", "spec.data.evaluation": [{"uri": "s3://rows/e", "format": "text"}]},
        "spec.method.objective",
        "preference rows only",
    ),
    Broken({"spec.data.train[0].format": "preference"}, "spec.method.objective", "for objective dpo"),
    Broken(
        {"spec.method.objective": "dpo", "spec.data.train[0].format": "preference", "spec.data.overlong": "split"},
        "spec.data.overlong",
        "cannot be split",
    ),
    Broken(
        {"spec.method.objective": "dpo", "spec.data.train[0].format": "preference", "spec.data.loss": "all"},
        "spec.data.loss",
        "between answers",
    ),
    Broken(
        {
            "spec.method.objective": "dpo",
            "spec.data.train[0].format": "preference",
            "spec.workers.count": 2,
            "spec.deepspeed.sequenceParallel": 2,
        },
        "spec.deepspeed.sequenceParallel",
        "not shared among processes",
    ),
    Broken(
        {"spec.method.objective": "pretrain", "spec.data.train[0].format": "chat"},
        "spec.method.objective",
        "text and code rows only",
    ),
    Broken(
        {"spec.training.tokensPerBatch": 8192, "spec.training.sequencesPerBatch": 4},
        "spec.training.tokensPerBatch",
        "given twice",
    ),
    Broken({"spec.training.tokensPerBatch": 2047}, "spec.training.tokensPerBatch", "smaller than one sequence"),
    Broken({"spec.training.recomputeEvery": 2}, "spec.training.recomputeEvery", "no activations are recomputed"),
    Broken({"spec.training.maxSteps": 10, "spec.training.warmup": 11}, "spec.training.warmup", "longer than the run"),
    Broken(
        {"spec.training.schedule": "wsd", "spec.training.warmup": 0.5, "spec.training.decay": 0.6},
        "spec.training.decay",
        "longer than the run",
    ),
    Broken({"spec.training.evaluateEverySteps": 10}, "spec.training.evaluateEverySteps", "no rows to evaluate on"),
    Broken({"spec.training.precision": "fp16"}, "spec.training.precision", "does not train on CPUs"),
    Broken({"spec.deepspeed.offload.parameters": "cpu"}, "spec.deepspeed.offload.parameters", "with ZeRO 3 only"),
    Broken(
        {"spec.deepspeed.offload.optimizer": "cpu", "spec.deepspeed.zeroStage": 0},
        "spec.deepspeed.offload.optimizer",
        "with ZeRO 1, 2 or 3 only",
    ),
    Broken(
        {"spec.deepspeed.sequenceParallel": 2, "spec.workers.count": 3},
        "spec.deepspeed.sequenceParallel",
        "does not divide",
    ),
    Broken(
        {"spec.deepspeed.sequenceParallel": 3, "spec.workers.count": 3},
        "spec.data.sequenceLength",
        "cannot be cut",
    ),
    Broken({"spec.workers.count": 3, "spec.workers.gpusEach": 8}, "spec.workers.count", "nothing to do"),
    Broken({"spec.workers.count": 2, "spec.training.tokensPerBatch": 2048}, "spec.workers.count", "nothing to do"),
    *(
        Broken(
            {
                f"spec.deepspeed.config.{refused.key}": {"object": {}, "boolean": True, "number": 1, "string": "cpu"}[
                    refused.type
                ]
            },
            f"spec.deepspeed.config.{refused.key}",
            refused.why,
        )
        for refused in REFUSED_KEYS
    ),
    Broken({"spec.workers.min": 2}, "spec.workers.min", "more than workers.count"),
    Broken(
        {"spec.checkpoint.everySteps": 10, "spec.checkpoint.everyMinutes": 10},
        "spec.checkpoint.everyMinutes",
        "given twice",
    ),
    Broken(_gate(), "spec.evaluation.gates[0].metric", "no bound"),
    Broken(_gate(min=2, max=1), "spec.evaluation.gates[0].min", "above its max"),
    Broken(
        {"spec.evaluation.gates": [{"metric": "evalLossRatio", "max": 1}]},
        "spec.evaluation.gates",
        "needs rows to evaluate on",
    ),
    Broken(
        {
            "spec.evaluation.gates": [{"metric": "promptsPassed", "min": 1}],
            "spec.evaluation.prompts": [{"prompt": "Hi"}],
        },
        "spec.evaluation.gates",
        "needs prompts that can fail",
    ),
    Broken(
        {"spec.evaluation.gates": [{"metric": "overRefusalRate", "max": 0.1}]},
        "spec.evaluation.gates",
        "needs the refusal suite",
    ),
    Broken(
        {"spec.data.refusals.mix": 0.1, "spec.method.objective": "pretrain"},
        "spec.data.refusals.mix",
        "objective sft learns",
    ),
]

BROKEN_RUNTIMES: list[Broken] = [
    Broken(
        {"spec.tolerations": [{"key": "a", "operator": "Exists", "value": "b"}]},
        "spec.tolerations[0].value",
        "Exists has no value",
    ),
    Broken({"spec.tolerations": [{"value": "b"}]}, "spec.tolerations[0].key", "needs a key"),
    Broken(
        {"spec.tolerations": [{"key": "a", "tolerationSeconds": 5}]},
        "spec.tolerations[0].tolerationSeconds",
        "effect NoExecute",
    ),
    Broken(
        {"spec.namespaces.matchExpressions": [{"key": "team", "operator": "In"}]},
        "spec.namespaces.matchExpressions[0].values",
        "need values",
    ),
    Broken({"spec.limits.maxCost": 10}, "spec.limits.maxCost", "without a price"),
]

# Right at the edge of a rule, and right.
VALID_JOBS: list[dict[str, Value]] = [
    {},
    {"spec.model.source": "abfs://models@account.dfs.core.windows.net/base"},
    {"spec.model.source": "pvc://models/base"},
    {"spec.data.train[0].uri": "file:///data/a..b/x.jsonl"},
    {"spec.data.evaluation": [{"uri": "s3://rows/eval.jsonl"}], "spec.training.evaluateEverySteps": 5},
    {"spec.method.objective": "dpo", "spec.data.train[0].format": "preference"},
    {"spec.method.objective": "pretrain", "spec.data.train[0].format": "text"},
    {"spec.training.tokensPerBatch": 2048},
    {"spec.training.maxSteps": 10, "spec.training.warmup": 10},
    {"spec.training.schedule": "wsd", "spec.training.warmup": 0.5, "spec.training.decay": 0.5},
    {"spec.training.precision": "fp16", "spec.workers.gpusEach": 1},
    {"spec.deepspeed.zeroStage": 3, "spec.deepspeed.offload.parameters": "cpu"},
    {"spec.deepspeed.offload.optimizer": "cpu"},
    {"spec.deepspeed.sequenceParallel": 4, "spec.workers.count": 4},
    {"spec.workers.count": 2, "spec.workers.gpusEach": 8},
    {"spec.workers.count": 64, "spec.workers.min": 64, "spec.training.sequencesPerBatch": 64},
    {"spec.deepspeed.config": {"zero_optimization": {"stage3_param_persistence_threshold": 0}, "x": None}},
    _gate(min=1, max=1),
    {
        "spec.evaluation.gates": [{"metric": "promptsPassed", "min": 1}],
        "spec.evaluation.prompts": [{"prompt": "Hi", "expect": ["hello"]}],
    },
    {"spec.evaluation.gates": [{"metric": "refusalRate", "min": 0.9}], "spec.evaluation.refusalSuite": True},
]
VALID_RUNTIMES: list[dict[str, Value]] = [
    {},
    {"spec.tolerations": [{"operator": "Exists"}, {"key": "a", "value": "b", "effect": "NoExecute"}]},
    {"spec.namespaces.matchExpressions": [{"key": "team", "operator": "Exists"}]},
    {"spec.limits.maxCost": 10, "spec.accelerator.pricePerHour": 0},
]
