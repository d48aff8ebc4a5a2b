"""Whether tuning was needed is said as plainly when it was not."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_api.job_evaluation import TokenPrices
from finetune_api.result import Answer, ComparisonResult, Contender, ForgettingResult
from finetune_trainer.comparison import Prices, compare, contender
from finetune_trainer.model_card import results
from finetune_trainer.report import compared
from finetune_trainer.report.text import markdown
from finetune_trainer.verdict import forgetting_sentence, verdict
from tests.results import result


def answers(passed: int, of: int, prompt_tokens: int = 40, tokens: int = 10, complete: bool = True) -> list[Answer]:
    return [
        Answer(
            text="…",
            prompt_tokens=prompt_tokens,
            tokens=tokens,
            complete=complete,
            seconds=0.5,
            outcome="passed" if i < passed else "failed",
        )
        for i in range(of)
    ]


def model(passed: int, of: int, loss: float | None = None, **request: Any) -> Contender:
    return contender(answers(passed, of, **request), loss, None, Prices())


def three(base: Contender, prompted: Contender | None, tuned: Contender, of: int = 20) -> ComparisonResult:
    return compare(base, prompted, tuned, checked=of, examples=4, system=True, held_out_answers=7)


@pytest.mark.parametrize(
    ("prompted", "tuned", "needed", "opening"),
    [
        (10, 18, "yes", "Finetuning was worth it: "),
        (17, 18, "unclear", "It hardly matters: "),
        (18, 18, "no", "A prompt would have done: "),
        (19, 12, "no", "A prompt would have done: "),
    ],
)  # fmt: skip
def test_the_sentence_follows_from_the_prompts(prompted: int, tuned: int, needed: str, opening: str) -> None:
    found = three(model(9, 20), model(prompted, 20, prompt_tokens=290), model(tuned, 20))
    assert found.needed == needed
    assert found.sentence.startswith(opening)
    assert f"with a system message and 4 examples in its prompt {prompted} (without: 9)" in found.sentence
    assert found.sentence.endswith("at 6.0 times the tokens per request.")
    assert found.sentence in verdict(None, [], [], comparison=found).sentence


def test_without_checked_prompts_refusals_decide_and_without_these_the_loss() -> None:
    def rates(refused: float, over: float) -> Contender:
        return contender([], 2.0, (refused, over), Prices())

    assert three(rates(0.1, 0), rates(0.6, 0.4), rates(0.5, 0.05)).needed == "yes", "the prompt declines too much"
    assert three(rates(0.1, 0), rates(0.6, 0.1), rates(0.9, 0.6)).needed == "no"

    def loss(value: float) -> Contender:
        return contender([], value, None, Prices())

    assert three(loss(3.0), loss(2.0), loss(1.0)).needed == "yes"
    assert three(loss(3.0), loss(2.0), loss(1.95)).needed == "unclear"
    assert three(loss(3.0), loss(2.0), loss(2.1)).needed == "no"
    assert "a loss of 2.100" in three(loss(3.0), loss(2.0), loss(2.1)).sentence


def test_without_a_prompted_model_nothing_is_claimed() -> None:
    found = three(model(9, 20), None, model(18, 20))
    assert (found.needed, found.sentence) == (None, "")


def test_a_thousand_requests_cost_their_seconds_or_their_tokens() -> None:
    prices = Prices(worker_hour=7.2, tokens=TokenPrices(prompt=2.0, answer=10.0))
    requests = contender(answers(1, 2, prompt_tokens=250, tokens=20), None, None, prices).requests
    assert requests is not None
    assert requests.cost_by_time == pytest.approx(1.0)  # 1,000 × 0.5 s at 0.002 a second
    assert requests.cost_by_tokens == pytest.approx(0.7)  # 250,000 × 2 and 20,000 × 10, a million each
    assert model(1, 2).requests == requests.model_copy(
        update={"prompt_tokens": 40, "answer_tokens": 10, "cost_by_time": None, "cost_by_tokens": None}
    )


def test_the_table_has_a_row_for_what_was_measured_and_a_note_for_what_was_cut() -> None:
    found = three(model(9, 20, 3.0, complete=False), model(9, 20, 2.0, prompt_tokens=290), model(18, 20, 1.0))
    rows = {row[0]: row[1:] for row in compared.rows(result(), found)}
    assert rows == {
        "prompts as asked, of 20": ["9", "9", "18"],
        "loss on 7 held-out answers": ["3.000", "2.000", "1.000"],
        "tokens per request: prompt": ["40", "290", "40"],
        "tokens per request: answer": ["10", "10", "10"],
        "tokens per request, tuned = 1": ["1.0", "6.0", "1.0"],
        "seconds per request": ["0.50", "0.50", "0.50"],
    }
    assert any("(base 20) would have taken more tokens" in note for note in compared.notes(found))
    text = markdown(result().model_copy(update={"comparison": found}))
    assert "## Did it need finetuning?" in text
    assert "| tokens per request: prompt | 40 | 290 | 40 |" in text


@pytest.mark.parametrize(
    ("tuned", "says"),
    [(25.0, "It forgot: perplexity on general text rose by 25% (20.0 → 25.0)."), (20.5, "stayed within 5%"),
     (10.0, "No forgetting shows: perplexity on general text fell by 50%")],
)  # fmt: skip
def test_a_rise_of_perplexity_on_general_text_is_called_forgetting(tuned: float, says: str) -> None:
    forgetting = ForgettingResult(passages=24, tokens=1700, perplexity_base=20.0, perplexity_tuned=tuned)
    assert says in forgetting_sentence(forgetting)
    assert ("It forgot" in verdict(None, [], [], forgetting=forgetting).sentence) == (tuned == 25.0)
    run = result().model_copy(update={"forgetting": forgetting})
    assert ["perplexity on general text", "20", f"{tuned:.4g}"] in results(run)
