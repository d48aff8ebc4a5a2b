"""The report says what happened, also when it is bad, and never lets a model's words act."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from finetune_api.errors import TrainingError
from finetune_api.job_evaluation import Gate, Prompt
from finetune_api.result import EvaluationResult, PromptResult, Verdict
from finetune_api.status import EgressResult
from finetune_trainer import figures
from finetune_trainer.model_card import model_card
from finetune_trainer.report import summary, write_report
from finetune_trainer.report.curves import Curve, curves
from finetune_trainer.verdict import gate_sentence, measure, verdict
from tests.results import answered, events, prompt_results, result

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)> & [link](http://example.com) `code` | cell"


def losses(base: float, tuned: float) -> EvaluationResult:
    return EvaluationResult(
        loss_base=base, loss_tuned=tuned, perplexity_base=math.exp(base), perplexity_tuned=math.exp(tuned), tokens=10
    )


def asked(base: str, tuned: str) -> PromptResult:
    return answered(Prompt(prompt="Who?", expect=["Sharon"]), base, tuned)


@pytest.mark.parametrize(
    ("evaluation", "prompts", "state", "sentence"),
    [
        (losses(3, 2), [asked("?", "Sharon")], "good", "All 1 prompt behaves as asked (base model: 0)."),
        (losses(3, 2), [asked("?", "Sharon"), asked("?", "no")], "mixed", "1 of 2 prompts behave as asked"),
        (losses(3, 2), [asked("Sharon", "no")], "bad", "A prompt that the base model answered as asked got worse."),
        (losses(2, 3), [asked("?", "Sharon")], "bad", "Evaluation loss did not fall: 2.000 → 3.000."),
        (losses(3, 2), [], "good", "Evaluation loss fell: 3.000 → 2.000."),
        (None, [], "mixed", "Nothing says whether it got better"),
    ],
)
def test_the_verdict_is_as_honest_about_bad_runs_as_about_good_ones(
    evaluation: EvaluationResult | None, prompts: list[PromptResult], state: str, sentence: str
) -> None:
    found = verdict(evaluation, prompts, [])
    assert found.state == state
    assert sentence in found.sentence


def test_a_missed_gate_comes_first_in_the_verdict() -> None:
    gates = measure([Gate(metric="promptsPassed", min=0.9)], None, [asked("?", "Sharon"), asked("?", "no")])
    found = verdict(None, [asked("?", "Sharon"), asked("?", "no")], gates)
    assert found.state == "rejected"
    assert found.sentence.startswith("Rejected: the share of prompts that behave as asked is 0.5, at least 0.9")


@pytest.mark.parametrize(
    ("gate", "value", "passed"),
    [
        (Gate(metric="evalLoss", max=2.0), 2.0, True),
        (Gate(metric="evalLoss", max=1.9), 2.0, False),
        (Gate(metric="evalLossRatio", max=0.5), 0.5, True),
        (Gate(metric="promptsPassed", min=0.6), 0.5, False),
        (Gate(metric="refusalRate", min=0.0), None, False),
    ],
)
def test_gates_hold_measured_figures_against_their_bounds(gate: Gate, value: float | None, passed: bool) -> None:
    [found] = measure([gate], losses(4, 2), [asked("?", "Sharon"), asked("?", "no")])
    assert (found.value, found.passed) == (value, passed)


def test_a_figure_that_was_not_measured_is_said_to_be_missing() -> None:
    [found] = measure([Gate(metric="evalLoss", max=1)], None, [])
    assert gate_sentence(found) == "the evaluation loss was not measured, at most 1 was asked"


def test_a_step_that_was_done_again_counts_once_in_losses_and_twice_in_time() -> None:
    before, again = events(10), events(10)
    resumed = [*before[:8], again[0] | {"resumedFromStep": 4}, *again[5:]]
    assert figures.training_result(resumed).tokens == figures.training_result(before).tokens
    time = figures.stages(resumed, {"train": 100.0}, 1.0)["train"]
    assert time > figures.stages(before, {"train": 100.0}, 1.0)["train"]


def test_a_run_without_a_step_has_no_result() -> None:
    with pytest.raises(TrainingError, match="no step was finished"):
        figures.training_result(events(0))


def test_stages_add_up_to_the_time_that_was_measured() -> None:
    found = figures.stages(events(), {"prepare": 11.0, "train": 300.0}, 9.0)
    assert sum(found.values()) == pytest.approx(311.0)


def test_a_long_run_is_thinned_to_what_a_chart_can_show() -> None:
    long = Curve([float(i) for i in range(100_000)], [1.0] * 50_000 + [3.0] * 50_000).thinned()
    assert len(long.steps) <= 400
    assert sum(long.values) / len(long.values) == pytest.approx(2.0)


def test_only_series_long_enough_to_be_noisy_are_smoothed() -> None:
    drawn = curves(events(20)).loss
    assert drawn.smoothed() is None
    smooth = curves(events(120)).loss.smoothed()
    assert smooth is not None
    assert len(smooth.values) == 120


class Tags(HTMLParser):
    """Collects what a browser would act on."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.attributes: set[str] = set()
        self.addresses: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.addresses |= {value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action")}


def test_words_of_prompts_and_models_cannot_act_in_the_page(tmp_path: Path) -> None:
    hostile = answered(Prompt(prompt=HOSTILE, system=HOSTILE, topic="<b>topic", expect=["<i>"]), HOSTILE, HOSTILE)
    write_report(result(prompt_results(hostile)), events(), tmp_path)
    page = (tmp_path / "report.html").read_text()
    tags = Tags(page)
    assert not tags.names & {"script", "img", "iframe", "object"}
    assert not {name for name in tags.attributes if name.startswith("on")}
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page


def test_the_page_asks_nothing_of_the_network(tmp_path: Path) -> None:
    write_report(result(), events(), tmp_path)
    addresses = Tags((tmp_path / "report.html").read_text()).addresses
    assert all(address.startswith(("#", "data:")) for address in addresses)


def test_words_of_models_stay_on_their_line_in_markdown(tmp_path: Path) -> None:
    hostile = answered(Prompt(prompt="Say it"), "# Heading\n| a | b |", HOSTILE)
    write_report(result([hostile]), events(), tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "- base · \\# Heading \\| a \\| b \\| …" in text
    assert "<script>" not in text
    assert "[link](" not in text


def test_report_json_holds_the_same_figures_and_every_step(tmp_path: Path) -> None:
    expected = result()
    write_report(expected, events(), tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    series = report.pop("curves")
    assert report == expected.model_dump(mode="json")
    assert series["loss"]["steps"] == list(range(1, 121))
    assert series["evaluation_loss"]["values"][0] == report["evaluation"]["lossBase"]


def test_what_failed_stands_on_top_of_the_page_and_in_the_terminal(tmp_path: Path) -> None:
    write_report(result(), events(), tmp_path)
    page = (tmp_path / "report.html").read_text()
    failing = page.index("worse than before tuning")
    assert page.index("4 of 5 prompts behave as asked") < failing < page.index("Answers before and after")
    console = Console(width=200, record=True, file=(tmp_path / "terminal").open("w"))
    console.print(summary(result(), tmp_path / "report.html"))
    assert "not as asked       What is the capital of France?" in console.export_text()


def test_a_run_without_prompts_evaluation_or_gates_still_has_a_page(tmp_path: Path) -> None:
    bare = result([]).model_copy(
        update={"evaluation": None, "verdict": Verdict(state="mixed", sentence="Nothing says whether it got better.")}
    )
    write_report(bare, events(1, evaluations=()), tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "Answers before and after" not in page
    assert "Nothing says whether it got better." in page


def test_what_the_pods_reached_is_said_plainly_and_nothing_where_they_were_not_asked(tmp_path: Path) -> None:
    egress = [
        EgressResult(to="internet", address="1.1.1.1:443", reached=False),
        EgressResult(to="metadata", address="169.254.169.254:80", reached=True),
    ]
    write_report(result().model_copy(update={"egress": egress}), events(), tmp_path)
    page, text = (tmp_path / "report.html").read_text(), (tmp_path / "report.md").read_text()
    assert "Reached: the cloud&#39;s metadata address (169.254.169.254:80)." in page
    assert "<th>The internet</th>" in page
    assert "| the internet | 1.1.1.1:443 | not reached |" in text
    write_report(result(), events(), tmp_path)
    assert "could reach" not in (tmp_path / "report.html").read_text() + (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(("folder", "library"), [("adapter", "peft"), ("merged", "transformers")])
def test_the_model_card_opens_with_what_a_hub_reads(folder: str, library: str) -> None:
    front = yaml.safe_load(model_card(result(), folder).split("---\n")[1])
    assert front == {
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "base_model_revision": "12fd25f",
        "library_name": library,
        "pipeline_tag": "text-generation",
        "tags": ["finetune", "sft", "lora"],
    }
