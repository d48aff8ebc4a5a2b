"""`finetune operator`: the controller, with every setting as a flag and as an environment variable."""

from __future__ import annotations

import asyncio
import os
import signal
from importlib import metadata
from pathlib import Path
from typing import Any, Final, NoReturn

import click
import structlog

from finetune_api.base import parse_duration
from finetune_operator import logs
from finetune_operator.client import Client
from finetune_operator.clock import ServerClock
from finetune_operator.controller import Controller, ReconcilerFactory
from finetune_operator.election import Election, LeadershipLost
from finetune_operator.settings import Settings

PREFIX: Final = "FINETUNE_OPERATOR"
_POD_NAMESPACE: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")

_log = structlog.get_logger(__name__)


class DurationType(click.ParamType[float]):
    """Seconds from a duration such as 90s or 1h30m."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            return float(value if isinstance(value, int | float) else parse_duration(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


class NamesType(click.ParamType[tuple[str, ...]]):
    """Names from a list with commas."""

    name = "names"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        return value if isinstance(value, tuple) else tuple(name.strip() for name in value.split(",") if name.strip())


DURATION: Final = DurationType()
NAMES: Final = NamesType()


@click.command(context_settings={"auto_envvar_prefix": PREFIX, "show_default": True})
@click.option("--kubeconfig", metavar="FILE", help="Cluster to work on. In a pod: its service account's.")
@click.option("--context", metavar="NAME", help="Context of the kubeconfig file, if not its current one.")
@click.option(
    "--namespaces", default="", type=NAMES, metavar="A,B", help="Only jobs in these namespaces; empty: in all."
)
@click.option("--operator-namespace", metavar="NAME", help="Where the operator lives; in a pod its own.")
@click.option("--leader-elect/--no-leader-elect", default=True, help="Let one of several replicas work.")
@click.option("--lease-namespace", default="", metavar="NAME", help="Namespace of the Lease; empty: the operator's.")
@click.option("--lease-name", default="finetune-operator", metavar="NAME", help="Name of the Lease.")
@click.option("--lease-identity", default="", metavar="NAME", help="This replica's unique name; empty: one is made up.")
@click.option("--lease-duration", default="15s", type=DURATION, help="How long a lost leader is waited for.")
@click.option("--metrics-bind-address", default=":8080", metavar="ADDRESS", help="Where /metrics is; 0: nowhere.")
@click.option("--health-bind-address", default=":8081", metavar="ADDRESS", help="Where /healthz and /readyz are.")
@click.option(
    "--scraper-namespaces", default="", type=NAMES, metavar="A,B", help="Where Prometheus is that scrapes trainings."
)
@click.option(
    "--probe-address", default="", metavar="HOST:PORT", help="The operator's own, for the probe of trainings' egress."
)
@click.option("--concurrency", default=16, type=click.IntRange(1, 256), help="Jobs worked on at the same time.")
@click.option("--progress-interval", default="10s", type=DURATION, help="Time between two looks at a training.")
@click.option("--progress-timeout", default="3s", type=DURATION, help="How long a training may take to answer.")
@click.option("--progress-deadline", default="1h", type=DURATION, help="After this long without a step it hangs.")
@click.option("--start-deadline", default="30m", type=DURATION, help="How long pods may wait for node or image.")
@click.option("--stop-grace", default="2m", type=DURATION, help="Time that a training is given to write a checkpoint.")
@click.option("--request-timeout", default="10s", type=DURATION, help="Longest wait for an answer of the API server.")
@click.option("--log-format", default="json", type=click.Choice(["json", "console"]), help="Form of the log's lines.")
@click.option(
    "--log-level", default="info", type=click.Choice(["debug", "info", "warning", "error"]), help="Lowest level."
)
def operator(operator_namespace: str | None, **values: Any) -> None:
    """Watch FinetuneJobs and bring each to its end: prepare, train, finish.

    Durations are written like 90s, 30m or 1h30m. Every flag is also an environment variable: --log-level is
    FINETUNE_OPERATOR_LOG_LEVEL. SIGTERM ends the operator: what was begun is finished and the Lease is
    given up. Exit code 1 when the Lease is lost; Kubernetes then starts the pod again.
    """
    settings = Settings(operator_namespace=operator_namespace or _own_namespace(), **values)
    logs.set_up(settings.log_format, settings.log_level)
    from finetune_operator.reconcile import JobReconciler

    asyncio.run(serve(settings, JobReconciler))


async def serve(settings: Settings, reconciler: ReconcilerFactory) -> None:
    """Runs one replica until SIGTERM or SIGINT; ends the process when the Lease is lost."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    clock = ServerClock()
    # Renewals of the Lease have connections of their own, so that they wait for nothing else.
    _log.info("starting", version=metadata.version("finetune"), namespaces=settings.namespaces or "all")
    async with Client.connect(settings, clock) as client, Client.connect(settings, clock) as lease_client:
        election = Election(lease_client, settings) if settings.leader_elect else None
        controller = Controller(settings, client, reconciler, election, on_lost=_exit_at_once)
        lease_client.count = controller.metrics.count_request
        await controller.run(stop)


def _exit_at_once(error: LeadershipLost) -> NoReturn:
    """Ends the process with no further await: nothing that was begun may be finished any more."""
    _log.error("leadership lost", reason=str(error))
    os._exit(1)


def _own_namespace() -> str:
    try:
        return _POD_NAMESPACE.read_text(encoding="utf-8").strip()
    except OSError:
        return Settings.operator_namespace
