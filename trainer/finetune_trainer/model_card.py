"""The README.md beside the weights: where they come from, how good they are, how to load them. Never a row's text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from finetune_api.result import Result
from finetune_trainer.verdict import checked, passed, passed_by_base

_LOAD_MODEL = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
"""
_LOAD_ADAPTER = """\
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
"""


def model_card(result: Result, folder: str) -> str:
    """The card of one published folder: model, adapter or merged."""
    adapter = folder == "adapter"
    base, revision = base_model(result.settings["model"]["source"])
    method = result.settings["method"]
    front: dict[str, Any] = {
        "base_model": base,
        **({"base_model_revision": revision} if revision else {}),
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["finetune", method["objective"], *(["lora"] if method["tuning"] == "lora" else [])],
    }
    what = {"model": "Every weight was tuned", "adapter": "A LoRA adapter", "merged": "A LoRA adapter, merged in"}
    snippet = (_LOAD_ADAPTER if adapter else _LOAD_MODEL).format(folder=folder, base=base)
    return "\n".join(
        [
            f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n",
            f"# {result.name}\n",
            f"{what[folder]}; base model: {base}. {result.verdict.sentence}\n",
            f"```python\n{snippet}```\n",
            "## Results\n",
            table(["", "base", "tuned"], results(result)),
            "## Training\n",
            table(["", ""], training(result)),
            "## Data\n",
            table(["source", "format", "rows", "sha256"], sources(result)),
            f"{result.export.dtype} weights, loaded again; they gave the same logits as the trained model.\n",
        ]
    )


def base_model(source: str) -> tuple[str, str | None]:
    """Name and revision of the base model as the hub knows it; for a folder or a bucket what `public` gives."""
    if source.startswith("hf://"):
        name, _, revision = source.removeprefix("hf://").partition("@")
        return name, revision or None
    return public(source), None


def public(uri: str) -> str:
    """A URI that may be shown to others: of an absolute path on this machine only the last part."""
    path = Path(uri.removeprefix("file://"))
    return path.name if path.is_absolute() else uri


def results(result: Result) -> list[list[str]]:
    """Base against tuned: losses, prompts and exams."""
    rows = []
    if e := result.evaluation:
        rows.append(["evaluation loss", f"{e.loss_base:.4f}", f"{e.loss_tuned:.4f}"])
        if e.perplexity_base is not None:
            rows.append(["perplexity", f"{e.perplexity_base:.4g}", f"{e.perplexity_tuned:.4g}"])
        if p := e.preference:
            rows.append(
                [f"chosen answer likelier, of {p.pairs} pairs", f"{p.accuracy_base:.0%}", f"{p.accuracy_tuned:.0%}"]
            )
            rows.append(["reward margin", "0", f"{p.reward_margin:.3g}"])
    if asked := checked(result.prompts):
        of = len(asked)
        rows.append(["prompts as asked", f"{passed_by_base(asked)} of {of}", f"{passed(asked)} of {of}"])
    if f := result.forgetting:
        rows.append(["perplexity on general text", f"{f.perplexity_base:.4g}", f"{f.perplexity_tuned:.4g}"])
    return rows + exams(result)


def exams(result: Result) -> list[list[str]]:
    """Base against tuned: the refusal suite, held-out middles of code, held-out questions with their passages."""
    rows = []
    if refusals := result.refusals:
        rows += [[f"{k.kind} prompts declined, of {k.prompts}", str(k.base), str(k.tuned)] for k in refusals.kinds]
    if m := result.middles:
        rows.append([f"exact middles of code, of {m.middles}", f"{m.exact_base:.1%}", f"{m.exact_tuned:.1%}"])
        rows.append(["edit similarity of middles", f"{m.similarity_base:.3f}", f"{m.similarity_tuned:.3f}"])
    if r := result.retrieval:
        before, after = r.base, r.tuned
        rows += [
            [f"held-out questions, word F1 with passages, of {r.questions}",
             f"{before.with_passages:.3f}", f"{after.with_passages:.3f}"],
            ["the same without passages", f"{before.without_passages:.3f}", f"{after.without_passages:.3f}"],
            ["the right passages cited", f"{before.cited:.0%}", f"{after.cited:.0%}"],
        ]  # fmt: skip
    return rows


def training(result: Result) -> list[list[str]]:
    """Hyperparameters that a reader looks for."""
    asked, done = result.settings["training"], result.training
    method = result.settings["method"]
    rows = [
        ["tuning", method["tuning"]],
        ["steps", str(done.steps)],
        ["epochs", f"{done.epochs:.3g}"],
        ["tokens", f"{done.tokens:,}"],
        ["trained weights", f"{done.trainable_parameters:,} of {done.parameters:,}"],
        ["learning rate", f"{asked['learningRate']:g}, {asked['schedule']}"],
        ["precision", asked["precision"]],
        ["seed", str(asked["seed"])],
        ["data key", result.manifest["key"]],
    ]
    if method["tuning"] == "lora":
        rows.insert(1, ["rank, alpha", f"{method['lora']['rank']}, {method['lora']['alpha']:g}"])
    return rows


def sources(result: Result) -> list[list[str]]:
    """Files of rows with their hashes."""
    return [[public(s["uri"]), s["format"], f"{s['rows']:,}", s["sha256"]] for s in result.manifest["sources"]]


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; what stands in a cell cannot end it."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"
