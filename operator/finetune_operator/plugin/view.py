"""One job as a person reads it: where it is and why, how far, how fast, what it costs, what went wrong.

Pure: from a job and the time to something that rich can show. A row is there only when its figure is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Final

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from finetune_api.status import Condition, Failure, Goodput, Plan, Progress
from finetune_operator.observe import parse_time
from finetune_operator.plugin.reading import Shown
from finetune_operator.plugin.words import money, reached_by, several, short_count, span

Row = tuple[str, RenderableType]

STYLES: Final = {
    "Pending": "yellow",
    "Preparing": "cyan",
    "Queued": "yellow",
    "Training": "cyan",
    "Finishing": "cyan",
    "Complete": "green",
    "Failed": "red",
    "Suspended": "yellow",
}
UNSEEN_SECONDS: Final = 30.0  # after which an operator that runs would have looked at a new job
OLD_SECONDS: Final = 60.0  # the operator asks every 10 s: older progress is worth a remark
_BAR_WIDTH: Final = 30
_LABEL_WIDTH: Final = 11
_SHOWN_FAILURES: Final = 3
_GIB: Final = 2**30
_MARKS: Final = {"True": ("✓", "green"), "False": ("✗", "yellow"), "Unknown": ("?", "yellow")}


def status_view(job: Shown, now: float, *, full: bool = True, remark: str = "") -> RenderableType:
    """Everything about one job.

    Args:
        now: Unix seconds, by the API server's clock.
        full: else with the last failures and without long addresses, so that a live view fits on a screen.
        remark: a last line, such as that the API server does not answer.
    """
    parts: list[RenderableType] = [_title(job, now), _where(job, now)]
    for rows in (_result(job), _progress(job, now), _account(job, now, full=full)):
        if rows:
            parts += [Text(), _grid(rows)]
    if job.status.failures:
        parts += [Text(), *_failures(job, now, full=full)]
    if last := [*_plan_row(job), *_conditions(job, now)]:
        parts += [Text(), _grid(last)]
    if job.unread:
        fields = ", ".join(job.unread)
        parts.append(Text(f"not shown: {fields}; a newer kubectl-finetune understands it", style="yellow"))
    if remark:
        parts.append(Text(remark, style="yellow"))
    return Group(*parts)


def line(job: Shown, now: float) -> str:
    """One job in one line, for logs."""
    status = job.status
    reason = f" ({status.reason})" if status.reason and status.reason != job.phase else ""
    parts = [f"{job.phase}{reason}"]
    if progress := status.progress:
        parts.append(f"step {progress.step:,}/{progress.total_steps:,} {progress.percent} %")
        if progress.loss is not None:
            parts.append(f"loss {progress.loss:.4f}")
        if ends := _ends_in(job, now):
            parts.append(f"ends in {ends}")
    if status.cost:
        parts.append(f"cost {money(status.cost.spent, status.cost.currency)}")
    return "  ".join(parts)


def plan_view(plan: Plan) -> RenderableType:
    """What prepare found out that the run will need."""
    return _grid(list(_plan(plan)))


def _title(job: Shown, now: float) -> RenderableType:
    spec, status = job.spec, job.status
    workers = spec.get("workers") or {}
    gpus = workers.get("gpusEach", 0)
    until = parse_time(status.completion_time)
    facts = [
        f"namespace {job.namespace}",
        f"took {span(until - job.created)}" if until else f"age {span(now - job.created)}",
        f"attempt {status.attempt}" if status.attempt else "",
        f"runtime {status.runtime}" if status.runtime else "",
    ]
    needs = [
        str((spec.get("model") or {}).get("source", "")).rpartition("://")[2],
        f"{several(workers.get('count', 1), 'worker')} {'with ' + several(gpus, 'GPU') if gpus else 'on CPUs'}",
    ]
    return Group(
        Text(job.name, style="bold").append(f"  {_dotted(facts)}", style="not bold dim"),
        Text(_dotted(needs), style="dim"),
    )


def _where(job: Shown, now: float) -> RenderableType:
    """Phase, reason and the sentence."""
    status = job.status
    head = Text(job.phase, style=f"bold {STYLES.get(job.phase, '')}")
    if status.reason and status.reason != job.phase:
        head.append(f"  {status.reason}", style="not bold")
    sentence = status.message or ""
    if job.deleting:
        sentence = "It is being deleted."
    elif status.phase is None:
        sentence = "The operator has not looked at it yet."
        if now - job.created > UNSEEN_SECONDS:
            sentence += " Does it run? `kubectl get pods -A -l app.kubernetes.io/name=finetune-operator` shows it."
    elif job.stale and not job.ended:
        sentence = f"{sentence} The operator has not looked at the last change of the job yet.".strip()
    parts: list[RenderableType] = [head]
    if sentence:
        parts.append(Padding(Text(sentence), (0, 0, 0, 2), expand=False))
    return Group(*parts)


def _progress(job: Shown, now: float) -> list[Row]:
    progress = job.status.progress
    if progress is None:
        return []
    bar = Table.grid(padding=(0, 2))
    bar.add_row(
        ProgressBar(
            total=max(1, progress.total_steps),
            completed=progress.step,
            width=_BAR_WIDTH,
            complete_style=STYLES[job.phase],
        ),
        Text(f"step {progress.step:,} of {progress.total_steps:,}"),
        Text(f"{progress.percent} %", style="bold"),
    )
    rows: list[Row] = [("progress", bar)]
    if ends := _ends_in(job, now):
        rows.append(("ends in", Text(f"{ends}  ({_local_time(progress.eta_time or '', now)})")))
    losses = [
        f"{progress.loss:.4f} training" if progress.loss is not None else "",
        f"{progress.eval_loss:.4f} evaluation" if progress.eval_loss is not None else "",
    ]
    if any(losses):
        rows.append(("loss", Text("   ".join(filter(None, losses)))))
    if speed := _speed(progress, running=job.phase == "Training"):
        rows.append(("speed" if job.phase == "Training" else "trained", Text(speed)))
    updated = parse_time(progress.updated_time)
    if updated is not None and job.phase in ("Training", "Finishing"):
        old = job.phase == "Training" and now - updated > OLD_SECONDS
        again = "" if progress.attempt == job.status.attempt else f", by attempt {progress.attempt}"
        rows.append(("as of", Text(f"{span(now - updated)} ago{again}", style="yellow" if old else "")))
    return rows


def _speed(progress: Progress, *, running: bool) -> str:
    parts = [
        f"{progress.tokens_per_second:,.0f} tokens/s" if progress.tokens_per_second is not None and running else "",
        f"{short_count(progress.tokens)} tokens{' so far' if running else ''}" if progress.tokens is not None else "",
        f"epoch {progress.epoch:.2f}" if progress.epoch is not None else "",
    ]
    return "   ".join(filter(None, parts))


def _ends_in(job: Shown, now: float) -> str:
    """How long training still takes; empty when nothing trains or nobody knows."""
    end = parse_time(job.status.progress.eta_time if job.status.progress else None)
    return span(end - now) if end is not None and job.phase == "Training" else ""


def _local_time(text: str, now: float) -> str:
    """A time as a clock on the wall shows it, with the day when that is not today."""
    at, today = datetime.fromisoformat(text).astimezone(), datetime.fromtimestamp(now).astimezone()
    return f"{at:%H:%M}" if at.date() == today.date() else f"{at:%a %d %b, %H:%M}"


def _account(job: Shown, now: float, *, full: bool) -> list[Row]:
    status, limits = job.status, job.spec.get("limits") or {}
    rows: list[Row] = []
    if cost := status.cost:
        parts = [f"{money(cost.spent, cost.currency)}{'' if job.ended else ' so far'}"]
        if cost.projected is not None and not job.ended:
            parts.append(f"{money(cost.projected, cost.currency)} at the end")
        if limits.get("maxCost") is not None and not job.ended:
            parts.append(f"{money(limits['maxCost'], cost.currency)} at most")
        rows.append(("cost", Text("   ".join(parts))))
    if status.goodput:
        rows += _goodput(status.goodput)
    if book := status.attempts:
        used = [
            f"{count} of {limits.get(name, '?')} {name}"
            for name, count in (("retries", book.retries), ("preemptions", book.preemptions))
            if count
        ]
        if used:
            rows.append(("used up", Text(", ".join(used))))
    checkpoint = status.checkpoint
    if checkpoint and job.phase != "Complete":
        age = span(now - (parse_time(checkpoint.time) or now))
        rows.append(("checkpoint", Text(f"step {checkpoint.step:,}   {age} ago")))
        if full:
            rows.append(("", Text(checkpoint.uri)))
    return rows


def _goodput(goodput: Goodput) -> list[Row]:
    lost = goodput.lost_seconds.model_dump(by_alias=False)
    total = goodput.training_seconds + sum(lost.values())
    if total <= 0:
        return []
    largest = sorted(lost.items(), key=lambda cause: -cause[1])
    causes = ", ".join(f"{span(seconds)} {name}" for name, seconds in largest if seconds >= 1)
    share = int(100 * goodput.training_seconds / total)
    return [("goodput", Text(f"{share} % trained{f'   lost: {causes}' if causes else ''}"))]


def _result(job: Shown) -> list[Row]:
    result = job.status.result
    if result is None:
        return []
    rows: list[Row] = []
    if result.eval_loss_base is not None and result.eval_loss_tuned is not None:
        rows.append(("evaluation", Text(f"loss {result.eval_loss_base:.4f} → {result.eval_loss_tuned:.4f}")))
    if result.gates:
        missed = [gate.metric for gate in result.gates if not gate.passed]
        verdict = f"missed: {', '.join(missed)}" if missed else "all met"
        rows.append(("gates", Text(verdict, style="red" if missed else "green")))
    rows.append(("weights", Text(result.uri)))
    if result.report:
        rows.append(("report", Text(result.report)))
    if reached := reached_by(result):
        rows.append(("reached", Text(reached, style="red")))
    return rows


def _failures(job: Shown, now: float, *, full: bool) -> Iterator[RenderableType]:
    failures = job.status.failures
    shown = failures if full else failures[-_SHOWN_FAILURES:]
    hidden = len(failures) - len(shown)
    yield Text(f"failures{f'   ({hidden} earlier ones: --once)' if hidden else ''}", style="dim")
    for failure in shown:
        when = parse_time(failure.time)
        facts = [
            f"{span(now - when)} ago" if when is not None else "",
            f"node {failure.node}" if failure.node else "",
            f"rank {failure.rank}" if failure.rank is not None else "",
            f"exit code {failure.exit_code}" if failure.exit_code is not None else "",
        ]
        head = Text(f"  {_which(failure)}  ").append(failure.reason, style="yellow" if failure.retryable else "red")
        yield head.append(f"  {_dotted(facts)}", style="dim")
        if failure.message != job.status.message:  # said at the top
            yield Padding(Text(failure.message), (0, 0, 0, 4), expand=False)


def _which(failure: Failure) -> str:
    return f"attempt {failure.attempt}" if failure.attempt else "prepare"


def _plan_row(job: Shown) -> list[Row]:
    plan = job.status.plan
    if plan is None or job.ended:
        return []
    facts = [
        several(plan.total_steps, "step") if plan.total_steps is not None and job.status.progress is None else "",
        f"{short_count(plan.tokens)} tokens/epoch" if plan.tokens is not None else "",
        f"ZeRO {plan.zero_stage}" if plan.zero_stage is not None else "",
        f"{plan.gpu_memory_bytes / _GIB:.1f} GiB a GPU" if plan.gpu_memory_bytes is not None else "",
        f"{span(plan.seconds)}" if plan.seconds is not None else "",
        f"cost {money(plan.cost, None)}" if plan.cost is not None else "",
    ]
    return [("plan", Text("   ".join(filter(None, facts))))] if any(facts) else []


def _plan(plan: Plan) -> Iterator[Row]:
    """Each figure on a line of its own; the length of the run first."""
    known: list[tuple[str, str | None]] = [
        ("steps", None if plan.total_steps is None else f"{plan.total_steps:,}"),
        ("sequences", None if plan.sequences is None else f"{plan.sequences:,} an epoch"),
        ("tokens", None if plan.tokens is None else f"{plan.tokens:,} an epoch"),
        ("learned", None if plan.target_tokens is None else f"{plan.target_tokens:,} of these tokens"),
        ("ZeRO stage", None if plan.zero_stage is None else str(plan.zero_stage)),
        ("GPU memory", None if plan.gpu_memory_bytes is None else f"{plan.gpu_memory_bytes / _GIB:.1f} GiB at most"),
        ("time", None if plan.seconds is None else f"{span(plan.seconds)} of training"),
        ("cost", None if plan.cost is None else money(plan.cost, None)),
    ]
    for name, value in known:
        if value is not None:
            yield name, Text(value)


def _conditions(job: Shown, now: float) -> list[Row]:
    """All conditions in a line, and below it the sentence of each that holds something up."""
    conditions = job.status.conditions
    if not conditions:
        return []
    marks = Text("   ").join(_mark(each, now) for each in conditions)
    rows: list[Row] = [("conditions", marks)]
    for each in conditions:
        holds_up = each.type in ("Valid", "Prepared") and each.status != "True"
        if holds_up and each.message and each.message != job.status.message:
            rows.append(("", Text(f"{each.type}: {each.message}", style="yellow")))
    return rows


def _mark(condition: Condition, now: float) -> Text:
    mark, style = _MARKS[condition.status]
    if condition.type == "Failed" and condition.status == "True":
        mark, style = "✗", "red"
    elif condition.type == "Running" and condition.status == "False":
        mark, style = "–", "dim"  # so it is between attempts and after the end
    since = span(now - (parse_time(condition.last_transition_time) or now))
    return Text(f"{mark} ", style=style).append(condition.type, style="default").append(f" {since}", style="dim")


def _dotted(facts: Sequence[str]) -> str:
    return " · ".join(filter(None, facts))


def _grid(rows: Sequence[Row]) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True, min_width=_LABEL_WIDTH)
    grid.add_column(overflow="fold")
    for row in rows:
        grid.add_row(*row)
    return grid
