"""What `kubectl finetune` shows of a job, in each state.

The views stand in golden/plugin.txt, 80 columns wide. After a change, write it anew with UPDATE_GOLDEN=1 and read the
difference.
"""

from __future__ import annotations

import io
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console, RenderableType

from finetune_api.status import Plan
from finetune_operator.plugin.live import exit_code
from finetune_operator.plugin.reading import read
from finetune_operator.plugin.result import result_json, result_view
from finetune_operator.plugin.tables import jobs_table
from finetune_operator.plugin.view import line, plan_view, status_view
from finetune_operator.plugin.words import money, short_count, span
from tests.unit import plugin_cases as cases
from tests.unit.plugin_cases import NOW, PREEMPTED, ago, job, training

GOLDEN = Path(__file__).with_name("golden") / "plugin.txt"
STORIES = {
    "training in its second attempt": cases.training(),
    "out of GPU memory": cases.failed(),
    "complete": cases.complete(),
    "a missed gate": cases.complete(missed=True),
    "no room": cases.queued(),
    "a spec that is not accepted": cases.invalid(),
    "suspended, and just told to go on": cases.suspended(),
    "nobody has looked at it": cases.job(),
}


@pytest.fixture(autouse=True)
def _utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Times of the end are shown as the wall's clock has them: here one in UTC."""
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def shown(view: RenderableType, width: int = 80, *, terminal: bool = False) -> str:
    """The view as a terminal of this width has it; without colours unless it is a `terminal`."""
    out = io.StringIO()
    Console(file=out, width=width, highlight=False, color_system="standard" if terminal else None).print(view)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def test_the_views_are_those_of_the_golden_file() -> None:
    parts = [f"── {story}\n\n{shown(status_view(read(found), NOW))}" for story, found in STORIES.items()]
    for story in ("complete", "a missed gate"):
        found = read(STORIES[story])
        assert found.status.result
        parts.append(f"── report: {story}\n\n{shown(result_view(found, found.status.result))}")
    parts.append(f"── plan\n\n{shown(plan_view(Plan.model_validate(cases.PLAN, by_alias=True)))}")
    text = "\n".join(parts)
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(text, encoding="utf-8")
    assert text == GOLDEN.read_text(encoding="utf-8")


@pytest.mark.parametrize("width", [40, 80, 120])
@pytest.mark.parametrize("story", STORIES)
def test_no_line_is_wider_than_the_terminal_and_nothing_is_cut(story: str, width: int) -> None:
    found = read(STORIES[story])
    text = shown(status_view(found, NOW), width)
    assert max(map(len, text.splitlines())) <= width
    for sentence in (found.status.message, *(failure.message for failure in found.status.failures)):
        assert "".join((sentence or "").split()) in "".join(text.split())


def test_a_live_view_of_many_failures_fits_on_a_small_screen() -> None:
    failures = [PREEMPTED | {"attempt": number} for number in range(1, 11)]
    found = read(training(failures=failures, attempt=11))
    text = shown(status_view(found, NOW, full=False))
    assert len(text.splitlines()) <= 35
    assert "7 earlier ones" in text
    assert "attempt 10" in text
    assert shown(status_view(found, NOW)).count("Preempted") == 10


def test_progress_of_which_nothing_was_heard_for_a_while_is_marked_as_old() -> None:
    def age(seconds: float) -> str:
        progress = training()["status"]["progress"] | {"updatedTime": ago(seconds)}
        return shown(status_view(read(training(progress=progress)), NOW), terminal=True)

    yellow = "\x1b[33m"
    assert f"{yellow}10s ago" not in age(10)
    assert f"{yellow}5m ago" in age(300)


def test_progress_of_the_attempt_before_says_so() -> None:
    progress = training()["status"]["progress"] | {"attempt": 1}
    assert "8s ago, by attempt 1" in shown(status_view(read(training(progress=progress)), NOW))


def test_an_end_on_another_day_has_its_day() -> None:
    progress = training()["status"]["progress"] | {"etaTime": ago(-86_400)}
    assert "ends in      1d  (Tue 24 Nov, 12:00)" in shown(status_view(read(training(progress=progress)), NOW))


