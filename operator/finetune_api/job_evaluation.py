"""The part of a FinetuneJob's spec that says what is measured at the end, and what it must reach."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from finetune_api.base import LongText, Model, ShortText


class Prompt(Model):
    """A prompt whose answers, base and tuned, stand side by side in the report."""

    prompt: LongText = Field(description="What the user says.")
    system: LongText | None = Field(None, description="System message before it.")
    expect: list[ShortText] = Field(
        default_factory=list, max_length=16, description="The tuned answer should contain one of these (any case)."
    )
    reject: list[ShortText] = Field(
        default_factory=list, max_length=16, description="The tuned answer should contain none of these (any case)."
    )
    topic: ShortText | None = Field(None, description="Heading under which the report groups it.")
    held_out: bool = Field(False, description="Must not stand in the training rows; prepare checks it.")


class Gate(Model):
    """A bound on an evaluation figure; missed, the job fails and its weights are kept aside."""

    metric: Literal["evalLoss", "evalLossRatio", "promptsPassed", "refusalRate", "overRefusalRate"] = Field(
        description="evalLossRatio is tuned over base; promptsPassed is the share of prompts with expect or reject "
        "whose tuned answer meets both."
    )
    min: float | None = Field(None, ge=-1e9, le=1e9, description="Smallest value that passes.")
    max: float | None = Field(None, ge=-1e9, le=1e9, description="Largest value that passes.")


class PromptBaseline(Model):
    """The base model with a prompt in place of tuning; with neither of the two there is no such comparison."""

    system: LongText | None = Field(None, description="System message. Default: that of the examples, if any.")
    examples: int = Field(
        4, ge=0, le=32, description="Training rows of one turn that stand before each prompt, for objective sft."
    )


class TokenPrices(Model):
    """What a server of the tuned model charges, in the runtime's currency."""

    prompt: float = Field(ge=0, le=1e6, description="For a million tokens of prompts.")
    answer: float = Field(ge=0, le=1e6, description="For a million tokens of answers.")


class Evaluation(Model):
    """What is measured at the end."""

    prompts: list[Prompt] = Field(default_factory=list, max_length=256, description="Prompts for the report.")
    max_new_tokens: int = Field(128, ge=1, le=8192, description="Longest answer to a prompt, in tokens (greedy).")
    refusal_suite: bool = Field(False, description="Measure refusals with the built-in suite.")
    prompt_baseline: PromptBaseline = Field(
        default_factory=PromptBaseline, description="Whether a prompt would have done: the base model, prompted."
    )
    token_prices: TokenPrices | None = Field(None, description="For the cost of 1,000 requests in the report.")
    general_text: bool = Field(
        True, description="Perplexity on a few built-in passages about everything, which shows what was forgotten."
    )
    gates: list[Gate] = Field(default_factory=list, max_length=32, description="Bounds that the run must meet.")
