"""Series over the steps of a run, thinned out and smoothed for a picture. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from finetune_trainer.figures import Event, last_of_each_step

MOST_POINTS: Final = 400  # more would only make the page heavy: a chart has about as many pixels
_SMOOTH_FROM: Final = 30  # shorter series are read better as they are
PARTS: Final = ("data", "forward", "backward", "optimizer")


@dataclass(frozen=True)
class Curve:
    """Values over steps; both of one length, which may be 0."""

    steps: list[float]
    values: list[float]

    def thinned(self, most: int = MOST_POINTS) -> Curve:
        """At most `most` points, each the mean of as many neighbours."""
        size = -(-len(self.steps) // most) if self.steps else 1

        def means(values: list[float]) -> list[float]:
            return [_mean(values[i : i + size]) for i in range(0, len(values), size)]

        return Curve(means(self.steps), means(self.values))

    def smoothed(self) -> Curve | None:
        """Mean over a window of about a twentieth of the run around each point; None when the run is short."""
        if len(self.values) < _SMOOTH_FROM:
            return None
        reach = max(2, len(self.values) // 40)
        windows = (self.values[max(0, i - reach) : i + reach + 1] for i in range(len(self.values)))
        return Curve(self.steps, [_mean(window) for window in windows])


@dataclass(frozen=True)
class Curves:
    """Everything that is drawn over steps."""

    loss: Curve
    evaluation_loss: Curve
    spikes: Curve  # steps whose loss jumped
    learning_rate: Curve
    gradient_norm: Curve
    tokens_per_second: Curve
    seconds: dict[str, Curve]  # by part of a step


def curves(events: Sequence[Event]) -> Curves:
    """The series of a run, from the events in its metrics.jsonl."""
    steps = last_of_each_step(events, "step")
    spikes = last_of_each_step(events, "spike")
    evaluations = last_of_each_step(events, "evaluation")

    def over_steps(value: Callable[[Event], float]) -> Curve:
        return Curve([e["step"] for e in steps], [value(e) for e in steps])

    return Curves(
        loss=over_steps(lambda e: e["loss"]),
        evaluation_loss=Curve([e["step"] for e in evaluations], [e["loss"] for e in evaluations]),
        spikes=Curve([e["step"] for e in spikes], [e["loss"] for e in spikes]),
        learning_rate=over_steps(lambda e: e["learningRate"]),
        gradient_norm=over_steps(lambda e: e["gradNorm"]),
        tokens_per_second=over_steps(lambda e: e["tokensPerSecond"]),
        seconds={part: over_steps(lambda e, part=part: e["parts"].get(part, 0.0)) for part in PARTS},  # type: ignore[misc]
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
