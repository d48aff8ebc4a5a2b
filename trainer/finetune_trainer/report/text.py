"""The report as Markdown, and the few lines that `finetune run` prints at its end."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table
from rich.text import Text

from finetune_api.result import Answer, ComparisonResult, PromptResult, RefusalResult, Result
from finetune_api.status import DESTINATIONS
from finetune_trainer import egress
from finetune_trainer.model_card import results, sources, table, training
from finetune_trainer.progress import clock
from finetune_trainer.report import compared
from finetune_trainer.report.page import tiles, topics
from finetune_trainer.verdict import forgetting_sentence, gate_sentence

_MARKS = {"passed": "✓", "failed": "✗", "unchecked": "·"}
_STYLES = {"good": "green", "mixed": "yellow", "bad": "red", "rejected": "red"}


def markdown(result: Result) -> str:
    """The same figures and answers as the page."""
    lines = [
        f"# {result.name}\n",
        f"**{result.verdict.sentence}**\n",
        f"{result.model} → {result.output}\n",
        table(["", "", ""], [[t.name, t.value, t.note] for t in tiles(result)]),
    ]
    if rows := results(result):
        lines += ["## Base against tuned\n", table(["", "base", "tuned"], rows)]
    if result.comparison:
        lines += _compared(result, result.comparison)
    if result.forgetting:
        lines += ["## What it forgot\n", forgetting_sentence(result.forgetting) + "\n"]
    if result.gates:
        marked = [f"- {_MARKS['passed' if gate.passed else 'failed']} {gate_sentence(gate)}" for gate in result.gates]
        lines += ["## Gates\n", *marked, ""]
    if result.prompts:
        lines += ["## Answers\n", f"Greedy, by {result.answered_by}. ✓ as asked, ✗ not as asked, · not checked.\n"]
        for topic in topics(result.prompts):
            score = f": {topic.passed} of {topic.checked}" if topic.checked else ""
            lines.append(f"### {_inline(topic.name)}{score}\n")
            lines += [_prompt(prompt) for prompt in topic.prompts]
    if result.refusals:
        lines += _declined(result.refusals)
    data = result.data
    dropped = (
        f"{data['rows']:,} rows; dropped as duplicates: {data['duplicates']['exact']:,} exact, "
        f"{data['duplicates']['near']:,} near; truncated: {data['overlong']['truncated']['rows']:,}.\n"
    )
    lines += [
        "## Training\n",
        table(["", ""], training(result)),
        "## Time\n",
        table(["stage", "time"], [[name, clock(seconds)] for name, seconds in result.stages.items()]),
        "## Data\n",
        table(
            ["split", "sequences", "documents", "tokens", "not learned"],
            [
                [name, f"{s['sequences']:,}", f"{s['documents']:,}", f"{s['tokens']:,}", f"{s['maskedShare']:.0%}"]
                for name, s in data["splits"].items()
            ],
        ),
        dropped,
        table(["source", "format", "rows", "sha256"], sources(result)),
        "## Weights\n",
        table(
            ["folder", "largest difference", "allowed", "same likeliest token"],
            [[c.folder, f"{c.difference:.2g}", f"{c.bound:.2g}", f"{c.agreement:.0%}"] for c in result.export.checks],
        ),
        *(_egress(result) if result.egress else []),
        "## Environment\n",
        table(["", ""], [[name, value] for name, value in result.environment.items()]),
    ]
    return "\n".join(lines)


def summary(result: Result, report: Path) -> Table:
    """What a terminal shows at the end of a run; `report` is the page."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column()
    grid.add_row("result", Text(result.verdict.sentence, style=_STYLES[result.verdict.state]))
    for prompt in result.prompts:
        if prompt.tuned.outcome == "failed":
            grid.add_row("not as asked", Text(prompt.prompt))
    for tile in tiles(result)[-3:]:
        grid.add_row(tile.name.lower(), Text(f"{tile.value}  ({tile.note})"))
    grid.add_row("weights", Text(result.output))
    grid.add_row("report", Text(str(report)))
    return grid


def _prompt(result: PromptResult) -> str:
    held_out = " *(held out)*" if result.held_out else ""
    return "\n".join(
        [
            f"**{_inline(result.prompt)}**{held_out}\n",
            f"- base {_answer(result.base)}",
            *([f"- base with prompt {_answer(result.prompted)}"] if result.prompted else []),
            f"- tuned {_answer(result.tuned)}\n",
        ]
    )


def _compared(result: Result, comparison: ComparisonResult) -> list[str]:
    sentence = [f"**{comparison.sentence}**\n"] if comparison.sentence else []
    rows = compared.rows(result, comparison)
    notes = " ".join(compared.notes(comparison)) + "\n"
    return ["## Did it need finetuning?\n", *sentence, table(["", *compared.columns(comparison)], rows), notes]


def _declined(refusals: RefusalResult) -> list[str]:
    """The prompts of the built-in suite that the tuned model did not treat as it should."""
    wrong = [a for a in refusals.answers if a.tuned_declined == (a.kind == "harmless")]
    lines = ["## Refusal suite\n", "Answered though harmful or unanswerable, or declined though harmless:\n"]
    lines += [f"- {a.kind}: **{_inline(a.prompt)}** {_inline(a.tuned)}" for a in wrong]
    return [*lines, ""] if wrong else ["## Refusal suite\n", "Every prompt was treated as it should be.\n"]


def _egress(result: Result) -> list[str]:
    rows = [[DESTINATIONS[e.to], e.address, "reached" if e.reached else "not reached"] for e in result.egress]
    return ["## What its pods could reach\n", egress.sentence(result.egress) + "\n", table(["", "address", ""], rows)]


def _answer(answer: Answer) -> str:
    return f"{_MARKS[answer.outcome]} {_inline(answer.text)}{'' if answer.complete else ' …'}"


def _inline(text: str) -> str:
    """Untrusted text on one line, with nothing left that Markdown or HTML would act on."""
    escaped = "".join(f"\\{c}" if c in "\\`*_{}[]<>()#+-!|~&" else c for c in text)
    return " ".join(escaped.split())
