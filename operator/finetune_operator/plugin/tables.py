"""Jobs as a table of plain text: columns three spaces apart and never cut, as kubectl prints them."""

from __future__ import annotations

from collections.abc import Sequence

from finetune_operator.observe import parse_time
from finetune_operator.plugin.reading import Shown
from finetune_operator.plugin.words import money, span

_NONE = "<none>"


def jobs_table(jobs: Sequence[Shown], now: float, *, namespaces: bool, wide: bool) -> str:
    """A line for each job, by namespace and name.

    Args:
        now: Unix seconds, by the API server's clock.
        namespaces: with a column for them.
        wide: with more columns.
    """
    header = ["NAME", "PHASE", "REASON", "STEP", "%", "LOSS", "ENDS IN", "COST", "AGE"]
    if wide:
        header += ["EVAL LOSS", "TOKENS/S", "PROJECTED", "ATTEMPT", "RUNTIME", "MESSAGE"]
    if namespaces:
        header = ["NAMESPACE", *header]
    ordered = sorted(jobs, key=lambda job: (job.namespace, job.name))
    rows = [[*([job.namespace] if namespaces else []), *_row(job, now, wide=wide)] for job in ordered]
    return aligned([header, *rows])


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows as lines, each column as wide as its widest cell."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = ("   ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _row(job: Shown, now: float, *, wide: bool) -> list[str]:
    status, progress, cost = job.status, job.status.progress, job.status.cost
    eta = parse_time(progress.eta_time) if progress and job.phase == "Training" else None
    cells: list[object] = [
        job.name,
        "Deleting" if job.deleting else job.phase,
        status.reason if status.reason != job.phase else None,
        f"{progress.step}/{progress.total_steps}" if progress else None,
        progress.percent if progress else None,
        _figure(progress.loss if progress else None),
        None if eta is None else span(eta - now),
        money(cost.spent, cost.currency) if cost else None,
        span(now - job.created),
    ]
    if wide:
        speed = progress.tokens_per_second if progress else None
        cells += [
            _figure(progress.eval_loss if progress else None),
            None if speed is None else f"{speed:.0f}",
            None if cost is None or cost.projected is None else money(cost.projected, cost.currency),
            status.attempt,
            status.runtime,
            status.message,
        ]
    return [_NONE if cell is None else str(cell).replace("\n", " ") for cell in cells]


def _figure(value: float | None) -> str | None:
    return None if value is None else f"{value:.4f}"
