"""What a person sees while a run goes on."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from finetune_trainer.progress import Display, TrainingStatus, clock, count

START = {
    "event": "start",
    "worldSize": 2,
    "device": "cpu",
    "totalSteps": 120,
    "parameters": 134_515_008,
    "trainableParameters": 4_884_480,
    "resumedFromStep": 0,
}
STEP = {"event": "step", "step": 20, "loss": 1.5, "tokensPerSecond": 1234.5, "seconds": 2.0, "mfu": None}


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (42.4, "0:42"), (725, "12:05"), (11_229, "3:07:09")])
def test_a_duration_reads_like_a_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


@pytest.mark.parametrize(("number", "text"), [(950, "950"), (4_884_480, "4.88 M"), (7e9, "7 B"), (12_300, "12.3 k")])
def test_a_count_has_three_figures(number: float, text: str) -> None:
    assert count(number) == text


def test_a_step_says_loss_speed_and_time_left() -> None:
    status = TrainingStatus()
    status.update(START)
    assert status.update(STEP) == "step 20/120  loss 1.5000  1,234 tokens/s  ETA 3:20"


def test_a_step_of_preferences_says_their_margin_too() -> None:
    status = TrainingStatus()
    status.update(START)
    assert "  loss 1.5000  margin 0.250  " in status.update(STEP | {"pairs": 4, "rewardMargin": 0.25})
    evaluation = {"event": "evaluation", "step": 20, "loss": 0.5, "pairs": 9, "likelihoodAccuracy": 2 / 3}
    assert status.update(evaluation) == "step 20/120  evaluation loss 0.5000  chosen likelier 67%"
    references = {"event": "references", "done": 3, "total": 9, "seconds": 1.0}
    assert status.update(references) == "base model's view of the pairs: 3 of 9 sequences"


def test_mfu_is_shown_where_the_peak_is_known() -> None:
    status = TrainingStatus()
    status.update(START)
    assert "MFU 41.2%" in status.update({**STEP, "mfu": 0.412})


def test_a_resumed_run_says_from_which_step() -> None:
    assert TrainingStatus().update({**START, "resumedFromStep": 60}).endswith("from step 60")


def test_without_a_terminal_there_are_plain_lines_and_no_control_codes() -> None:
    out = io.StringIO()
    with Display(Console(file=out)).stage("train") as stage:
        stage.update("step 1/2  loss [1.0]", 1, 2, now=True)
        stage.update("never shown: the last line is younger than ten seconds", 2, 2)
        stage.summary = "2 steps"
    assert out.getvalue() == "train      50%  step 1/2  loss [1.0]\n✓ train     2 steps  0:00\n"


def test_a_stage_that_fails_does_not_say_it_is_done() -> None:
    out = io.StringIO()
    with pytest.raises(ValueError, match="broken"), Display(Console(file=out)).stage("prepare"):
        raise ValueError("broken")
    assert out.getvalue() == ""


def test_a_warning_stays_on_the_screen() -> None:
    out = io.StringIO()
    with Display(Console(file=out)).stage("train") as stage:
        stage.note("step-00000040 is damaged: going on from the checkpoint before it")
    assert "step-00000040 is damaged" in out.getvalue()
