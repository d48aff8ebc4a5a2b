from __future__ import annotations

from pathlib import Path

from finetune_trainer.reporter import MetricsFile, read_metrics


def test_events_are_read_as_they_were_written(tmp_path: Path) -> None:
    with MetricsFile(tmp_path / "metrics.jsonl") as metrics:
        metrics.event({"event": "step", "step": 1, "mfu": None})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"event": "step", "step": 1, "mfu": None}]


def test_a_line_that_a_killed_run_left_half_written_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event":"step","step":1}\n{"event":"st')
    with MetricsFile(path) as metrics:
        metrics.event({"event": "step", "step": 2})
    assert [event["step"] for event in read_metrics(path)] == [1, 2]


def test_no_file_means_no_events(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == []
