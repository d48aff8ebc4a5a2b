"""What came out of a job, as a person reads it and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from finetune_api.status import GateResult, Result
from finetune_operator.observe import parse_time
from finetune_operator.plugin.reading import Shown
from finetune_operator.plugin.words import money, reached_by, span


def result_view(job: Shown, result: Result) -> RenderableType:
    """Losses, gates, where weights and report are, and what they took."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    base, tuned = result.eval_loss_base, result.eval_loss_tuned
    if base is not None and tuned is not None:
        change = f"  ({tuned / base - 1:+.1%})" if base > 0 else ""
        fell = tuned < base
        grid.add_row("evaluation loss", Text(f"{base:.4f} → {tuned:.4f}{change}", style="green" if fell else "red"))
    else:
        grid.add_row("evaluation loss", Text("not measured: the job has no evaluation rows"))
    for gate, asked in zip(result.gates, _asked(job.spec, result.gates), strict=True):
        measured = "not measured" if gate.value is None else f"{gate.value:.4g}"
        mark, style = ("✓", "green") if gate.passed else ("✗", "red")
        grid.add_row("gate", Text(f"{mark} {gate.metric} {measured}{asked}", style=style))
    grid.add_row("weights", Text(result.uri if _accepted(result) else f"{result.uri}  (kept aside)"))
    if result.report:
        grid.add_row("report", Text(result.report))
    if result.base_model_sha:
        grid.add_row("base model", Text(result.base_model_sha))
    if result.manifest_sha256:
        grid.add_row("rows", Text(f"manifest {result.manifest_sha256[:12]}"))
    if result.egress:
        reached = reached_by(result)
        said = reached or f"none of {len(result.egress)} addresses asked"
        grid.add_row("pods reached", Text(said, style="red" if reached else "green"))
    if cost := job.status.cost:
        grid.add_row("cost", Text(money(cost.spent, cost.currency)))
    ended = parse_time(job.status.completion_time)
    if ended is not None:
        attempts = f" in {job.status.attempt} attempts" if (job.status.attempt or 1) > 1 else ""
        grid.add_row("took", Text(f"{span(ended - job.created)}{attempts}"))
    return Group(Text.assemble((job.name, "bold"), (f"  namespace {job.namespace}", "dim")), grid)


def result_json(job: Shown, result: Result) -> dict[str, Any]:
    """The same for programs, in the words of `status.result`."""
    about = {"name": job.name, "namespace": job.namespace, "phase": job.phase, "attempt": job.status.attempt}
    cost = job.status.cost.model_dump(exclude_none=True) if job.status.cost else None
    return about | {"cost": cost, "result": result.model_dump(exclude_none=True)}


def _accepted(result: Result) -> bool:
    return all(gate.passed for gate in result.gates)


def _asked(spec: Mapping[str, Any], gates: Sequence[GateResult]) -> list[str]:
    """The bounds of each gate; results stand in the order of the spec."""
    wanted = (spec.get("evaluation") or {}).get("gates") or []
    found = []
    for index, gate in enumerate(gates):
        bound = wanted[index] if index < len(wanted) and wanted[index].get("metric") == gate.metric else {}
        limits = [f"{word} {bound[key]:g}" for word, key in (("at least", "min"), ("at most", "max")) if key in bound]
        found.append(f", {' and '.join(limits)} was asked" if limits else "")
    return found
