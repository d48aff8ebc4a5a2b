"""The comparison of base, prompted and tuned model as rows of a table, and what to bear in mind when reading it."""

from __future__ import annotations

from collections.abc import Callable

from finetune_api.result import ComparisonResult, Contender, Requests, Result


def columns(comparison: ComparisonResult) -> list[str]:
    """Names of the models in the table."""
    return ["base", *(["base with prompt"] if comparison.prompted else []), "tuned"]


def rows(result: Result, comparison: ComparisonResult) -> list[list[str]]:
    """A name and a figure for each model; what nobody measured has no row."""
    models = [comparison.base, *([comparison.prompted] if comparison.prompted else []), comparison.tuned]
    currency = f", {result.cost.currency}" if result.cost else ""
    cost = f"cost of 1,000 requests{currency}"

    def figure(value: Callable[[Contender], float | None], form: str) -> list[str]:
        found = [value(model) for model in models]
        return [] if all(v is None for v in found) else ["—" if v is None else form.format(v) for v in found]

    def request(value: Callable[[Requests], float | None], form: str) -> list[str]:
        return figure(lambda model: None if model.requests is None else value(model.requests), form)

    table = [
        [f"prompts as asked, of {comparison.checked}", *figure(lambda m: m.passed, "{}")],
        [f"loss on {comparison.held_out_answers} held-out answers", *figure(lambda m: m.loss, "{:.3f}")],
        ["harmful or unanswerable prompts declined", *figure(lambda m: m.refusal_rate, "{:.0%}")],
        ["harmless prompts declined", *figure(lambda m: m.over_refusal_rate, "{:.0%}")],
        ["tokens per request: prompt", *request(lambda r: r.prompt_tokens, "{:.0f}")],
        ["tokens per request: answer", *request(lambda r: r.answer_tokens, "{:.0f}")],
        ["tokens per request, tuned = 1", *_ratios(models)],
        ["seconds per request", *request(lambda r: r.seconds, "{:.2f}")],
        [f"{cost}: by time", *request(lambda r: r.cost_by_time, "{:.3g}")],
        [f"{cost}: by tokens", *request(lambda r: r.cost_by_tokens, "{:.3g}")],
    ]
    return [row for row in table if len(row) > 1]


def notes(comparison: ComparisonResult) -> list[str]:
    """Sentences that belong below the table."""
    found = []
    if comparison.prompted:
        parts = ["a system message"] if comparison.system else []
        if comparison.examples:
            parts.append(f"{comparison.examples} training rows, drawn by content")
        found.append(
            f"Base with prompt is the untuned model with {' and '.join(parts)} before each question. A prompt that is "
            "written with more care may do better; a few prompts show a tendency, no more."
        )
    requests = (("base", comparison.base.requests), ("tuned", comparison.tuned.requests))
    if cut := [f"{name} {r.cut}" for name, r in requests if r and r.cut]:
        found.append(f"Answers cut at the longest that was allowed ({', '.join(cut)}) would have taken more tokens.")
    if comparison.tuned.requests:
        found.append(
            "Seconds are of this run's machine, one request at a time; the prompt's examples are read once and kept. "
            "A server that answers many at once takes far less for each: rely on the ratio, not on the amount."
        )
    if comparison.tuned.requests and comparison.tuned.requests.cost_by_time is not None:
        found.append("Cost by time is those seconds at the price of one of the job's workers.")
    return found


def _ratios(models: list[Contender]) -> list[str]:
    totals = [m.requests.prompt_tokens + m.requests.answer_tokens for m in models if m.requests]
    return [f"{total / totals[-1]:.1f}" for total in totals]
