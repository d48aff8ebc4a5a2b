from __future__ import annotations

import re

from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_api.patterns import JOB_NAME
from finetune_operator.children.labels import labels
from finetune_operator.children.names import (
    attempt_of,
    network_policy_name,
    prepare_name,
    ray_job_name,
    result_name,
    run_config_name,
)

NAMES = st.from_regex(re.compile(JOB_NAME, re.ASCII), fullmatch=True).filter(lambda name: len(name) <= 63)


def all_names(job: str, attempt: int) -> list[str]:
    return [
        run_config_name(job, "prepare"),
        run_config_name(job, f"a{attempt}"),
        prepare_name(job),
        ray_job_name(job, attempt),
        result_name(job),
        network_policy_name(job),
    ]


@settings(deadline=None)
@given(NAMES, st.integers(1, 11_000))
def test_a_name_is_a_label_that_kuberay_takes(job: str, attempt: int) -> None:
    for name in all_names(job, attempt):
        assert len(name) <= 47
        assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name)


@settings(deadline=None)
@given(NAMES, NAMES, st.integers(1, 11_000), st.integers(1, 11_000))
def test_two_jobs_never_share_a_child(one: str, other: str, attempt: int, another: int) -> None:
    same = one == other
    assert (prepare_name(one) == prepare_name(other)) == same
    assert (result_name(one) == result_name(other)) == same
    assert (network_policy_name(one) == network_policy_name(other)) == same
    assert (ray_job_name(one, attempt) == ray_job_name(other, another)) == (same and attempt == another)


def test_long_names_that_begin_alike_stay_apart() -> None:
    one, other = "a" * 46 + "b", "a" * 46 + "c"
    assert len({*all_names(one, 1), *all_names(other, 1)}) == 2 * len(set(all_names(one, 1)))


def test_a_short_name_is_kept_as_it_is() -> None:
    assert ray_job_name("support-chat", 3) == "support-chat-a3"
    assert prepare_name("support-chat") == "support-chat-prepare"
    assert network_policy_name("support-chat") == "support-chat"


def test_the_attempt_is_read_back_from_labels() -> None:
    assert attempt_of(labels("job", "train", 12)) == 12
    assert attempt_of(labels("job", "prepare")) is None
    assert attempt_of({"finetune.dev/attempt": "²"}) is None
