"""A run's events as metrics and as the report that the operator reads."""

from __future__ import annotations

import json
from typing import Any

import pytest
import urllib3
from prometheus_client.parser import text_string_to_metric_families

from finetune_api.errors import FinetuneError
from finetune_api.stage import StageFailure
from finetune_api.status import Result
from finetune_operator.observe import read_report
from finetune_trainer.endpoints import served
from finetune_trainer.telemetry import Telemetry

START: dict[str, Any] = {
    "event": "start", "worldSize": 2, "device": "cpu", "totalSteps": 10, "resumedFromStep": None,
}  # fmt: skip


def step(number: int, **fields: Any) -> dict[str, Any]:
    return {
        "event": "step", "step": number, "epoch": number / 10, "loss": 2.0, "learningRate": 1e-4, "gradNorm": 1.5,
        "tokens": 1000, "targetTokens": 500.0, "seconds": 2.0, "tokensPerSecond": 500.0, "mfu": None,
        "parts": {"data": 0.1, "forward": 0.6, "backward": 1.0, "optimizer": 0.2}, "memoryBytes": 1 << 30, **fields,
    }  # fmt: skip


def trained(*events: dict[str, Any]) -> Telemetry:
    """Telemetry after these events, one a second."""
    telemetry = Telemetry("s3://work/run/", attempt=3, now=0.0)
    for second, event in enumerate(events, 1):
        telemetry.event(event, float(second))
    return telemetry


def samples(telemetry: Telemetry) -> dict[tuple[str, str], float]:
    """Values by sample name and part."""
    return {
        (sample.name, sample.labels.get("part", "")): sample.value
        for family in text_string_to_metric_families(telemetry.metrics().decode())
        for sample in family.samples
    }


def test_a_report_says_where_the_run_is_and_how_old_that_is() -> None:
    written = {"event": "checkpoint", "step": 2, "seconds": 0.5}
    complete = {"event": "checkpoint-complete", "step": 2, "seconds": 9.0, "bytes": 10, "waited": 0.0}
    report = trained(START, step(1), step(2), written, step(3), complete).report(8.0)
    assert (report.attempt, report.state, report.step, report.total_steps) == (3, "training", 3, 10)
    assert report.age == 2.0
    assert report.tokens == 3000
    assert report.eta == pytest.approx(14.0)
    assert report.checkpoint is not None
    assert report.checkpoint.uri == "s3://work/run/checkpoints/step-00000002"
    assert report.checkpoint.age == 2.0
    assert report.seconds.training == 6.0
    assert report.seconds.checkpoint == 0.5
    assert report.seconds.at_risk == 2.0, "the step after the checkpoint"


def test_tokens_of_an_earlier_attempt_are_not_guessed() -> None:
    assert trained(START | {"resumedFromStep": 4}, step(5)).report(3.0).tokens is None


def test_the_end_is_told_with_its_result_or_its_failure() -> None:
    result = Result(uri="s3://models/x")
    good = trained(START, step(10), {"event": "export", "step": 10})
    assert good.report(5.0).state == "finishing"
    good.finish(result, 9.0)
    report = good.report(20.0)
    assert (report.state, report.result, report.seconds.finish) == ("finished", result, 6.0)
    bad = trained(START)
    bad.fail(StageFailure(reason="Numerics", message="the loss of step 4 is not finite"), 9.0)
    assert bad.report(9.0).failure is not None
    assert trained(START, {"event": "end", "step": 4, "reason": "interrupted"}).report(9.0).state == "stopped"


def test_the_parts_of_a_step_add_up_to_it() -> None:
    found = samples(trained(START, step(1), step(2, seconds=3.0)))
    parts = [value for (name, _), value in found.items() if name == "finetune_train_step_seconds_sum"]
    assert len(parts) == 5
    assert sum(parts) == pytest.approx(5.0)


def test_metrics_follow_the_steps() -> None:
    found = samples(
        trained(START, step(1), step(2, loss=1.25), {"event": "evaluation", "step": 2, "loss": 1.5, "seconds": 0.2})
    )
    assert found["finetune_train_loss", ""] == 1.25
    assert found["finetune_eval_loss", ""] == 1.5
    assert found["finetune_train_step", ""] == 2
    assert found["finetune_train_tokens_total", ""] == 2000
    assert found["finetune_train_memory_bytes", ""] == 1 << 30


def test_metrics_of_preferences_are_margins_and_shares_of_pairs() -> None:
    figures = {"pairs": 4.0, "rewardMargin": 0.5, "rewardAccuracy": 0.75, "likelihoodAccuracy": 0.25}
    evaluation = {"event": "evaluation", "step": 1, "loss": 0.6, "seconds": 0.1} | figures | {"rewardMargin": 0.25}
    found = samples(trained(START, step(1) | figures, evaluation))
    assert found["finetune_train_reward_margin", ""] == 0.5
    assert found["finetune_train_reward_accuracy_ratio", ""] == 0.75
    assert found["finetune_eval_reward_margin", ""] == 0.25
    assert found["finetune_eval_reward_accuracy_ratio", ""] == 0.75
    assert found["finetune_eval_likelihood_accuracy_ratio", ""] == 0.25


def test_what_goes_wrong_is_counted() -> None:
    spike = {"event": "spike", "step": 2, "loss": 9.0, "expected": 2.0, "sequences": [4]}
    hang = {"event": "hang", "step": 2, "rank": 1, "node": "n"}
    retry = {"event": "retry", "attempt": 1, "reason": "rank 1 stood still"}
    found = samples(trained(START, step(1), spike, hang, retry, {"event": "warning", "message": "damaged"}))
    names = ("loss_spikes", "hangs", "restarts", "warnings")
    assert [found[f"finetune_train_{name}_total", ""] for name in names] == [1, 1, 1, 1]
    assert found["finetune_train_attempt", ""] == 3


def test_the_operator_understands_what_is_served() -> None:
    telemetry = trained(START, step(1))
    with served(telemetry, 0) as port:
        answer = urllib3.request("GET", f"http://127.0.0.1:{port}/progress")
        report = read_report(answer.data)
        metrics = urllib3.request("GET", f"http://127.0.0.1:{port}/metrics")
        other = urllib3.request("GET", f"http://127.0.0.1:{port}/")
    assert report is not None
    assert report.step == 1
    assert json.loads(answer.data)["totalSteps"] == 10
    assert b"finetune_train_loss" in metrics.data
    assert other.status == 404


def test_a_taken_port_is_an_error_that_says_so() -> None:
    telemetry = trained(START)
    with (
        served(telemetry, 0) as port,
        pytest.raises(FinetuneError, match="cannot be listened on"),
        served(telemetry, port),
    ):
        pass
