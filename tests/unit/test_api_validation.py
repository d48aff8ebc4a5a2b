"""Offline validation: every error at once, each on its line, with the value and what to do, and no secret in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_api.checks import Problem
from finetune_api.errors import SpecError
from finetune_api.files import check_file, check_text, load_job
from finetune_api.job import FinetuneJob
from finetune_api.runtime import FinetuneRuntime
from tests.unit import api_cases
from tests.unit.api_cases import BROKEN_JOBS, BROKEN_RUNTIMES, VALID_JOBS, VALID_RUNTIMES, Broken, changed

ROOT = Path(__file__).parents[2]

# One mistake in one field: what is changed, the field of the error, words of the message, words of the hint.
WRONG_FIELDS: list[tuple[dict[str, Any], str, str, str]] = [
    ({"apiVersion": "finetune.dev/v1"}, "apiVersion", "is not a version", "finetune.dev/v1alpha1"),
    ({"kind": "FinetunJob"}, "kind", "is not a kind", "did you mean FinetuneJob?"),
    ({"kind": "Deployment"}, "kind", "is not a kind", "finetune reads"),
    ({"kind": None}, "kind", "is required", "FinetuneJob or FinetuneRuntime"),
    ({"metadata": None}, "metadata", "is required", ""),
    ({"metadata.name": "Chat_1"}, "metadata.name", "lower-case letters", "47"),
    ({"metadata.name": "a" * 48}, "metadata.name", "at most 47 characters", ""),
    ({"metadata.name": "1a"}, "metadata.name", "a letter first", ""),
    ({"spec": None}, "spec", "is required", "It needs model, data, output."),
    ({"spec.output": None}, "spec.output", "is required", "It needs uri."),
    ({"spec.output": "s3://a/b"}, "spec.output", "must be a mapping", ""),
    ({"spec.data.train": []}, "spec.data.train", "at least 1 entries", ""),
    ({"spec.data.train": {"uri": "x"}}, "spec.data.train", "must be a list", ""),
    ({"spec.data.train[0].uri": None}, "spec.data.train[0].uri", "is required", ""),
    ({"spec.data.train[0].uri": "a b"}, "spec.data.train[0].uri", "without spaces", ""),
    ({"spec.data.train[0].formt": "chat"}, "spec.data.train[0].formt", "not a known field", "did you mean format?"),
    ({"spec.data.train[0].columns": {"mesages": "m"}}, "spec.data.train[0].columns.mesages", "known key", "'messages'"),
    ({"spec.data.train[0].weight": 0}, "spec.data.train[0].weight", "must be more than 0", ""),
    ({"spec.data.sequenceLength": "2048"}, "spec.data.sequenceLength", "whole number", "in tokens"),
    ({"spec.data.sequenceLength": 2048.5}, "spec.data.sequenceLength", "whole number", ""),
    ({"spec.data.sequenceLength": 8}, "spec.data.sequenceLength", "at least 16", ""),
    ({"spec.data.packing": "true"}, "spec.data.packing", "true or false", ""),
    ({"spec.data.deduplicate": False}, "spec.data.deduplicate", "'near', 'exact' or 'none'", ""),
    ({"spec.training.precision": "bf61"}, "spec.training.precision", "'bf16', 'fp16'", "did you mean bf16?"),
    ({"spec.training.learning_rate": 0.1}, "spec.training.learning_rate", "known field", "did you mean learningRate?"),
    ({"spec.learningRate": 0.1}, "spec.learningRate", "not a known field", "did you mean spec.training.learningRate?"),
    ({"spec.training.learningRate": True}, "spec.training.learningRate", "must be a number", ""),
    ({"spec.training.epochs": 1001}, "spec.training.epochs", "at most 1000", ""),
    ({"spec.training.beta1": 1}, "spec.training.beta1", "less than 1", ""),
    ({"spec.deepspeed.zeroStage": 4}, "spec.deepspeed.zeroStage", "'auto', 0, 1, 2 or 3", ""),
    ({"spec.deepspeed.zeroStage": True}, "spec.deepspeed.zeroStage", "auto, 0, 1, 2 or 3", ""),
    ({"spec.deepspeed.config": {f"k{n}": 1 for n in range(65)}}, "spec.deepspeed.config", "at most 64 entries", ""),
    ({"spec.limits.activeDeadline": "12 hours"}, "spec.limits.activeDeadline", "a duration such as", ""),
    ({"spec.limits.activeDeadline": "h1"}, "spec.limits.activeDeadline", "a duration such as", ""),
    ({"spec.evaluation.prompts": [{"prompt": "x" * 8193}]}, "spec.evaluation.prompts[0].prompt", "8192", ""),
    (
        {"spec.evaluation.prompts": [{"prompt": "x", "topic": "a\nb"}]},
        "spec.evaluation.prompts[0].topic",
        "one line",
        "",
    ),
    ({"spec.podTemplate": {}}, "spec.podTemplate", "not a known field", "known fields here: runtimeRef"),
]


def problems_of(*documents: dict[str, Any]) -> list[Problem]:
    report = check_text(yaml.safe_dump_all(documents, sort_keys=False), "job.yaml")
    return [*report.problems, *(problem for document in report.documents for problem in document.problems)]


@pytest.mark.parametrize(("changes", "field", "words", "hint"), WRONG_FIELDS, ids=lambda value: str(value)[:60])
def test_a_wrong_field_is_named_with_what_to_do(changes: dict[str, Any], field: str, words: str, hint: str) -> None:
    (problem,) = problems_of(changed(api_cases.JOB, changes))
    assert problem.field == field
    assert words in problem.message
    assert hint in problem.hint


@pytest.mark.parametrize("case", BROKEN_JOBS, ids=lambda case: str(case.changes)[:70])
def test_a_job_whose_fields_contradict_is_refused(case: Broken) -> None:
    found = problems_of(changed(api_cases.JOB, case.changes))
    assert (case.field, True) in {(problem.field, case.words in problem.message) for problem in found}
    assert all(problem.hint for problem in found)


@pytest.mark.parametrize("case", BROKEN_RUNTIMES, ids=lambda case: case.field)
def test_a_runtime_whose_fields_contradict_is_refused(case: Broken) -> None:
    (problem,) = problems_of(changed(api_cases.RUNTIME, case.changes))
    assert problem.field == case.field
    assert case.words in problem.message


@pytest.mark.parametrize("changes", VALID_JOBS, ids=str)
def test_a_job_at_the_edge_of_the_rules_is_valid(changes: dict[str, Any]) -> None:
    assert problems_of(changed(api_cases.JOB, changes)) == []


@pytest.mark.parametrize("changes", VALID_RUNTIMES, ids=str)
def test_a_runtime_at_the_edge_of_the_rules_is_valid(changes: dict[str, Any]) -> None:
    assert problems_of(changed(api_cases.RUNTIME, changes)) == []


def test_all_errors_of_all_documents_come_at_once_in_the_order_of_lines() -> None:
    text = """\
