"""The operator's command line, its logs, addresses and metrics."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from dataclasses import fields
from itertools import pairwise
from typing import Any

import click
import pytest
import structlog

from finetune_api.errors import FinetuneError
from finetune_operator import logs
from finetune_operator.command import operator
from finetune_operator.health import parse_address
from finetune_operator.metrics import JobCollector, Metrics, summarize
from finetune_operator.settings import Settings


def parsed(*arguments: str) -> dict[str, Any]:
    return operator.make_context("operator", list(arguments)).params


def test_the_flags_defaults_are_the_settings_own() -> None:
    assert settings_of(parsed()) == Settings()


def settings_of(values: dict[str, Any]) -> Settings:
    known = {field.name: values[field.name] for field in fields(Settings)}
    return Settings(**known | {"operator_namespace": Settings.operator_namespace})


def test_names_are_written_with_commas() -> None:
    assert parsed("--namespaces", "team-a, team-b,")["namespaces"] == ("team-a", "team-b")


def test_every_flag_is_an_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_OPERATOR_LEASE_DURATION", "1m30s")
    monkeypatch.setenv("FINETUNE_OPERATOR_LEADER_ELECT", "false")
    values = parsed()
    assert values["lease_duration"] == 90
    assert values["leader_elect"] is False
    assert parsed("--lease-duration", "2m")["lease_duration"] == 120, "a flag wins"


def test_a_malformed_duration_is_refused_with_an_example() -> None:
    with pytest.raises(click.BadParameter, match="90s"):
        parsed("--stop-grace", "5 minutes")


@pytest.mark.parametrize(
    ("text", "address"),
    [(":8080", (None, 8080)), ("127.0.0.1:0", ("127.0.0.1", 0)), ("[::1]:9", ("::1", 9))],
)
def test_addresses_are_read(text: str, address: tuple[str | None, int]) -> None:
    assert parse_address(text) == address


@pytest.mark.parametrize("text", ["", "8080", "host:", "host:http", ":70000"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(FinetuneError, match="no address"):
        parse_address(text)


@pytest.fixture
def own_logging() -> Iterator[None]:
    """Logging that may be set up, and is as before afterwards."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_a_log_line_names_the_job(log_format: str, own_logging: None, capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up(log_format, "info")
    with structlog.contextvars.bound_contextvars(job="team/chat", attempt=2):
        log = structlog.get_logger()
        log.info("refused", reason="Forbidden")
        log.debug("not shown")
        secret = "a tenant's row"
        try:
            raise ValueError(f"{len(secret)}")
        except ValueError:
            log.exception("reconcile failed")
    text = capsys.readouterr().err
    assert "not shown" not in text
    assert "ValueError: 14" in text
    assert secret not in text, "a traceback shows no variables"
    if log_format == "json":
        first = json.loads(text.splitlines()[0])
        assert list(first)[:3] == ["time", "level", "event"]
        assert first["job"] == "team/chat"
        assert first["attempt"] == 2
        assert len(text.splitlines()) == 2
    else:
        assert "job=team/chat" in text


def job(max_cost: float = 50, **status: Any) -> dict[str, Any]:
    spec = {
        "runtimeRef": {"name": "h200"},
        "method": {"objective": "sft", "tuning": "lora"},
        "workers": {"count": 2, "gpusEach": 8},
        "limits": {"maxCost": max_cost},
    }
    return {"metadata": {"name": "chat", "namespace": "team", "uid": "u"}, "spec": spec, "status": status}


def test_jobs_are_exported_as_the_store_has_them() -> None:
    metrics = Metrics()
    running = job(
        phase="Training",
        cost={"spent": 12.5, "currency": "EUR"},
        goodput={"trainingSeconds": 90, "lostSeconds": {"startup": 10, "preemption": 0}},
        progress={"updatedTime": "2026-01-02T03:04:05Z"},
        checkpoint={"time": "2026-01-02T03:00:00Z"},
    )
    jobs = [(("team", "chat"), summarize(running)), (("team", "new"), summarize(job(max_cost=20)))]
    metrics.registry.register(JobCollector(lambda: jobs, lambda: {"h200": 40, "another": 1}))
    text = metrics.text().decode()
    assert 'finetune_jobs{namespace="team",phase="Training"} 1.0' in text
    assert 'finetune_jobs{namespace="team",phase="Pending"} 1.0' in text
    assert 'finetune_job_cost{currency="EUR",name="chat",namespace="team"} 12.5' in text
    assert text.count("finetune_job_info{") == 2
    assert 'finetune_job_gpus{name="chat",namespace="team"} 16.0' in text
    assert 'finetune_job_cost_limit{name="chat",namespace="team"} 40.0' in text, "the runtime's is lower"
    assert 'finetune_job_cost_limit{name="new",namespace="team"} 20.0' in text
    assert 'finetune_job_training_seconds{name="chat",namespace="team"} 90.0' in text
    assert 'finetune_job_lost_seconds{cause="startup",name="chat",namespace="team"} 10.0' in text
    assert 'finetune_job_progress_timestamp_seconds{name="chat",namespace="team"} 1.767323045e+09' in text
    assert 'finetune_job_checkpoint_timestamp_seconds{name="chat",namespace="team"} 1.7673228e+09' in text


def test_a_failure_is_counted_once_when_the_status_gains_it() -> None:
    metrics = Metrics()
    first = {"attempt": 1, "reason": "Preempted", "message": "", "retryable": True}
    second = {"attempt": 2, "reason": "Hang", "message": "", "retryable": True}
    states = [None, job(), job(failures=[first]), job(failures=[first, second]), job(failures=[second]), None]
    summaries = [summarize(state) if state else None for state in states]
    for before, after in pairwise(summaries):
        metrics.count_failures(before, after)
    text = metrics.text().decode()
    assert 'finetune_job_failures_total{reason="Preempted"} 1.0' in text
    assert 'finetune_job_failures_total{reason="Hang"} 1.0' in text
    assert 'finetune_job_failures_total{reason="Numerics"} 0.0' in text, "a first one must be an increase"


def test_metrics_are_named_as_prometheus_wants_it() -> None:
    metrics = Metrics()
    metrics.registry.register(JobCollector(list, dict))
    for family in metrics.registry.collect():
        assert re.fullmatch(r"finetune_[a-z_]+", family.name)
        assert family.documentation.endswith(".")
        assert not family.name.endswith(("_total", "_count", "_sum", "_bucket", "_ms", "_created")), family.name
        if family.type == "histogram":
            assert family.name.endswith("_seconds")
    assert "_created" not in metrics.text().decode()
