"""The rules between a FinetuneJob's fields, and what of it cannot change. The one list: see `rules.Rule`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from finetune_api.address_rules import MODEL_SCHEMES, SCHEMES, address_rules
from finetune_api.deepspeed_keys import REFUSED_KEYS, RefusedKey
from finetune_api.rules import Rule, Value

RAW_KEYS: Final = "spec.deepspeed.config"

_DATA_EXAMPLES: Final = "s3://BUCKET/KEY, gs://BUCKET/KEY, abfs://CONTAINER@ACCOUNT/KEY or file:///PATH"
_MODEL_EXAMPLES: Final = "hf://ORG/NAME@REVISION, s3://, gs://, abfs://, pvc://CLAIM/PATH or file:///PATH"


def _deepspeed_rule(refused: RefusedKey) -> Rule:
    parts = refused.key.split(".")
    ways = [".".join(parts[: n + 1]) for n in range(len(parts))]

    def holds(config: Value) -> bool:
        for part in parts:
            if not isinstance(config, Mapping) or part not in config:
                return True
            config = config[part]
        return False

    return Rule(
        RAW_KEYS,
        (refused.key,),
        " || ".join(f"!has(self.{way})" for way in ways),
        f"the raw key {refused.key} {refused.why}",
        refused.do,
        holds,
    )


def _has_evaluation_rows(spec: Value) -> bool:
    return bool(spec["data"].get("evaluation")) or spec["data"]["evaluationFraction"] > 0


_CEL_HAS_EVALUATION_ROWS: Final = (
    "(has(self.data.evaluation) && size(self.data.evaluation) > 0 || self.data.evaluationFraction > 0.0)"
)
_EVALUATION_ROWS: Final = ("data.evaluation", "data.evaluationFraction")


def _processes(workers: Value) -> int:
    return int(workers["count"]) * max(1, int(workers["gpusEach"]))


_CEL_PROCESSES: Final = "self.workers.count * (self.workers.gpusEach > 0 ? self.workers.gpusEach : 1)"


def _batch(spec: Value) -> int:
    """Sequences in a global batch; too few tokens for one is another rule's business."""
    training, length = spec["training"], spec["data"]["sequenceLength"]
    if "sequencesPerBatch" in training:
        return int(training["sequencesPerBatch"])
    return max(1, int(training["tokensPerBatch"] // length)) if "tokensPerBatch" in training else 16


_CEL_BATCH: Final = (
    "(has(self.training.sequencesPerBatch) ? self.training.sequencesPerBatch"
    " : !has(self.training.tokensPerBatch) ? 16"
    " : self.training.tokensPerBatch < self.data.sequenceLength ? 1"
    " : self.training.tokensPerBatch / self.data.sequenceLength)"
)


def _formats(spec: Value) -> list[str]:
    data = spec["data"]
    return [source.get("format", "auto") for source in [*data["train"], *data.get("evaluation", [])]]


def _formats_rule(objective: str, allowed: Sequence[str], message: str, do: str) -> Rule:
    listed = "[" + ", ".join(f"'{name}'" for name in allowed) + "]"
    every = f".all(source, source.format in {listed})"
    return Rule(
        "spec",
        ("method.objective", "data.train", "data.evaluation"),
        f"self.method.objective != '{objective}' || self.data.train{every}"
        f" && (!has(self.data.evaluation) || self.data.evaluation{every})",
        message,
        do,
        lambda spec: spec["method"]["objective"] != objective or all(f in allowed for f in _formats(spec)),
    )


def _measured_prompts(evaluation: Value) -> bool:
    return any(prompt.get("expect") or prompt.get("reject") for prompt in evaluation.get("prompts", []))


JOB_RULES: Final[tuple[Rule, ...]] = (
    *address_rules("spec.model.source", MODEL_SCHEMES, _MODEL_EXAMPLES),
    *address_rules("spec.data.train[].uri", SCHEMES, _DATA_EXAMPLES),
    *address_rules("spec.data.evaluation[].uri", SCHEMES, _DATA_EXAMPLES),
    *address_rules("spec.output.uri", SCHEMES, _DATA_EXAMPLES),
    Rule(
        "spec",
        ("output.uri", "data.train", "data.evaluation", "model.source"),
        "self.output.uri != self.model.source && self.data.train.all(source, source.uri != self.output.uri)"
        " && (!has(self.data.evaluation) || self.data.evaluation.all(source, source.uri != self.output.uri))",
        "the output would overwrite the job's own model or rows",
        "choose another folder",
        lambda spec: (
            spec["output"]["uri"]
            not in (
                spec["model"]["source"],
                *(source["uri"] for source in [*spec["data"]["train"], *spec["data"].get("evaluation", [])]),
            )
        ),
    ),
    Rule(
        "spec.data",
        ("evaluationFraction", "evaluation"),
        "!has(self.evaluation) || size(self.evaluation) == 0 || self.evaluationFraction == 0.0",
        "evaluation rows are given twice, as data.evaluation and as data.evaluationFraction",
        "keep one of the two",
        lambda data: not data.get("evaluation") or data["evaluationFraction"] == 0,
    ),
    _formats_rule(
        "dpo",
        ("auto", "preference"),
        "objective dpo learns from preference rows only",
        "set each data format to preference or auto, or another method.objective",
    ),
    _formats_rule(
        "sft",
        ("auto", "chat", "completion", "text", "code", "rag"),
        "preference rows are for objective dpo",
        "set method.objective to dpo, or give rows of another format",
    ),
    _formats_rule(
        "pretrain",
        ("auto", "text", "code"),
        "objective pretrain reads text and code rows only",
        "set method.objective to sft for chat and completion rows",
    ),
    Rule(
        "spec",
        ("data.overlong", "method.objective"),
        "self.method.objective != 'dpo' || self.data.overlong != 'split'",
        "the answers of a pair cannot be split: their pieces would not answer the same prompt",
        "set data.overlong to error, truncate or drop",
        lambda spec: spec["method"]["objective"] != "dpo" or spec["data"]["overlong"] != "split",
    ),
    Rule(
        "spec",
        ("data.loss", "method.objective"),
        "self.method.objective != 'dpo' || self.data.loss != 'all'",
        "a preference is between answers, and their prompt is no part of it",
        "set data.loss to assistant or last-turn",
        lambda spec: spec["method"]["objective"] != "dpo" or spec["data"]["loss"] != "all",
    ),
    Rule(
        "spec",
        ("deepspeed.sequenceParallel", "method.objective"),
        "self.method.objective != 'dpo' || self.deepspeed.sequenceParallel == 1",
        "the answers of a pair are not shared among processes",
        "set deepspeed.sequenceParallel to 1",
        lambda spec: spec["method"]["objective"] != "dpo" or spec["deepspeed"]["sequenceParallel"] == 1,
    ),
    Rule(
        "spec",
        ("data.refusals.mix", "method.objective"),
        "self.method.objective == 'sft' || self.data.refusals.mix == 0.0",
        "the built-in refusals are answers, which objective sft learns",
        "set data.refusals.mix to 0, or method.objective to sft",
        lambda spec: spec["method"]["objective"] == "sft" or spec["data"]["refusals"]["mix"] == 0,
    ),
    Rule(
        "spec.training",
        ("tokensPerBatch", "sequencesPerBatch"),
        "!has(self.tokensPerBatch) || !has(self.sequencesPerBatch)",
        "the batch is given twice, in tokens and in sequences",
        "keep tokensPerBatch or sequencesPerBatch",
        lambda training: "tokensPerBatch" not in training or "sequencesPerBatch" not in training,
    ),
    Rule(
        "spec",
        ("training.tokensPerBatch", "data.sequenceLength"),
        "!has(self.training.tokensPerBatch) || self.training.tokensPerBatch >= self.data.sequenceLength",
        "tokensPerBatch is smaller than one sequence",
        "raise training.tokensPerBatch to data.sequenceLength or more",
        lambda spec: spec["training"].get("tokensPerBatch", 1 << 40) >= spec["data"]["sequenceLength"],
    ),
    Rule(
        "spec.training",
        ("recomputeEvery", "activationCheckpointing"),
        "self.recomputeEvery == 1 || self.activationCheckpointing",
        "no activations are recomputed, so it makes no difference in which blocks",
        "set training.activationCheckpointing too",
        lambda training: training["recomputeEvery"] == 1 or training["activationCheckpointing"],
    ),
    Rule(
        "spec.training",
        ("warmup", "maxSteps"),
        "!has(self.maxSteps) || self.warmup < 1.0 || self.warmup <= double(self.maxSteps)",
        "the warm-up is longer than the run, so the learning rate never gets to its peak",
        "lower training.warmup below training.maxSteps, or write it as a fraction below 1",
        lambda training: training["warmup"] < 1 or training["warmup"] <= training.get("maxSteps", 1 << 40),
    ),
    Rule(
        "spec.training",
        ("decay", "warmup", "schedule"),
        "self.schedule != 'wsd' || self.warmup >= 1.0 || self.warmup + self.decay <= 1.0",
        "warm-up and decay together are longer than the run",
        "lower training.warmup or training.decay so that their sum is at most 1",
        lambda t: t["schedule"] != "wsd" or t["warmup"] >= 1 or t["warmup"] + t["decay"] <= 1,
    ),
    Rule(
        "spec",
        ("training.evaluateEverySteps", *_EVALUATION_ROWS),
        f"!has(self.training.evaluateEverySteps) || {_CEL_HAS_EVALUATION_ROWS}",
        "there are no rows to evaluate on",
        "set data.evaluation or data.evaluationFraction",
        lambda spec: "evaluateEverySteps" not in spec["training"] or _has_evaluation_rows(spec),
    ),
    Rule(
        "spec",
        ("training.precision", "workers.gpusEach"),
        "self.training.precision != 'fp16' || self.workers.gpusEach > 0",
        "fp16 does not train on CPUs",
        "set training.precision to bf16 or fp32, or workers.gpusEach to 1 or more",
        lambda spec: spec["training"]["precision"] != "fp16" or spec["workers"]["gpusEach"] > 0,
    ),
    Rule(
        "spec.deepspeed",
        ("offload.parameters", "zeroStage"),
        "self.offload.parameters == 'none' || self.zeroStage == 3",
        "parameters can be offloaded with ZeRO 3 only",
        "set deepspeed.zeroStage to 3",
        lambda deepspeed: deepspeed["offload"]["parameters"] == "none" or deepspeed["zeroStage"] == 3,
    ),
    Rule(
        "spec.deepspeed",
        ("offload.optimizer", "zeroStage"),
        "self.offload.optimizer == 'none' || self.zeroStage != 0",
        "optimizer states can be offloaded with ZeRO 1, 2 or 3 only",
        "set deepspeed.zeroStage to 1 or more",
        lambda deepspeed: deepspeed["offload"]["optimizer"] == "none" or deepspeed["zeroStage"] != 0,
    ),
    Rule(
        "spec",
        ("deepspeed.sequenceParallel", "workers.count", "workers.gpusEach"),
        f"({_CEL_PROCESSES}) % self.deepspeed.sequenceParallel == 0",
        "sequenceParallel does not divide the number of processes (workers.count × workers.gpusEach)",
        "choose a divisor of it",
        lambda spec: _processes(spec["workers"]) % spec["deepspeed"]["sequenceParallel"] == 0,
    ),
    Rule(
        "spec",
        ("data.sequenceLength", "deepspeed.sequenceParallel"),
        "self.data.sequenceLength % self.deepspeed.sequenceParallel == 0",
        "sequenceLength cannot be cut into sequenceParallel equal parts",
        "make data.sequenceLength a multiple of deepspeed.sequenceParallel",
        lambda spec: spec["data"]["sequenceLength"] % spec["deepspeed"]["sequenceParallel"] == 0,
    ),
    Rule(
        "spec",
        (
            "workers.count",
            "workers.gpusEach",
            "deepspeed.sequenceParallel",
            "training.tokensPerBatch",
            "training.sequencesPerBatch",
            "data.sequenceLength",
        ),
        f"{_CEL_BATCH} * self.deepspeed.sequenceParallel >= {_CEL_PROCESSES}",
        "a batch holds fewer sequences than there are processes, so some would have nothing to do",
        "raise training.sequencesPerBatch (or tokensPerBatch), or take fewer workers",
        lambda spec: _batch(spec) * spec["deepspeed"]["sequenceParallel"] >= _processes(spec["workers"]),
    ),
    *(_deepspeed_rule(refused) for refused in REFUSED_KEYS),
    Rule(
        "spec.workers",
        ("min", "count"),
        "!has(self.min) || self.min <= self.count",
        "workers.min is more than workers.count",
        "lower min or raise count",
        lambda workers: workers.get("min", 1) <= workers["count"],
    ),
    Rule(
        "spec.checkpoint",
        ("everyMinutes", "everySteps"),
        "!has(self.everySteps) || !has(self.everyMinutes)",
        "the checkpoint interval is given twice, in steps and in minutes",
        "keep everySteps or everyMinutes",
        lambda checkpoint: "everySteps" not in checkpoint or "everyMinutes" not in checkpoint,
    ),
    Rule(
        "spec.evaluation.gates[]",
        ("metric", "min", "max"),
        "has(self.min) || has(self.max)",
        "the gate has no bound, so nothing could miss it",
        "set min, max or both",
        lambda gate: "min" in gate or "max" in gate,
    ),
    Rule(
        "spec.evaluation.gates[]",
        ("min", "max"),
        "!has(self.min) || !has(self.max) || self.min <= self.max",
        "the gate's min is above its max, so nothing could pass it",
        "swap them",
        lambda gate: "min" not in gate or "max" not in gate or gate["min"] <= gate["max"],
    ),
    Rule(
        "spec",
        ("evaluation.gates", *_EVALUATION_ROWS),
        "!has(self.evaluation.gates)"
        " || !self.evaluation.gates.exists(gate, gate.metric == 'evalLoss' || gate.metric == 'evalLossRatio')"
        f" || {_CEL_HAS_EVALUATION_ROWS}",
        "a gate on evalLoss or evalLossRatio needs rows to evaluate on",
        "set data.evaluation or data.evaluationFraction",
        lambda spec: (
            not any(gate["metric"] in ("evalLoss", "evalLossRatio") for gate in spec["evaluation"].get("gates", []))
            or _has_evaluation_rows(spec)
        ),
    ),
    Rule(
        "spec.evaluation",
        ("gates", "prompts"),
        "!has(self.gates) || !self.gates.exists(gate, gate.metric == 'promptsPassed') || has(self.prompts)"
        " && self.prompts.exists(prompt, has(prompt.expect) && size(prompt.expect) > 0"
        " || has(prompt.reject) && size(prompt.reject) > 0)",
        "a gate on promptsPassed needs prompts that can fail",
        "give at least one of evaluation.prompts an expect or reject",
        lambda evaluation: (
            not any(gate["metric"] == "promptsPassed" for gate in evaluation.get("gates", []))
            or _measured_prompts(evaluation)
        ),
    ),
    Rule(
        "spec.evaluation",
        ("gates", "refusalSuite"),
        "!has(self.gates) || self.refusalSuite"
        " || !self.gates.exists(gate, gate.metric == 'refusalRate' || gate.metric == 'overRefusalRate')",
        "a gate on refusalRate or overRefusalRate needs the refusal suite",
        "set evaluation.refusalSuite to true",
        lambda evaluation: (
            evaluation["refusalSuite"]
            or not any(gate["metric"] in ("refusalRate", "overRefusalRate") for gate in evaluation.get("gates", []))
        ),
    ),
)

# What the result is made of stays; how it is made (workers, deepspeed, checkpoint, limits, runtimeRef, suspend,
# ttlAfterFinished) may change, and the next attempt takes it up.
IMMUTABLE: Final = ("model", "method", "data", "training", "evaluation", "output")
IMMUTABLE_MESSAGE: Final = "this cannot change once the job exists; make a new job with another name"


def changed_immutables(old: Mapping[str, Value], new: Mapping[str, Value]) -> list[str]:
    """Names of the immutable parts of a job's spec that differ; both specs with defaults filled in."""
    return [name for name in IMMUTABLE if old.get(name) != new.get(name)]