apiVersion: finetune.dev/v1alpha1
kind: FinetuneJob
metadata: {name: a}
spec:
  model: {source: http://host/x}
  data: {train: [{uri: ../rows.jsonl}], sequenceLength: long}
  output:
  workers: {count: 2, min: 4}
  workers: {count: 3}
---
kind: Pod
---
- a list
"""
    errors = check_text(text, "job.yaml").errors()
    assert [(error.where, error.what.split(":")[0]) for error in errors] == [
        ("job.yaml:5", "spec.model.source"),
        ("job.yaml:6", "spec.data.train[0].uri"),
        ("job.yaml:6", "spec.data.sequenceLength"),
        ("job.yaml:7", "spec.output"),
        ("job.yaml:8", "spec.workers.min"),
        ("job.yaml:9", "spec.workers"),
        ("job.yaml:11", "kind"),
        ("job.yaml:13", "a document is a mapping with apiVersion, kind, metadata and spec (got a list of 1)"),
    ]
    assert "(got 4)" in errors[4].what


def test_a_rule_is_not_judged_on_a_field_that_is_wrong_itself() -> None:
    (problem,) = problems_of(changed(api_cases.JOB, {"spec.workers.count": "two", "spec.workers.min": 3}))
    assert problem.field == "spec.workers.count"


def test_null_is_as_good_as_absent_like_in_the_api_server() -> None:
    text = yaml.safe_dump(api_cases.JOB) + "  training:\n  runtimeRef: null\n"
    assert check_text(text, "job.yaml").errors() == []


@pytest.mark.parametrize("uri", ["s3://AKIA:hunter2@bucket/x", "http://me:hunter2@host", "s3://b/x?secret_key=hunter2"])
def test_credentials_in_an_address_are_never_shown(uri: str) -> None:
    found = problems_of(changed(api_cases.JOB, {"spec.output.uri": uri, "spec.nope": uri, "metadata.name": uri}))
    assert found
    assert "hunter2" not in "".join(problem.what + problem.hint for problem in found)


def test_control_characters_are_never_shown() -> None:
    text = json.dumps(changed(api_cases.JOB, {"metadata.name": "\x1b[31m", "spec.\x1b[2J": 1, "kind": "FinetuneJob"}))
    errors = check_text(text, "job.yaml").errors()
    assert len(errors) == 2
    assert "\x1b" not in "".join(map(str, errors))


def test_two_jobs_of_one_name_in_a_file_are_an_error_and_two_kinds_are_not() -> None:
    twice = problems_of(api_cases.JOB, api_cases.JOB)
    assert [problem.field for problem in twice] == ["metadata.name"]
    assert problems_of(api_cases.JOB, changed(api_cases.RUNTIME, {"metadata.name": "support-chat"})) == []


def test_paths_that_a_cluster_cannot_see_are_noted_and_not_refused() -> None:
    job = changed(api_cases.JOB, {"spec.data.train[0].uri": "rows/train.jsonl", "spec.output.uri": "out"})
    (document,) = check_text(yaml.safe_dump(job), "job.yaml").documents
    assert document.problems == []
    assert document.local_only == ["spec.data.train[0].uri", "spec.output.uri"]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "empty"),
        (b"# only a comment\n---\n", "empty"),
        (b"a: \xff\n", "not UTF-8: byte 3 on line 1"),
        (b"a" * (1 << 20) + b"a", "larger than 1 MiB"),
        ("a: 1".encode("utf-16"), "not UTF-8"),
    ],
)
def test_a_file_that_is_no_job_file_says_why(tmp_path: Path, data: bytes, words: str) -> None:
    (tmp_path / "job.yaml").write_bytes(data)
    (error,) = check_file(tmp_path / "job.yaml").errors()
    assert words in error.what


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path: Path) -> None:
    text = yaml.safe_dump(api_cases.JOB).replace("\n", "\r\n")
    (tmp_path / "job.yaml").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert check_file(tmp_path / "job.yaml").errors() == []


def test_load_job_returns_the_job_or_raises_all_that_is_wrong(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump_all([api_cases.RUNTIME, api_cases.JOB]))
    assert load_job(file).metadata.name == "support-chat"
    file.write_text(yaml.safe_dump(changed(api_cases.JOB, {"spec.suspend": 1, "spec.output.uri": "a b"})))
    with pytest.raises(SpecError, match=r"(?s)spec\.output\.uri.*spec\.suspend"):
        load_job(file)
    file.write_text(yaml.safe_dump(api_cases.RUNTIME))
    with pytest.raises(SpecError, match="one FinetuneJob is needed, and there are 0"):
        load_job(file)
    with pytest.raises(SpecError, match="cannot be read"):
        load_job(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize("file", sorted((ROOT / "manifests/samples").glob("*.yaml")), ids=lambda file: file.name)
def test_the_samples_are_valid(file: Path) -> None:
    assert check_file(file).errors() == []


@pytest.mark.parametrize("changes", VALID_JOBS, ids=str)
def test_a_job_written_out_with_its_defaults_reads_back_as_the_same(changes: dict[str, Any]) -> None:
    job = FinetuneJob.model_validate(changed(api_cases.JOB, changes))
    (document,) = check_text(yaml.safe_dump(job.model_dump(mode="json", exclude_none=True)), "job.yaml").documents
    assert document.problems == []
    assert document.resource == job


def test_a_runtime_written_out_with_its_defaults_reads_back_as_the_same() -> None:
    runtime = FinetuneRuntime.model_validate(api_cases.RUNTIME)
    (document,) = check_text(yaml.safe_dump(runtime.model_dump(mode="json", exclude_none=True)), "r.yaml").documents
    assert document.resource == runtime


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
_FIELDS = st.sampled_from(
    [
        "spec",
        "metadata",
        "spec.data",
        "spec.data.train",
        "spec.data.train[0]",
        "spec.deepspeed.config",
        "spec.training",
        "spec.workers.count",
        "spec.evaluation.gates",
        "spec.evaluation.prompts",
        "spec.model.source",
        "status",
        "kind",
    ]
)


@given(field=_FIELDS, value=_VALUES)
@settings(max_examples=200, deadline=None)
def test_nothing_that_stands_in_a_field_makes_validation_raise(field: str, value: object) -> None:
    report = check_text(json.dumps(changed(api_cases.JOB, {field: value})), "job.yaml")
    assert all(error.what for error in report.errors())


@given(st.text(st.characters(codec="utf-8"), max_size=80))
@settings(max_examples=150, deadline=None)
def test_no_text_makes_validation_raise(text: str) -> None:
    assert check_text(text, "job.yaml").errors()
