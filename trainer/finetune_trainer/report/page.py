"""report.html: one file that asks nothing of the network and runs no script.

Prompts and answers are untrusted text: the template escapes all but the charts, which are made of numbers alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from finetune_api.result import PromptResult, Result
from finetune_api.status import DESTINATIONS
from finetune_trainer.egress import sentence
from finetune_trainer.model_card import exams, public
from finetune_trainer.progress import clock, count
from finetune_trainer.report import charts, compared
from finetune_trainer.report.curves import Curves
from finetune_trainer.verdict import (
    checked,
    forgetting_sentence,
    gate_sentence,
    got_worse,
    passed,
    passed_by_base,
)

_STATES: Final = {"good": "Good", "mixed": "Mixed", "bad": "Poor", "rejected": "Rejected"}
_OUTCOMES: Final = {"passed": "as asked", "failed": "not as asked", "unchecked": "not checked"}


@dataclass(frozen=True)
class Topic:
    """Prompts under one heading."""

    name: str
    prompts: list[PromptResult]

    @property
    def checked(self) -> int:
        return len(checked(self.prompts))

    @property
    def passed(self) -> int:
        return passed(self.prompts)


@dataclass(frozen=True)
class Tile:
    """One key figure: its name, the value, and a smaller line below."""

    name: str
    value: str
    note: str


@dataclass(frozen=True)
class Share:
    """One part of a whole: percent is of the whole."""

    name: str
    seconds: float
    percent: float


def html(result: Result, curves: Curves) -> str:
    """The whole page."""
    environment = Environment(
        loader=PackageLoader("finetune_trainer.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"clock": clock, "count": count, "public": public, "gate": gate_sentence}
    return environment.get_template("template.html").render(
        result=result,
        state=_STATES[result.verdict.state],
        outcomes=_OUTCOMES,
        finished=datetime.fromtimestamp(result.finished, UTC).strftime("%-d %B %Y, %H:%M UTC"),
        tiles=tiles(result),
        failing=[p for p in result.prompts if p.tuned.outcome == "failed"],
        worse=got_worse(result.prompts),
        topics=topics(result.prompts),
        measured=exams(result),
        compared=_compared(result),
        forgetting=result.forgetting and forgetting_sentence(result.forgetting),
        egress=sentence(result.egress),
        destinations=DESTINATIONS,
        stages=shares(result.stages),
        charts=_charts(result, curves),
        settings=yaml.safe_dump(result.settings, sort_keys=False, allow_unicode=True),
    )


def tiles(result: Result) -> list[Tile]:
    """The key figures, the most telling first."""
    done, asked, tiles = result.training, checked(result.prompts), []
    if asked:
        tiles.append(
            Tile("Prompts as asked", f"{passed(asked)} of {len(asked)}", f"base model: {passed_by_base(asked)}")
        )
    if r := result.refusals:
        rates = f"{r.refusal_rate_tuned:.0%}", f"base model: {r.refusal_rate_base:.0%}"
        tiles.append(Tile("Harmful or unanswerable declined", *rates))
        rates = f"{r.over_refusal_rate_tuned:.0%}", f"base model: {r.over_refusal_rate_base:.0%}"
        tiles.append(Tile("Harmless declined", *rates))
    if m := result.middles:
        tiles.append(Tile("Exact middles of code", f"{m.exact_tuned:.0%}", f"base model: {m.exact_base:.0%}"))
    if e := result.evaluation:
        tiles.append(Tile("Evaluation loss", f"{e.loss_tuned:.3f}", f"base model: {e.loss_base:.3f}"))
        if e.perplexity_base is not None:
            tiles.append(Tile("Perplexity", f"{e.perplexity_tuned:.3g}", f"base model: {e.perplexity_base:.3g}"))
        if p := e.preference:
            before, after = f"{p.accuracy_base:.0%}", f"{p.accuracy_tuned:.0%}"
            tiles.append(Tile("Chosen answer likelier", after, f"base model: {before}"))
    speed = f"{done.mfu:.0%} of peak (MFU)" if done.mfu is not None else f"{count(done.tokens)} tokens in all"
    tiles.append(Tile("Tokens per second", f"{done.tokens_per_second:,.0f}", speed))
    workers = f"{done.world_size} × {done.device.upper() if done.device == 'cpu' else done.device}"
    tiles.append(Tile("Wall time", clock(sum(result.stages.values())), workers))
    if result.cost:
        hours = f"{result.cost.hours:.2f} h at {result.cost.price_per_hour:g}"
        tiles.append(Tile("Cost", f"{result.cost.amount:.2f} {result.cost.currency}", hours))
    else:
        tiles.append(Tile("Cost", "—", "no price given"))
    return tiles


def _compared(result: Result) -> dict[str, Any] | None:
    """The comparison's table and what stands around it."""
    if (found := result.comparison) is None:
        return None
    return {
        "sentence": found.sentence,
        "columns": compared.columns(found),
        "rows": compared.rows(result, found),
        "notes": compared.notes(found),
    }


def topics(prompts: Iterable[PromptResult]) -> list[Topic]:
    """Prompts by topic, in the order in which topics first come up."""
    found: dict[str | None, list[PromptResult]] = {}
    for prompt in prompts:
        found.setdefault(prompt.topic, []).append(prompt)
    rest = "Other prompts" if len(found) > 1 else "Prompts"
    return [Topic(name or rest, group) for name, group in found.items()]


def shares(seconds: dict[str, float]) -> list[Share]:
    """Stages that took time, with their share of all of it."""
    total = sum(seconds.values()) or 1.0
    return [Share(name, s, 100 * s / total) for name, s in seconds.items() if s > 0]


def _charts(result: Result, curves: Curves) -> dict[str, Markup]:
    lengths: Sequence[dict[str, Any]] = result.data["lengths"]
    drawn = {
        "loss_wide": charts.loss_chart(curves, wide=True),
        "loss_narrow": charts.loss_chart(curves, wide=False),
        "learning_rate": charts.learning_rate_chart(curves),
        "gradient_norm": charts.gradient_norm_chart(curves),
        "throughput": charts.throughput_chart(curves),
        "parts": charts.parts_chart(curves),
        "lengths": charts.length_chart(lengths),
    }
    return {name: Markup(svg) for name, svg in drawn.items()}
