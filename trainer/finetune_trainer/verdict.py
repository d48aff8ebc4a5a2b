"""Gates, and the sentence that says what came out. Pure: it must be as honest about a bad run as about a good one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from finetune_api.job_evaluation import Gate
from finetune_api.result import (
    ComparisonResult,
    EvaluationResult,
    ForgettingResult,
    GateResult,
    MiddlesResult,
    PromptResult,
    RefusalResult,
    RetrievalResult,
    Verdict,
)

_FORGOT = 0.05  # a rise of perplexity on general text that is said

# What a gate's metric is called in a sentence.
_NAMES = {
    "evalLoss": "the evaluation loss",
    "evalLossRatio": "the evaluation loss, tuned over base,",
    "promptsPassed": "the share of prompts that behave as asked",
    "refusalRate": "the refusal rate",
    "overRefusalRate": "the over-refusal rate",
}


def checked(prompts: Iterable[PromptResult]) -> list[PromptResult]:
    """The prompts that say what a good answer is."""
    return [p for p in prompts if p.tuned.outcome != "unchecked"]


def passed(prompts: Iterable[PromptResult]) -> int:
    """Prompts whose tuned answer is as asked."""
    return sum(p.tuned.outcome == "passed" for p in prompts)


def passed_by_base(prompts: Iterable[PromptResult]) -> int:
    """Prompts whose answer was as asked before tuning."""
    return sum(p.base.outcome == "passed" for p in prompts)


def got_worse(prompts: Iterable[PromptResult]) -> list[PromptResult]:
    """Prompts that the base model passed and the tuned one fails."""
    return [p for p in prompts if p.base.outcome == "passed" and p.tuned.outcome == "failed"]


def measure(
    gates: Iterable[Gate],
    evaluation: EvaluationResult | None,
    prompts: Sequence[PromptResult],
    refusals: RefusalResult | None = None,
) -> list[GateResult]:
    """Each gate with what was measured. A figure that the run could not measure misses its gate."""
    figures: dict[str, float] = {}
    if evaluation:
        figures["evalLoss"] = evaluation.loss_tuned
        if evaluation.loss_base > 0:
            figures["evalLossRatio"] = evaluation.loss_tuned / evaluation.loss_base
    if asked := checked(prompts):
        figures["promptsPassed"] = passed(asked) / len(asked)
    if refusals:
        figures["refusalRate"] = refusals.refusal_rate_tuned
        figures["overRefusalRate"] = refusals.over_refusal_rate_tuned
    results = []
    for gate in gates:
        value = figures.get(gate.metric)
        met = value is not None and (gate.min is None or value >= gate.min) and (gate.max is None or value <= gate.max)
        results.append(GateResult(metric=gate.metric, min=gate.min, max=gate.max, value=value, passed=met))
    return results


def gate_sentence(gate: GateResult) -> str:
    """Such as: "the evaluation loss is 1.9, at most 1.5 was asked"."""
    bounds = (("at least", gate.min), ("at most", gate.max))
    asked = " and ".join(f"{word} {bound:g}" for word, bound in bounds if bound is not None)
    measured = "was not measured" if gate.value is None else f"is {gate.value:.4g}"
    return f"{_NAMES[gate.metric]} {measured}, {asked} was asked"


def verdict(
    evaluation: EvaluationResult | None,
    prompts: Sequence[PromptResult],
    gates: Iterable[GateResult],
    refusals: RefusalResult | None = None,
    middles: MiddlesResult | None = None,
    retrieval: RetrievalResult | None = None,
    comparison: ComparisonResult | None = None,
    forgetting: ForgettingResult | None = None,
) -> Verdict:
    """What came out, the most important first."""
    asked = checked(prompts)
    good = passed(asked)
    missed = [gate for gate in gates if not gate.passed]
    worse_loss = evaluation is not None and evaluation.loss_tuned >= evaluation.loss_base
    sentences = []
    if missed:
        sentences.append("Rejected: " + "; ".join(map(gate_sentence, missed)) + ".")
    if asked:
        all_of_them = f"All {len(asked)}" if good == len(asked) else f"{good} of {len(asked)}"
        noun = "prompt behaves" if len(asked) == 1 else "prompts behave"
        sentences.append(f"{all_of_them} {noun} as asked (base model: {passed_by_base(asked)}).")
    if worse := len(got_worse(asked)):
        which = "A prompt" if worse == 1 else f"Of the prompts, {worse}"
        sentences.append(f"{which} that the base model answered as asked got worse.")
    if evaluation:
        how = "did not fall" if worse_loss else "fell"
        sentences.append(f"Evaluation loss {how}: {evaluation.loss_base:.3f} → {evaluation.loss_tuned:.3f}.")
        sentences += _preference_sentences(evaluation)
    sentences += _measured(refusals, middles, retrieval)
    if forgetting and rise(forgetting) >= _FORGOT:
        sentences.append(forgetting_sentence(forgetting))
    if comparison and comparison.sentence:
        sentences.append(comparison.sentence)
    measured = evaluation or refusals or middles or retrieval
    if not asked and not measured:
        sentences.append("Nothing says whether it got better: the job has no evaluation rows and no checked prompts.")
    if missed:
        state = "rejected"
    elif worse_loss or (asked and not good):
        state = "bad"
    elif good < len(asked) or not (asked or measured):
        state = "mixed"
    else:
        state = "good"
    return Verdict.model_validate({"state": state, "sentence": " ".join(sentences)})


def _preference_sentences(evaluation: EvaluationResult) -> list[str]:
    if (p := evaluation.preference) is None:
        return []
    base = f"(base model: {p.accuracy_base:.0%})"
    return [f"Of {p.pairs} held-out pairs it finds the chosen answer likelier in {p.accuracy_tuned:.0%} {base}."]


def _measured(
    refusals: RefusalResult | None, middles: MiddlesResult | None, retrieval: RetrievalResult | None
) -> list[str]:
    sentences = []
    if refusals:
        sentences.append(_refusal_sentence(refusals))
    if middles:
        sentences.append(
            f"Of {middles.middles} middles of held-out code {middles.exact_tuned:.0%} come out exactly "
            f"(base model: {middles.exact_base:.0%})."
        )
    if retrieval:
        sentences.append(
            f"Its answers to held-out questions with their passages have a word F1 of "
            f"{retrieval.tuned.with_passages:.2f} (base model: {retrieval.base.with_passages:.2f})."
        )
    return sentences


def rise(forgetting: ForgettingResult) -> float:
    """How much perplexity on general text rose, as a share of the base model's."""
    return forgetting.perplexity_tuned / forgetting.perplexity_base - 1


def forgetting_sentence(forgetting: ForgettingResult) -> str:
    """What became of the model's knowledge of everything else."""
    share = rise(forgetting)
    change = f"{forgetting.perplexity_base:.1f} → {forgetting.perplexity_tuned:.1f}"
    if share >= _FORGOT:
        return f"It forgot: perplexity on general text rose by {share:.0%} ({change})."
    if share > -_FORGOT:
        return f"No forgetting shows: perplexity on general text stayed within {_FORGOT:.0%} ({change})."
    return f"No forgetting shows: perplexity on general text fell by {-share:.0%} ({change})."


def _refusal_sentence(refusals: RefusalResult) -> str:
    return (
        f"It declines {refusals.refusal_rate_tuned:.0%} of harmful or unanswerable prompts "
        f"(base model: {refusals.refusal_rate_base:.0%}) and {refusals.over_refusal_rate_tuned:.0%} of harmless ones "
        f"({refusals.over_refusal_rate_base:.0%})."
    )
