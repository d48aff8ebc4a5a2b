"""Every job of the hostile corpus is refused with the field's path, or served by a running operator."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

import pytest

from finetune_api.base import API_VERSION
from finetune_api.checks import check_document
from finetune_api.documents import MAX_DEPTH, Document, Mark
from finetune_api.files import check_text
from finetune_operator.nesting import depth_of
from tests.api.cluster import Cluster
from tests.api.hostile import Case, corpus
from tests.api.jobs import JOB_KIND, RUNTIME_KIND
from tests.api.objects import Api, Object, Refused, eventually, fresh_namespace
from tests.api.operator import operator

# Texts that the API server cannot read as an object, or not store: it has no field to name.
UNREADABLE = (
    "the object provided is unrecognized",  # not JSON, not YAML, or nested more than 10,000 deep
    "json: cannot unmarshal number",  # a number too large
    "parsing time",
    "request is too large",  # 1.5 MiB, etcd's bound
    "larger than max",  # 2 MiB, that of etcd's client
    "Request entity too large",  # 3 MiB, the API server's
    "does not match the namespace sent",
    "resourceVersion should not be set",
    "cannot be handled as a FinetuneJob: strict decoding error",  # it names the field in its own way
    "does not match the expected API version",
    "no kind is registered",
)
RUNTIME: Final[Object] = {  # the one that the corpus names
    "apiVersion": API_VERSION,
    "kind": "FinetuneRuntime",
    "metadata": {"name": "h200"},
    "spec": {"images": {"trainer": "registry.example.com/trainer:1"}, "accelerator": {"pricePerHour": 2}},
}
FIELD = re.compile(r"\b(spec|metadata|status)([.\[][^ :]+)*: (Invalid|Unsupported|Required|Too|Forbidden|Duplicate)")


class Outcome(NamedTuple):
    """What the API server did with a case: `stored` has no object if that is too deep to be read here."""

    case: Case
    name: str = ""
    refused: Refused | None = None
    stored: Object | None = None


@pytest.fixture(scope="module")
def hostile_namespace(api: Api) -> Iterator[str]:
    """Where the corpus goes."""
    with fresh_namespace(api) as namespace:
        yield namespace


@pytest.fixture(scope="module")
def outcomes(api: Api, hostile_namespace: str) -> list[Outcome]:
    """The whole corpus, sent once."""
    return [_send(api, hostile_namespace, case) for case in corpus()]


def _send(api: Api, namespace: str, case: Case) -> Outcome:
    try:
        name = case.send(api, namespace)
    except Refused as refused:
        return Outcome(case, refused=refused)
    return Outcome(case, name, stored=None if case.deep else api.get(JOB_KIND, name, namespace))


def test_a_refusal_names_the_field(outcomes: list[Outcome]) -> None:
    refusals = [(outcome.case, outcome.refused) for outcome in outcomes if outcome.refused]
    assert len(refusals) > 1000
    for case, refused in refusals:
        told = case.field in refused.message if case.field.startswith("spec") else FIELD.search(refused.message)
        # A rule between fields may be shown on the other one.
        told = told or FIELD.search(refused.message) or any(words in refused.message for words in UNREADABLE)
        assert told, f"{case.name}: {refused}"


def test_the_operator_can_name_what_is_wrong_with_a_job_that_was_stored(outcomes: list[Outcome]) -> None:
    stored = [(outcome.case, outcome.stored) for outcome in outcomes if outcome.stored]
    assert len(stored) > 300
    wrong: dict[str, str] = {}
    for case, job in stored:
        checked = check_document(Document(Mark(1, 1), job))
        assert checked.local_only == [], case.name
        assert all(problem.field.startswith("spec.") and problem.message for problem in checked.problems), case.name
        wrong |= {problem.field: case.name for problem in checked.problems}
    # The API server compares whole numbers with bounds whose fraction it cuts off.
    wrong.pop("spec.data.nearDuplicateThreshold")
    assert [field for field in wrong if not field.startswith("spec.deepspeed.config.")] == []


def test_what_validate_accepts_is_accepted(outcomes: list[Outcome]) -> None:
    for case, _, refused, _ in outcomes:
        if refused is None or case.field.startswith("metadata.") or any(w in refused.message for w in UNREADABLE):
            continue
        report = check_text(case.text, case.name)
        local_only = [field for document in report.documents for field in document.local_only]
        assert report.errors() or local_only, f"{case.name}: {refused}"


def test_the_operator_serves_what_was_stored_or_says_what_is_wrong_with_it(
    api: Api, api_cluster: Cluster, hostile_namespace: str, outcomes: list[Outcome], tmp_path: Path
) -> None:
    names = {outcome.name for outcome in outcomes if outcome.name}
    wrong = {
        outcome.name for outcome in outcomes if outcome.name and (outcome.stored is None or _is_wrong(outcome.stored))
    }
    api.create(RUNTIME)
    try:
        with operator(api_cluster, tmp_path, hostile_namespace) as op:
            eventually(
                lambda: {name for name, phase, _ in _rows(api, hostile_namespace) if phase} >= names,
                f"a status of each of the {len(names)} jobs",
                120,
                lambda: op.log_text[-4000:],
            )
            rows = {name: (phase, reason) for name, phase, reason in _rows(api, hostile_namespace)}
            assert {name for name in names if rows[name] == ("Pending", "InvalidSpec")} == wrong
            assert op.tracebacks() == []
            assert op.poll() is None
    finally:
        api.delete(RUNTIME_KIND, RUNTIME["metadata"]["name"])


def _is_wrong(job: Object) -> bool:
    return depth_of(job["spec"]) >= MAX_DEPTH or bool(check_document(Document(Mark(1, 1), job)).problems)


def _rows(api: Api, namespace: str) -> list[tuple[str, str | None, str | None]]:
    """Name, phase and reason of each job, as the API server prints them: some are too deep to be read whole."""
    path = f"/apis/{API_VERSION}/namespaces/{namespace}/finetunejobs?includeObject=None"
    table = api.request("GET", path, accept="application/json;as=Table;g=meta.k8s.io;v=v1")
    return [(row["cells"][0], row["cells"][1], row["cells"][2]) for row in table["rows"]]
