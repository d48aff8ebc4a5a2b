"""Did it need finetuning? The base model, the base model behind a prompt, and the tuned one, and what follows.

Pure: it must say so when a prompt would have done.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from finetune_api.job_evaluation import TokenPrices
from finetune_api.result import Answer, ComparisonResult, Contender, Requests

Needed = Literal["yes", "no", "unclear"]
_SHARE: Final = 0.05  # a smaller difference of shares, or of the loss relative to it, decides nothing


@dataclass(frozen=True)
class Prices:
    """What serving costs: an hour of the one worker that answers, and tokens. None: not known."""

    worker_hour: float | None = None
    tokens: TokenPrices | None = None


def contender(
    answers: Sequence[Answer], loss: float | None, rates: tuple[float, float] | None, prices: Prices
) -> Contender:
    """What was measured of one model.

    Args:
        answers: to the job's prompts.
        loss: on the held-out answers.
        rates: refusal and over-refusal rate.
    """
    checked = [answer for answer in answers if answer.outcome != "unchecked"]
    return Contender(
        passed=sum(answer.outcome == "passed" for answer in checked) if checked else None,
        loss=loss,
        refusal_rate=rates[0] if rates else None,
        over_refusal_rate=rates[1] if rates else None,
        requests=_average(answers, prices) if answers else None,
    )


def compare(
    base: Contender,
    prompted: Contender | None,
    tuned: Contender,
    *,
    checked: int,
    examples: int,
    system: bool,
    held_out_answers: int,
) -> ComparisonResult:
    """The three side by side, and what follows. The arguments are ComparisonResult's fields."""
    result = ComparisonResult(
        base=base,
        prompted=prompted,
        tuned=tuned,
        checked=checked,
        examples=examples,
        system=system,
        held_out_answers=held_out_answers,
        needed=_needed(prompted, tuned, checked),
        sentence="",
    )
    return result.model_copy(update={"sentence": _sentence(result)})


def _needed(prompted: Contender | None, tuned: Contender, checked: int) -> Needed | None:
    """Whether the tuned model is better than the prompted one: by prompts, else by refusals, else by loss.

    One prompt, or a twentieth of them, is too little to tell; so are 5 % of the others.
    """
    if prompted is None:
        return None
    if tuned.passed is not None and prompted.passed is not None:
        more, enough = float(tuned.passed - prompted.passed), max(2.0, _SHARE * checked)
    elif (right := _declines_right(tuned)) is not None and (other := _declines_right(prompted)) is not None:
        more, enough = right - other, _SHARE
    elif tuned.loss is not None and prompted.loss is not None:
        more, enough = prompted.loss - tuned.loss, _SHARE * prompted.loss
    else:
        return None
    return "no" if more <= 0 else "yes" if more >= enough else "unclear"


def _sentence(result: ComparisonResult) -> str:
    """The answer for people: what was compared, how it came out, and what a request takes; empty without an answer."""
    base, prompted, tuned = result.base, result.prompted, result.tuned
    if prompted is None or result.needed is None:
        return ""
    opening = {"yes": "Finetuning was worth it", "no": "A prompt would have done", "unclear": "It hardly matters"}
    parts = ["a system message"] if result.system else []
    if result.examples:
        parts.append(f"{result.examples} examples" if result.examples > 1 else "an example")
    what = f"the base model with {' and '.join(parts)} in its prompt"
    if tuned.passed is not None:
        how = (
            f"the tuned model answers {tuned.passed} of {result.checked} prompts as asked, {what} {prompted.passed} "
            f"(without: {base.passed})"
        )
    elif tuned.refusal_rate is not None:
        how = f"the tuned model declines {_rates(tuned)}, {what} {_rates(prompted)}"
    else:
        how = f"on held-out answers the tuned model has a loss of {tuned.loss:.3f}, {what} {prompted.loss:.3f}"
    text = f"{opening[result.needed]}: {how}"
    if prompted.requests and tuned.requests:
        ratio = _tokens(prompted.requests) / _tokens(tuned.requests)
        text += f", at {ratio:.1f} times the tokens per request"
    return text + "."


def _average(answers: Sequence[Answer], prices: Prices) -> Requests:
    """What the mean of these answers takes."""
    count = len(answers)
    prompt, said = sum(a.prompt_tokens for a in answers) / count, sum(a.tokens for a in answers) / count
    seconds = sum(a.seconds for a in answers) / count
    hour, tokens = prices.worker_hour, prices.tokens
    return Requests(
        prompt_tokens=prompt,
        answer_tokens=said,
        cut=sum(not a.complete for a in answers),
        seconds=seconds,
        cost_by_time=None if hour is None else 1000 * seconds / 3600 * hour,
        cost_by_tokens=None if tokens is None else (prompt * tokens.prompt + said * tokens.answer) / 1000,
    )


def _declines_right(model: Contender) -> float | None:
    """What it declines of what it should, less what it declines of what it should not."""
    if model.refusal_rate is None or model.over_refusal_rate is None:
        return None
    return model.refusal_rate - model.over_refusal_rate


def _rates(model: Contender) -> str:
    return f"{model.refusal_rate:.0%} of what it should and {model.over_refusal_rate:.0%} of what it should not"


def _tokens(requests: Requests) -> float:
    return requests.prompt_tokens + requests.answer_tokens
