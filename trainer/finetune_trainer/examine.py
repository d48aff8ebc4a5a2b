"""What both models are asked at the end: the job's prompts, the refusal suite, held-out middles and questions.

All in one go, since each model is loaded for it. The base model is asked the prompts and the suite a second time,
behind evaluation.promptBaseline.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from finetune_api.job_evaluation import Prompt
from finetune_api.result import (
    ComparisonResult,
    ForgettingResult,
    MiddlesResult,
    PromptResult,
    RefusalResult,
    RetrievalResult,
)
from finetune_api.run import PREPARED, RunConfig
from finetune_trainer.answers import ask, compared
from finetune_trainer.comparison import Prices, compare, contender
from finetune_trainer.forgetting import general_passages, measure_forgetting
from finetune_trainer.manifest import Manifest, read_manifest
from finetune_trainer.middles import SLACK_TOKENS, Middle, held_out_middles, measure_middles
from finetune_trainer.prompting import Exchange, behind, held_out_answers, plain, preface
from finetune_trainer.refusals import SUITE_TOKENS, measure_refusals, suite
from finetune_trainer.retrieval import HeldOut, held_out_questions, measure_retrieval
from finetune_trainer.speaking import Passage, Question, Said, Speaker, Task, Told, Turn
from finetune_trainer.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Findings:
    """What came out, beside the evaluation loss; None for what was not asked."""

    prompts: list[PromptResult]
    refusals: RefusalResult | None = None
    middles: MiddlesResult | None = None
    retrieval: RetrievalResult | None = None
    comparison: ComparisonResult | None = None
    forgetting: ForgettingResult | None = None


@dataclass(frozen=True)
class _Plan:
    """What is asked, before it is."""

    prompts: list[Prompt]
    suite: bool
    middles: list[Middle]
    held_out: list[HeldOut]
    before: tuple[Turn, ...]
    answers: list[Exchange]
    general: list[Passage]
    behind: list[Passage] = field(default_factory=list)  # `answers` behind `before`

    def asked(self, most: int, before: tuple[Turn, ...] = ()) -> list[Question]:
        """The job's prompts."""
        return [Question(prompt, most, before) for prompt in self.prompts]

    def tests(self, before: tuple[Turn, ...] = ()) -> list[Question]:
        """The refusal suite."""
        suites = suite() if self.suite else []
        return [Question(Prompt(prompt=text), SUITE_TOKENS, before, batched=True) for _, text in suites]

    def others(self, most: int) -> list[Question]:
        """Held-out middles of code, and held-out questions with their passages and alone."""
        return [
            *(Question(middle.prompt, middle.tokens + SLACK_TOKENS) for middle in self.middles),
            *(Question(asked.prompt, most) for asked in self.held_out),
            *(Question(Prompt(prompt=asked.question), most) for asked in self.held_out),
        ]


def examine(run: RunConfig, tuned: Path, waiting: Callable[[], None], worker_hour: float | None = None) -> Findings:
    """Asks the base model and the one in the folder `tuned`.

    Args:
        waiting: called about once a second meanwhile; what it raises ends the work.
        worker_hour: what an hour of one worker costs, if that is known.

    Raises:
        ExportError: a model does not load or answer.
    """
    base, evaluation = Path(run.model_path), run.spec.evaluation
    manifest = read_manifest(Path(run.work) / PREPARED)
    plan, most = _plan(run, manifest, load_tokenizer(base)), evaluation.max_new_tokens
    texts = [*plan.general, *plain(plan.answers)]
    rest = [*plan.tests(), *plan.others(most)]
    # The prompts of all three come first, so that their times are taken while both processes are at work.
    prompted, tests = (plan.asked(most, plan.before), plan.tests(plan.before)) if plan.before else ([], [])
    ends = [*manifest.tokenizer.end_of_turn_token_ids]
    if plan.middles and manifest.tokenizer.eos_token_id is not None:
        ends.append(manifest.tokenizer.eos_token_id)  # what ends a middle, also where a chat's turn ends otherwise
    of_base, of_tuned = ask(
        (Speaker(base, base), Task([*plan.asked(most), *prompted, *rest, *tests], [*texts, *plan.behind])),
        (Speaker(tuned, base), Task([*plan.asked(most), *rest], texts)),
        stop_tokens=ends,
        gpu=run.spec.workers.gpus_each > 0,
        waiting=waiting,
    )
    return _findings(plan, of_base, of_tuned, Prices(worker_hour, evaluation.token_prices))


