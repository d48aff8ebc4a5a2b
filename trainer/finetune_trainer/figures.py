"""The figures of a run, from the events in its metrics.jsonl. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from finetune_api.errors import TrainingError
from finetune_api.result import EvaluationResult, PreferenceResult, TrainingResult

Event = Mapping[str, Any]


def last_of_each_step(events: Iterable[Event], kind: str) -> list[Event]:
    """The events of a kind in the order of their steps; of a step that was done again after a resume, the last."""
    by_step = {event["step"]: event for event in events if event["event"] == kind}
    return [by_step[step] for step in sorted(by_step)]


def training_result(events: Sequence[Event]) -> TrainingResult:
    """What the training did.

    Raises:
        TrainingError: no step was finished.
    """
    starts = [event for event in events if event["event"] == "start"]
    steps = last_of_each_step(events, "step")
    if not starts or not steps:
        raise TrainingError(
            "no step was finished", where="metrics.jsonl", hint="run the same command again with --fresh"
        )
    tail = steps[-max(1, len(steps) // 10) :]
    utilisation = [(e["mfu"], e["seconds"]) for e in steps if e.get("mfu") is not None]
    start = starts[-1]
    return TrainingResult(
        steps=steps[-1]["step"],
        epochs=steps[-1]["epoch"],
        world_size=start["worldSize"],
        device=start["device"],
        parameters=start["parameters"],
        trainable_parameters=start["trainableParameters"],
        tokens=round(sum(e["tokens"] for e in steps)),
        target_tokens=sum(e["targetTokens"] for e in steps),
        first_loss=steps[0]["loss"],
        last_loss=sum(e["loss"] * e["targetTokens"] for e in tail) / sum(e["targetTokens"] for e in tail),
        tokens_per_second=sum(e["tokens"] for e in steps) / sum(e["seconds"] for e in steps),
        mfu=sum(m * s for m, s in utilisation) / sum(s for _, s in utilisation) if utilisation else None,
        memory_bytes=max((e["memoryBytes"] for e in steps if e.get("memoryBytes")), default=None),
    )


def evaluation_result(events: Iterable[Event]) -> EvaluationResult | None:
    """The base model (the evaluation at step 0) against the tuned one (the last evaluation), on the same tokens."""
    evaluations = last_of_each_step(events, "evaluation")
    if len(evaluations) < 2 or evaluations[0]["step"] != 0:
        return None
    base, tuned = evaluations[0], evaluations[-1]
    preference = _preference(base, tuned)
    return EvaluationResult(
        loss_base=base["loss"],
        loss_tuned=tuned["loss"],
        perplexity_base=None if preference else perplexity(base["loss"]),
        perplexity_tuned=None if preference else perplexity(tuned["loss"]),
        preference=preference,
        tokens=tuned["tokens"],
    )


def _preference(base: Event, tuned: Event) -> PreferenceResult | None:
    if "pairs" not in tuned:
        return None
    return PreferenceResult(
        pairs=round(tuned["pairs"]),
        accuracy_base=base["likelihoodAccuracy"],
        accuracy_tuned=tuned["likelihoodAccuracy"],
        reward_accuracy=tuned["rewardAccuracy"],
        reward_margin=tuned["rewardMargin"],
    )


def perplexity(loss: float) -> float:
    """exp(loss), kept finite: a model can be arbitrarily bad."""
    return math.exp(min(loss, 700.0))


def stages(events: Sequence[Event], seconds: Mapping[str, float], export: float) -> dict[str, float]:
    """Wall time by stage, in the order they happen.

    Args:
        seconds: what the caller measured: `prepare`, and `train` from asking for workers to the end of the export.
        export: of that, writing and checking the weights.

    Steps, evaluations and checkpoints of earlier calls, that this one resumed, count; the start is this call's.
    """
    parts = {
        name: sum(e["seconds"] for e in events if e["event"] == kind)
        for name, kind in (("train", "step"), ("evaluate", "evaluation"), ("checkpoint", "checkpoint"))
    }
    first = max((i for i, e in enumerate(events) if e["event"] == "start"), default=0)
    counted = sum(e["seconds"] for e in events[first:] if e["event"] in ("step", "evaluation", "checkpoint"))
    start = max(0.0, seconds.get("train", 0.0) - counted - export)
    return {"prepare": seconds.get("prepare", 0.0), "start": start, **parts, "export": export}
