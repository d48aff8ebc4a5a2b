"""Structured logs: one line an event, as JSON or for a person, with the job that is being worked on in every line.

The libraries' own log records take the same form.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import MutableMapping
from typing import Any

import structlog

_QUIET = ("aiohttp.access", "asyncio", "kubernetes")


def set_up(log_format: str, level: str) -> None:
    """Sends everything to stderr.

    Args:
        log_format: json or console.
        level: debug, info, warning or error.
    """
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
    ]
    last: list[Any]
    if log_format == "json":
        renderer = structlog.processors.JSONRenderer(ensure_ascii=False)
        last = [structlog.processors.ExceptionRenderer(), _what_first, renderer]
    else:
        plain = structlog.dev.plain_traceback  # the others show local variables, which may hold a tenant's data
        colors = sys.stderr.isatty()
        last = [structlog.dev.ConsoleRenderer(colors=colors, timestamp_key="time", exception_formatter=plain)]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.make_filtering_bound_logger(level),
        cache_logger_on_first_use=True,
    )
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for name in _QUIET:
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))


def _what_first(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    return {name: event[name] for name in ("time", "level", "event") if name in event} | dict(event)
