"""The plan as a person reads it: what it takes, how long, what it costs, and what to change."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from finetune_trainer.planning.choose import usable
from finetune_trainer.planning.plan import JobPlan
from finetune_trainer.progress import clock, count

_LABELS: Final = {
    "parameters": "parameters",
    "gradients": "gradients",
    "optimizer": "optimizer states",
    "activations": "activations",
    "loss": "loss and backward",
    "buffers": "buffers",
    "update": "update",
}
_BAR: Final = 30


def view(plan: JobPlan, name: str) -> RenderableType:
    """Facts, then memory by part as bars, then what can be changed."""
    facts = _grid()
    for label, value in _facts(plan, name):
        facts.add_row(label, value)
    parts: list[RenderableType] = [facts]
    if plan.fit:
        parts += [Text(), _memory(plan)]
    if advice := _advice(plan):
        parts += [Text(), *(Text(line) for line in advice)]
    return Group(*parts)


def _facts(plan: JobPlan, name: str) -> Iterator[tuple[str, str]]:
    spec, sizes = plan.spec, plan.sizes
    share = "" if sizes.frozen == 0 else f", {count(sizes.trained)} of them trained"
    yield "job", f"{name}, {spec.method.tuning}, {spec.training.precision}"
    yield "model", f"{count(sizes.total)} parameters{share}"
    workers = f"{plan.processes} GPU{'s' if plan.processes > 1 else ''}" if spec.workers.gpus_each else "CPUs"
    if spec.workers.gpus_each and plan.device.product:
        workers += f", {plan.device.product}"
    yield "workers", workers if spec.workers.gpus_each else f"{plan.processes} on CPUs"
    if plan.fit:
        chosen = ", chosen" if spec.deepspeed.zero_stage == "auto" else ""
        yield "ZeRO stage", f"{plan.fit.stage}{chosen}"
    rows = f"{spec.training.micro_batch} × {spec.data.sequence_length:,} tokens"
    every = spec.training.recompute_every
    blocks = "" if every == 1 else f" in one of {every} blocks"
    again = f", activations recomputed{blocks}" if spec.training.activation_checkpointing else ""
    yield "micro-batch", rows + again
    if plan.steps is None:
        yield "steps", "not known before the rows are prepared"
    else:
        yield "steps", f"{plan.steps:,}" + (f", {count(plan.tokens)} tokens" if plan.tokens else "")
    yield from _time(plan)


def _time(plan: JobPlan) -> Iterator[tuple[str, str]]:
    if plan.speed is None:
        if plan.spec.workers.gpus_each:
            yield "time", "not known: " + _unknown_speed(plan)
        return
    yield "speed", f"{plan.speed.tokens_per_second:,.0f} tokens/s if {plan.speed.mfu:.0%} of the GPUs' peak is reached"
    seconds = plan.seconds
    label = "training"
    if seconds is None:
        seconds, label = plan.speed.seconds(1e6), "1 M tokens"
    cost = plan.cost(seconds)
    price = "" if cost is None else f", {cost:,.2f} {plan.device.currency}"
    yield label, clock(seconds) + price


def _unknown_speed(plan: JobPlan) -> str:
    if plan.device.product is None:
        return "name the GPU with --gpu"
    return "not estimated for this GPU, for float32 or with offload"


def _memory(plan: JobPlan) -> Table:
    assert plan.fit is not None
    memory = plan.fit.memory
    grid = _grid()
    grid.add_column(no_wrap=True)
    whole = max(memory.peak, plan.device.memory_bytes or 0)
    for name, size in memory.parts().items():
        if size:
            grid.add_row(_LABELS[name], _size(size), "█" * max(1, round(size / whole * _BAR)))
    where = "a GPU" if plan.spec.workers.gpus_each else "a process"
    room = ""
    if plan.device.memory_bytes and plan.spec.workers.gpus_each:
        room = f"of {_size(usable(plan.device.memory_bytes))} usable"
    grid.add_row(f"peak of {where}", Text(_size(memory.peak), style="bold"), room)
    if memory.host:
        grid.add_row("host memory", _size(memory.host), "for each process")
    return grid


def _advice(plan: JobPlan) -> list[str]:
    if plan.fit is None:
        return ["The memory of this architecture cannot be planned; the job may still run."]
    if plan.larger_micro_batch:
        return [f"training.microBatch: {plan.larger_micro_batch} fits too, and uses the GPUs better."]
    return []


def _size(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def _grid() -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True, min_width=16)
    grid.add_column(overflow="fold")
    return grid