def _plan(run: RunConfig, manifest: Manifest, tokenizer: PreTrainedTokenizerBase) -> _Plan:
    prepared, evaluation = Path(run.work) / PREPARED, run.spec.evaluation
    most = evaluation.max_new_tokens
    formats = {source.format for source in manifest.sources} if manifest.splits.evaluation.sequences else set()
    answers = held_out_answers(run, tokenizer)
    asked = bool(evaluation.prompts or evaluation.refusal_suite or answers)
    before = preface(run, tokenizer) if asked else ()
    return _Plan(
        prompts=evaluation.prompts,
        suite=evaluation.refusal_suite,
        middles=held_out_middles(prepared, tokenizer, most) if "code" in formats else [],
        held_out=held_out_questions(prepared, tokenizer, most) if "rag" in formats else [],
        before=before,
        answers=answers if before else [],
        general=general_passages(tokenizer) if evaluation.general_text else [],
        behind=behind(before, answers, tokenizer) if before else [],
    )


def _findings(plan: _Plan, of_base: Told, of_tuned: Told, prices: Prices) -> Findings:
    base, tuned = _Answers(of_base.said), _Answers(of_tuned.said)
    suites, middles, held_out = len(suite()) if plan.suite else 0, len(plan.middles), len(plan.held_out)
    said, said_tuned = base.take(len(plan.prompts)), tuned.take(len(plan.prompts))
    prompted = base.take(len(plan.prompts)) if plan.before else None
    tests, gaps = ((base.take(count), tuned.take(count)) for count in (suites, middles))
    given, alone = ((base.take(held_out), tuned.take(held_out)) for _ in range(2))
    prompted_tests = base.take(suites) if plan.before else []
    refusals = measure_refusals(*_texts(tests)) if suites else None
    against = measure_refusals(*_texts((tests[0], prompted_tests))) if prompted_tests else None
    prompts = compared(plan.prompts, said, said_tuned, prompted)
    general = len(plan.general)
    return Findings(
        prompts=prompts,
        refusals=refusals,
        middles=measure_middles(plan.middles, *_texts(gaps)) if middles else None,
        retrieval=measure_retrieval(plan.held_out, _texts(given), _texts(alone)) if held_out else None,
        comparison=_comparison(plan, prompts, refusals, against, of_base.nll[general:], of_tuned.nll[general:], prices),
        forgetting=measure_forgetting(plan.general, of_base.nll[:general], of_tuned.nll[:general]) if general else None,
    )


def _comparison(
    plan: _Plan,
    prompts: Sequence[PromptResult],
    refusals: RefusalResult | None,
    against: RefusalResult | None,
    nll_base: Sequence[float],
    nll_tuned: Sequence[float],
    prices: Prices,
) -> ComparisonResult | None:
    """The three models; `against` has the prompted base model in the tuned one's place."""
    if not (prompts or plan.before):
        return None
    count = len(plan.answers)
    weights = sum(sum(row.weights) for row in plan.answers)

    def loss(nll: Sequence[float]) -> float | None:
        return sum(nll) / weights if count else None

    base = contender(
        [p.base for p in prompts],
        loss(nll_base[:count]),
        (refusals.refusal_rate_base, refusals.over_refusal_rate_base) if refusals else None,
        prices,
    )
    tuned = contender(
        [p.tuned for p in prompts],
        loss(nll_tuned),
        (refusals.refusal_rate_tuned, refusals.over_refusal_rate_tuned) if refusals else None,
        prices,
    )
    prompted = contender(
        [p.prompted for p in prompts if p.prompted],
        loss(nll_base[count:]),
        (against.refusal_rate_tuned, against.over_refusal_rate_tuned) if against else None,
        prices,
    )
    return compare(
        base,
        prompted if plan.before else None,
        tuned,
        checked=sum(p.tuned.outcome != "unchecked" for p in prompts),
        examples=sum(turn["role"] == "assistant" for turn in plan.before),
        system=any(turn["role"] == "system" for turn in plan.before),
        held_out_answers=count,
    )


class _Answers:
    """A model's answers, taken off in the order of its questions."""

    def __init__(self, said: Sequence[Said]) -> None:
        self._rest: Iterator[Said] = iter(said)

    def take(self, count: int) -> list[Said]:
        return [next(self._rest) for _ in range(count)]


Both = tuple[list[Said], list[Said]]  # the base model's answers and the tuned model's


def _texts(both: Both) -> tuple[list[str], list[str]]:
    return [said.text for said in both[0]], [said.text for said in both[1]]