def test_a_job_that_is_new_is_not_said_to_be_overlooked() -> None:
    found = read(job())
    assert "Does it run?" in shown(status_view(found, NOW))
    assert "Does it run?" not in shown(status_view(found, found.created + 5))


def test_a_job_that_is_being_deleted_says_so() -> None:
    found = training()
    found["metadata"]["deletionTimestamp"] = ago(1)
    assert "It is being deleted." in shown(status_view(read(found), NOW))
    assert "Deleting" in jobs_table([read(found)], NOW, namespaces=False, wide=False)


def test_clocks_that_disagree_show_no_negative_time() -> None:
    text = shown(status_view(read(training()), NOW - 86_400))
    assert "age 0s" in text
    assert "as of        0s ago" in text
    assert re.search(r"(?<!\w)-\d", text) is None


def test_a_status_of_a_newer_operator_is_shown_as_far_as_it_can_be_read() -> None:
    found = training()
    found["status"]["progress"]["gradNorm"] = 1.5
    found["status"]["failures"] = [PREEMPTED | {"reason": "CosmicRay"}]
    known = read(found)
    assert known.unread == ("failures",)
    text = shown(status_view(known, NOW))
    assert "step 1,200 of 4,000" in text
    assert "not shown: failures" in text


def test_words_of_others_cannot_drive_the_terminal() -> None:
    text = shown(status_view(read(training(message="bad\x1b[2J\x07 [red]words[/red]")), NOW))
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "[red]words[/red]" in text


def test_a_table_has_a_line_for_each_job_by_namespace_and_name() -> None:
    first, second = cases.training(), cases.queued()
    first["metadata"] |= {"name": "b", "namespace": "team-b"}
    second["metadata"] |= {"name": "a", "namespace": "team-c"}
    table = jobs_table([read(second), read(first)], NOW, namespaces=True, wide=False).splitlines()
    assert [row.split()[:3] for row in table] == [
        ["NAMESPACE", "NAME", "PHASE"],
        ["team-b", "b", "Training"],
        ["team-c", "a", "Queued"],
    ]
    assert "1200/4000   30" in table[1]
    assert "2h40m     41.20 USD   3h" in table[1]
    assert "Unschedulable" in table[2]
    assert table[0].index("COST") == table[1].index("41.20")


def test_a_wide_table_ends_with_the_sentence() -> None:
    row = jobs_table([read(cases.queued())], NOW, namespaces=False, wide=True).splitlines()[1]
    assert row.endswith(cases.queued()["status"]["message"])


def test_one_line_says_where_a_job_is() -> None:
    assert line(read(cases.training()), NOW) == (
        "Training  step 1,200/4,000 30 %  loss 1.8342  ends in 2h40m  cost 41.20 USD"
    )
    assert line(read(cases.queued()), NOW) == "Queued (Unschedulable)"


def test_the_result_for_programs_has_the_fields_of_the_status() -> None:
    found = read(cases.complete())
    assert found.status.result
    whole = result_json(found, found.status.result)
    assert whole["result"] == cases.complete()["status"]["result"]
    assert whole["cost"]["spent"] == 41.2


@pytest.mark.parametrize(
    ("reason", "code"),
    [("UserData", 3), ("Storage", 5), ("GateMissed", 8), ("OutOfGpuMemory", 6), ("DeadlineExceeded", 6)],
)
def test_who_waited_for_a_job_ends_as_it_did(reason: str, code: int) -> None:
    assert exit_code(read(cases.complete())) == 0
    assert exit_code(read(training(phase="Failed", reason=reason))) == code


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-5, "0s"),
        (59.9, "59s"),
        (60, "1m"),
        (270, "4m30s"),
        (1650, "27m"),
        (3600, "1h"),
        (9600, "2h40m"),
        (273_600, "3d4h"),
        (1_036_800, "12d"),
    ],
)
def test_a_span_has_at_most_two_units(seconds: float, text: str) -> None:
    assert span(seconds) == text


def test_sums_and_counts_are_short() -> None:
    assert money(1234.5, "EUR") == "1,234.50 EUR"
    assert [short_count(n) for n in (950, 4_880_000, 24.6e9)] == ["950", "4.88M", "24.6B"]
