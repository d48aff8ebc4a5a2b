"""What both models are asked at the end: the job's prompts, the refusal suite, held-out middles and questions.

All in one go, since each model is loaded for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune_api.job import Prompt
from finetune_api.result import MiddlesResult, PromptResult, RefusalResult, RetrievalResult
from finetune_api.run import PREPARED, RunConfig
from finetune_trainer.answers import Question, Said, Speaker, ask, compared
from finetune_trainer.manifest import read_manifest
from finetune_trainer.middles import SLACK_TOKENS, held_out_middles, measure_middles
from finetune_trainer.refusals import SUITE_TOKENS, measure_refusals, suite
from finetune_trainer.retrieval import held_out_questions, measure_retrieval
from finetune_trainer.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Findings:
    """What came out, beside the evaluation loss; None for what was not asked."""

    prompts: list[PromptResult]
    refusals: RefusalResult | None
    middles: MiddlesResult | None
    retrieval: RetrievalResult | None


def examine(run: RunConfig, tuned: Path, waiting: Callable[[], None]) -> Findings:
    """Asks the base model and the one in the folder `tuned`.

    Args:
        waiting: called about once a second meanwhile; what it raises ends the work.

    Raises:
        ExportError: a model does not load or answer.
    """
    base, prepared, evaluation = Path(run.model_path), Path(run.work) / PREPARED, run.spec.evaluation
    manifest, most = read_manifest(prepared), evaluation.max_new_tokens
    formats = {source.format for source in manifest.sources} if manifest.splits.evaluation.sequences else set()
    middles = held_out_middles(prepared, load_tokenizer(base), most) if "code" in formats else []
    held_out = held_out_questions(prepared, load_tokenizer(base), most) if "rag" in formats else []
    groups = [
        [Question(prompt, most) for prompt in evaluation.prompts],
        [Question(Prompt(prompt=p), SUITE_TOKENS) for _, p in suite()] if evaluation.refusal_suite else [],
        [Question(middle.prompt, middle.tokens + SLACK_TOKENS) for middle in middles],
        [Question(asked.prompt, most) for asked in held_out],
        [Question(Prompt(prompt=asked.question), most) for asked in held_out],
    ]
    ends = [*manifest.tokenizer.end_of_turn_token_ids]
    if middles and manifest.tokenizer.eos_token_id is not None:
        ends.append(manifest.tokenizer.eos_token_id)  # what ends a middle, also where a chat's turn ends otherwise
    both = ask(
        Speaker(base, base),
        Speaker(tuned, base),
        [question for group in groups for question in group],
        stop_tokens=ends,
        gpu=run.spec.workers.gpus_each > 0,
        waiting=waiting,
    )
    prompts, tests, gaps, given, alone = _groups(both, [len(group) for group in groups])
    return Findings(
        prompts=compared(evaluation.prompts, *prompts),
        refusals=measure_refusals(*_texts(tests)) if evaluation.refusal_suite else None,
        middles=measure_middles(middles, *_texts(gaps)) if middles else None,
        retrieval=measure_retrieval(held_out, _texts(given), _texts(alone)) if held_out else None,
    )


Both = tuple[list[Said], list[Said]]  # the base model's answers and the tuned model's


def _groups(both: Both, sizes: Sequence[int]) -> list[Both]:
    """Answers to groups of questions that were asked one group after the other."""
    groups, start = [], 0
    for size in sizes:
        groups.append((both[0][start : start + size], both[1][start : start + size]))
        start += size
    return groups


def _texts(both: Both) -> tuple[list[str], list[str]]:
    return [said.text for said in both[0]], [said.text for said in both[1]]
