"""The learning rate as a pure function of the step, so that a restart needs no scheduler state."""

from __future__ import annotations

import math

from finetune_api.job import Training


def warmup_steps(total: int, training: Training) -> int:
    """Optimizer steps of warm-up: `warmup` itself when it is 1 or more, else that fraction of `total`, rounded up."""
    steps = int(training.warmup) if training.warmup >= 1 else math.ceil(training.warmup * total)
    return min(steps, total)


def learning_rate(step: int, total: int, training: Training) -> float:
    """Learning rate of the optimizer step that follows `step` finished ones (0 ≤ step < total).

    Warm-up rises in equal steps and reaches the peak on the step after it; the first step is never 0. After it, with
    x going from 0 to 1 over the remaining steps and m the minimum relative to the peak:

    - constant: 1
    - linear: 1 - (1 - m)·x
    - cosine: m + (1 - m)·(1 + cos πx) / 2 (https://arxiv.org/abs/1608.03983)
    - wsd: 1, then linear to m over the last `decay` of all steps (https://arxiv.org/abs/2404.06395)
    """
    peak, minimum = training.learning_rate, training.minimum_learning_rate
    warmup = warmup_steps(total, training)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    match training.schedule:
        case "constant":
            return peak
        case "linear":
            return peak * (1 - (1 - minimum) * _progress(step, warmup, total))
        case "cosine":
            return peak * (minimum + (1 - minimum) * (1 + math.cos(math.pi * _progress(step, warmup, total))) / 2)
        case "wsd":
            start = max(warmup, total - math.ceil(training.decay * total))
            return peak * (1 - (1 - minimum) * _progress(step, start, total))


def _progress(step: int, start: int, end: int) -> float:
    return max(step - start, 0) / max(end - start, 1)
