"""Every job of the hostile corpus is refused with the field's path, or stored so that the operator can say what it is.

That the running operator survives what is stored is another test's business.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from finetune_api.base import API_VERSION
from finetune_api.checks import check_document
from finetune_api.documents import Document, Mark
from finetune_api.files import check_text
from tests.api.hostile import Case, corpus
from tests.api.objects import Api, Object, Refused, fresh_namespace

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
FIELD = re.compile(r"\b(spec|metadata|status)([.\[][^ :]+)*: (Invalid|Unsupported|Required|Too|Forbidden|Duplicate)")


class Outcome(NamedTuple):
    """What the API server did with a case: `stored` has no object if that is too deep to be read here."""

    case: Case
    refused: Refused | None = None
    stored: Object | None = None


@pytest.fixture(scope="module")
def outcomes(api: Api) -> Iterator[list[Outcome]]:
    """The whole corpus, sent once."""
    with fresh_namespace(api) as namespace:
        yield [_send(api, namespace, case) for case in corpus()]


def _send(api: Api, namespace: str, case: Case) -> Outcome:
    try:
        name = case.send(api, namespace)
    except Refused as refused:
        return Outcome(case, refused)
    return Outcome(case, None, None if case.deep else api.get(f"{API_VERSION}/FinetuneJob", name, namespace))


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
    for case, refused, _ in outcomes:
        if refused is None or case.field.startswith("metadata.") or any(w in refused.message for w in UNREADABLE):
            continue
        report = check_text(case.text, case.name)
        local_only = [field for document in report.documents for field in document.local_only]
        assert report.errors() or local_only, f"{case.name}: {refused}"
