"""Rules between fields: each is broken by some job, and its CEL and its Python say the same."""

from __future__ import annotations

from typing import Any

import cel
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_api.crd import JOB, RUNTIME, Kind, Schema, schema, with_defaults
from finetune_api.job_rules import IMMUTABLE, changed_immutables
from finetune_api.rules import broken_rules, values_at
from tests.unit import api_cases
from tests.unit.api_cases import BROKEN_JOBS, BROKEN_RUNTIMES, VALID_JOBS, VALID_RUNTIMES, changed

BROKEN = [changed(api_cases.JOB, case.changes) for case in BROKEN_JOBS]
VALID = [changed(api_cases.JOB, changes) for changes in VALID_JOBS]
BROKEN_R = [changed(api_cases.RUNTIME, case.changes) for case in BROKEN_RUNTIMES]
VALID_R = [changed(api_cases.RUNTIME, changes) for changes in VALID_RUNTIMES]


def typed(value: Any, of: Schema) -> Any:
    """The value as the API server hands it to CEL: whole numbers are doubles where the schema says number."""
    if isinstance(value, dict):
        return {key: typed(item, of.get("properties", {}).get(key, {})) for key, item in value.items()}
    if isinstance(value, list):
        return [typed(item, of.get("items", {})) for item in value]
    return float(value) if of.get("type") == "number" else value


def assert_cel_agrees(kind: Kind, document: dict[str, Any]) -> None:
    value = typed(with_defaults(document, schema(kind)), schema(kind))
    for rule in kind.rules:
        for path, scope in values_at(value, rule.at):
            assert cel.evaluate(rule.cel, {"self": scope}) == rule.holds(scope), (path, rule.cel)


@pytest.mark.parametrize(("kind", "documents"), [(JOB, BROKEN + VALID), (RUNTIME, BROKEN_R + VALID_R)])
def test_cel_and_python_say_the_same_of_every_case(kind: Kind, documents: list[dict[str, Any]]) -> None:
    for document in documents:
        assert_cel_agrees(kind, document)


@pytest.mark.parametrize(("kind", "documents"), [(JOB, BROKEN), (RUNTIME, BROKEN_R)])
def test_every_rule_is_broken_by_some_case(kind: Kind, documents: list[dict[str, Any]]) -> None:
    broken = {b.rule for d in documents for b in broken_rules(kind.rules, with_defaults(d, schema(kind)))}
    assert not [rule.cel for rule in kind.rules if rule not in broken]


_SCHEMES = st.sampled_from(["", "s3://", "S3://", "file://", "file:///", "hf://", "pvc://", "http://", "gs:"])
_ADDRESSES = st.builds(str.__add__, _SCHEMES, st.text("ab/.:@?#%2eEfF\\", max_size=12)).filter(bool)
_CHANGES: dict[str, st.SearchStrategy[Any]] = {
    "spec.model.source": _ADDRESSES,
    "spec.data.train[0].uri": _ADDRESSES,
    "spec.output.uri": _ADDRESSES,
    "spec.data.train[0].format": st.sampled_from(["auto", "chat", "text", "preference"]),
    "spec.data.evaluation": st.lists(st.fixed_dictionaries({"uri": _ADDRESSES}), max_size=2),
    "spec.data.evaluationFraction": st.sampled_from([0, 0.0, 0.5]),
    "spec.data.overlong": st.sampled_from(["error", "split", "drop"]),
    "spec.data.loss": st.sampled_from(["assistant", "all"]),
    "spec.data.sequenceLength": st.integers(16, 4096),
    "spec.method.objective": st.sampled_from(["sft", "pretrain", "dpo"]),
    "spec.training.tokensPerBatch": st.integers(16, 8192),
    "spec.training.sequencesPerBatch": st.integers(1, 64),
    "spec.training.maxSteps": st.integers(1, 20),
    "spec.training.warmup": st.one_of(st.integers(0, 20), st.floats(0, 20)),
    "spec.training.decay": st.floats(0, 1),
    "spec.training.activationCheckpointing": st.booleans(),
    "spec.training.recomputeEvery": st.integers(1, 3),
    "spec.training.schedule": st.sampled_from(["cosine", "wsd"]),
    "spec.training.precision": st.sampled_from(["bf16", "fp16"]),
    "spec.training.evaluateEverySteps": st.integers(1, 5),
    "spec.deepspeed.zeroStage": st.sampled_from(["auto", 0, 1, 2, 3]),
    "spec.deepspeed.offload.parameters": st.sampled_from(["none", "cpu"]),
    "spec.deepspeed.offload.optimizer": st.sampled_from(["none", "cpu"]),
    "spec.deepspeed.sequenceParallel": st.integers(1, 8),
    "spec.workers.count": st.integers(1, 64),
    "spec.workers.min": st.integers(1, 64),
    "spec.workers.gpusEach": st.integers(0, 16),
    "spec.evaluation.refusalSuite": st.booleans(),
    "spec.evaluation.gates": st.lists(
        st.fixed_dictionaries(
            {"metric": st.sampled_from(["evalLoss", "promptsPassed", "refusalRate"])},
            optional={"min": st.floats(-2, 2), "max": st.floats(-2, 2)},
        ),
        max_size=2,
    ),
    "spec.evaluation.prompts": st.lists(
        st.fixed_dictionaries({"prompt": st.just("Hi")}, optional={"expect": st.lists(st.just("a"), max_size=1)}),
        max_size=2,
    ),
}


@given(st.fixed_dictionaries({}, optional=_CHANGES))
@settings(max_examples=150, deadline=None)
def test_cel_and_python_say_the_same_of_any_job(changes: dict[str, Any]) -> None:
    assert_cel_agrees(JOB, changed(api_cases.JOB, changes))


def test_only_what_the_result_is_made_of_is_immutable() -> None:
    old = with_defaults(api_cases.JOB, schema(JOB))["spec"]
    limits = changed(api_cases.JOB, {"spec.limits.retries": 9, "spec.suspend": True, "spec.workers.count": 2})
    assert changed_immutables(old, with_defaults(limits, schema(JOB))["spec"]) == []
    rate = changed(api_cases.JOB, {"spec.training.learningRate": 1e-5, "spec.output.uri": "s3://models/other"})
    assert changed_immutables(old, with_defaults(rate, schema(JOB))["spec"]) == ["training", "output"]


def test_the_crd_holds_a_transition_rule_for_every_immutable_part() -> None:
    spec = schema(JOB)["properties"]["spec"]["properties"]
    held = [
        name for name, node in spec.items() for r in node.get("x-kubernetes-validations", []) if "oldSelf" in r["rule"]
    ]
    assert sorted(held) == sorted(IMMUTABLE)
