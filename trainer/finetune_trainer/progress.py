"""What a person sees while a run goes on: a live bar in a terminal, plain lines anywhere else."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from finetune_trainer.reporter import Event

_PLAIN_LINE_SECONDS = 10.0


def clock(seconds: float) -> str:
    """A duration as a person reads it: 0:42, 12:05, 3:07:09."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def count(number: float) -> str:
    """A count with three figures: 950, 4.88 M, 134 M."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"


class TrainingStatus:
    """One line on where training stands, built from the loop's events."""

    def __init__(self) -> None:
        self.step = 0
        self.total = 0
        self.outcome = ""
        self._line = "waiting for workers"
        self._step_seconds: float | None = None

    def update(self, event: Event) -> str:
        """Takes one event in; the line to show."""
        match event["event"]:
            case "start":
                self.step, self.total = event["resumedFromStep"] or 0, event["totalSteps"]
                resumed = f", from step {self.step}" if self.step else ""
                self._line = (
                    f"{event['worldSize']} × {event['device']}, {count(event['parameters'])} parameters, "
                    f"{count(event['trainableParameters'])} trained{resumed}"
                )
            case "step":
                self._take_step(event)
            case "evaluation":
                accuracy = f"  chosen likelier {event['likelihoodAccuracy']:.0%}" if "pairs" in event else ""
                self._line = f"step {event['step']}/{self.total}  evaluation loss {event['loss']:.4f}{accuracy}"
            case "references":
                self._line = f"base model's view of the pairs: {event['done']} of {event['total']} sequences"
            case "checkpoint":
                self._line = f"step {event['step']}/{self.total}  checkpoint written in {event['seconds']:.1f} s"
            case "retry":
                self._line = f"starting again ({event['reason']})"
            case "export":
                self._line = "writing the weights, loading them again, comparing logits"
            case "spike":
                self._line = (
                    f"step {event['step']}: the loss jumped to {event['loss']:.4f} from {event['expected']:.4f}"
                )
            case "warning":
                self._line = event["message"]
            case "end":
                self.outcome = event["reason"]
                self._line = f"{self.outcome} at step {event['step']}/{self.total}"
        return self._line

    def _take_step(self, event: Event) -> None:
        self.step = event["step"]
        last = self._step_seconds
        self._step_seconds = event["seconds"] if last is None else 0.9 * last + 0.1 * event["seconds"]
        mfu = f"  MFU {event['mfu']:.1%}" if event.get("mfu") is not None else ""
        margin = f"  margin {event['rewardMargin']:.3f}" if "pairs" in event else ""
        self._line = (
            f"step {self.step}/{self.total}  loss {event['loss']:.4f}{margin}"
            f"  {event['tokensPerSecond']:,.0f} tokens/s{mfu}"
            f"  ETA {clock((self.total - self.step) * self._step_seconds)}"
        )


class Stage:
    """One stage of a run, while it lasts."""

    def __init__(self, name: str, console: Console, live: Progress | None, task: TaskID | None) -> None:
        self.summary = ""
        self._name, self._console, self._live, self._task = name, console, live, task
        self._printed = time.monotonic()
        self._shown = ""

    def update(self, text: str, done: float | None = None, total: float | None = None, *, now: bool = False) -> None:
        """Shows where the stage stands; in plain mode at most one line every ten seconds, unless `now`."""
        if self._live is not None and self._task is not None:
            self._live.update(self._task, description=text, completed=done, total=total)
        elif text != self._shown and (now or time.monotonic() - self._printed >= _PLAIN_LINE_SECONDS):
            self._printed, self._shown = time.monotonic(), text
            share = f"{done / total:4.0%}  " if done is not None and total else ""
            self._console.print(f"{self._name:<9} {share}{text}", markup=False, highlight=False)

    def note(self, text: str) -> None:
        """A line that stays."""
        self._console.print(Text(f"  {self._name:<9} {text}", style="dim"))


class Display:
    """Shows the stages of a run one after the other; finished ones stay as one line with their time."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, soft_wrap=True)
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        """Opens a stage; on leaving without an exception prints its summary and duration."""
        started = time.monotonic()
        live = self._live() if self.console.is_terminal else None
        task = live.add_task("", total=None, name=name) if live else None
        stage = Stage(name, self.console, live, task)
        if live:
            live.start()
        try:
            yield stage
        finally:
            if live:
                live.stop()
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - started
        line = Text.assemble(("✓ ", "green"), (f"{name:<9} ", "bold"), stage.summary)
        line.append(f"  {clock(self.seconds[name])}", style="dim")
        self.console.print(line)

    def _live(self) -> Progress:
        return Progress(
            TextColumn("  [bold]{task.fields[name]:<9}"),
            BarColumn(bar_width=28),
            TextColumn("{task.description}", markup=False),
            console=self.console,
            transient=True,
            refresh_per_second=4,
        )
