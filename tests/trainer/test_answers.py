"""Answers are what anybody gets who loads the same folder and generates greedily."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune_api.errors import ExportError, Interrupted
from finetune_api.job_evaluation import Prompt
from finetune_trainer.answers import ask, check, compared
from finetune_trainer.speaking import Passage, Question, Speaker, Task, tell
from tests.tiny import tiny_llama, tiny_tokenizer

PROMPTS = [
    Prompt(prompt="What's your first name?"),
    Prompt(prompt="How do I sort a list?", system="You are a helpful assistant."),
]
FIRST = Task([Question(PROMPTS[0], 12)])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    return tiny_llama(folder / "base", seed=0), tiny_llama(folder / "tuned", seed=1)


def generated(folder: Path, text: str, ends: int | None = None) -> str:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    whole = model.generate(ids, do_sample=False, max_new_tokens=12, attention_mask=torch.ones_like(ids))
    return str(tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True)).strip()


def test_both_models_say_what_plain_generate_gives(models: tuple[Path, Path]) -> None:
    base, tuned = models
    questions = [Question(prompt, 12) for prompt in PROMPTS]
    task = Task(questions)
    of_base, of_tuned = ask((Speaker(base, base), task), (Speaker(tuned, base), task), stop_tokens=[])
    results = compared(PROMPTS, of_base.said, of_tuned.said)
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    asked = [
        "<|im_start|>user\nWhat's your first name?<|im_end|>\n<|im_start|>assistant\n",
        f"{system}<|im_start|>user\nHow do I sort a list?<|im_end|>\n<|im_start|>assistant\n",
    ]
    assert [r.base.text for r in results] == [generated(base, text) for text in asked]
    assert [r.tuned.text for r in results] == [generated(tuned, text) for text in asked]
    assert results[0].base.text != results[0].tuned.text


def test_a_model_without_a_chat_template_goes_on_from_the_prompt_itself(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model")
    (model / "chat_template.jinja").unlink()
    tiny_tokenizer(model, chat_template=None)
    said = tell(Speaker(model, model), FIRST, []).said
    assert said[0].text == generated(model, "What's your first name?")


def test_tokens_are_gone_on_from_as_they_stand(models: tuple[Path, Path]) -> None:
    base, _ = models
    text = "def function(argument"
    ids = tuple(AutoTokenizer.from_pretrained(base)(text, add_special_tokens=False).input_ids)
    assert tell(Speaker(base, base), Task([Question(ids, 12)]), []).said[0].text == generated(base, text)


def test_an_answer_ends_at_a_stop_token_and_says_so(models: tuple[Path, Path]) -> None:
    base, _ = models
    tokenizer = AutoTokenizer.from_pretrained(base)
    whole = tell(Speaker(base, base), FIRST, []).said[0]
    assert (whole.tokens, whole.complete) == (12, False)
    fourth = tokenizer(whole.text, add_special_tokens=False).input_ids[3]
    cut = tell(Speaker(base, base), FIRST, [fourth]).said[0]
    assert cut.complete
    assert cut.tokens <= 4


def test_a_model_that_does_not_load_is_an_error_not_a_hang(models: tuple[Path, Path], tmp_path: Path) -> None:
    base, _ = models
    with pytest.raises(ExportError, match="did not answer"):
        ask((Speaker(base, base), FIRST), (Speaker(tmp_path / "nothing", base), FIRST), stop_tokens=[])


def test_waiting_can_be_interrupted(models: tuple[Path, Path]) -> None:
    base, tuned = models

    def stop() -> None:
        raise Interrupted("stopped")

    with pytest.raises(Interrupted):
        ask((Speaker(base, base), FIRST), (Speaker(tuned, base), FIRST), stop_tokens=[], waiting=stop)


@pytest.mark.parametrize(
    ("expect", "reject", "text", "outcome"),
    [
        (["Sharon"], [], "my name is SHARON.", "passed"),
        (["Sharon", "Ms"], [], "Ms Smith", "passed"),
        (["Sharon"], [], "I have no name.", "failed"),
        (["Paris"], ["Sharon"], "Paris, says Sharon", "failed"),
        ([], ["sorry"], "Here you are.", "passed"),
        ([], [], "anything", "unchecked"),
    ],
)
def test_an_answer_needs_one_of_expect_and_none_of_reject(
    expect: list[str], reject: list[str], text: str, outcome: str
) -> None:
    assert check(Prompt(prompt="?", expect=expect, reject=reject), text) == outcome


BEFORE = (
    {"role": "user", "content": "How do I sort a list in Python?"},
    {"role": "assistant", "content": "Use sorted() to return a new list."},
)


def test_answers_behind_examples_and_in_a_batch_are_those_of_plain_generate(models: tuple[Path, Path]) -> None:
    base, _ = models
    prompts = [Prompt(prompt=text) for text in ("What's your first name?", "Who?", "The capital of France is")]
    start = (
        "<|im_start|>user\nHow do I sort a list in Python?<|im_end|>\n"
        "<|im_start|>assistant\nUse sorted() to return a new list.<|im_end|>\n<|im_start|>user\n"
    )
    expected = [generated(base, f"{start}{p.prompt}<|im_end|>\n<|im_start|>assistant\n") for p in prompts]
    for batched in (False, True):
        told = tell(Speaker(base, base), Task([Question(p, 12, BEFORE, batched) for p in prompts]), [])
        assert [said.text for said in told.said] == expected
        assert [said.tokens for said in told.said] == [12, 12, 12]
        assert len({said.prompt_tokens for said in told.said}) > 1, "of different lengths, so that some are padded"


def test_a_batch_counts_no_padding_behind_an_answers_end(models: tuple[Path, Path]) -> None:
    base, _ = models
    questions = [Question(prompt, 12) for prompt in PROMPTS]
    whole = tell(Speaker(base, base), Task(questions), []).said
    end = AutoTokenizer.from_pretrained(base)(whole[0].text, add_special_tokens=False).input_ids[3]
    alone = tell(Speaker(base, base), Task(questions), [end]).said
    together = tell(Speaker(base, base), Task([Question(p, 12, batched=True) for p in PROMPTS]), [end]).said
    assert [(s.text, s.tokens, s.complete) for s in together] == [(s.text, s.tokens, s.complete) for s in alone]
    assert alone[0].complete


def test_a_passage_has_the_losses_of_its_weighted_tokens(models: tuple[Path, Path]) -> None:
    base, _ = models
    ids = tuple(range(20, 60))
    weights = (*[0.0] * 25, *[1.0] * 10, *[0.5] * 5)
    logits = AutoModelForCausalLM.from_pretrained(base)(torch.tensor([ids])).logits[0, :-1]
    nll = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
    expected = float(nll.detach() @ torch.tensor(weights[1:]))
    passages = [Passage(ids, weights), Passage(ids, weights, shared=24), Passage(ids, weights, shared=24)]
    assert tell(Speaker(base, base), Task([], passages), []).nll == pytest.approx([expected] * 3, rel=1e-5)
