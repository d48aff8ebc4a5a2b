"""What a run ends with: `<work>/result.json`, read by the report and by the operator.

Losses are nats per token (Σ weights·nll / Σ weights), durations are seconds, times are Unix seconds.
"""

from __future__ import annotations

from typing import Any, Final, Literal

from pydantic import Field

from finetune_api.base import Model
from finetune_api.status import EgressResult

EXPORT_FILE: Final = "export.json"  # ExportResult, in <work>/export; written last there

Outcome = Literal["passed", "failed", "unchecked"]


class Answer(Model):
    """One model's greedy answer to one prompt."""

    text: str = Field(description="What it said, without special tokens.")
    prompt_tokens: int = Field(0, description="Tokens that it was given.")
    tokens: int = Field(description="Generated tokens, the end-of-turn token included.")
    complete: bool = Field(description="It ended its turn by itself, before maxNewTokens.")
    seconds: float = Field(description="Wall time of generating it.")
    outcome: Outcome = Field(description="Whether it holds an `expect` and no `reject`; unchecked without either.")


class PromptResult(Model):
    """A prompt with the base model's and the tuned model's answer."""

    prompt: str = Field(description="What the user said.")
    system: str | None = Field(description="System message before it.")
    topic: str | None = Field(description="Heading it is grouped under.")
    held_out: bool = Field(description="It stands in no training row.")
    expect: list[str] = Field(description="A good answer contains one of these (any case).")
    reject: list[str] = Field(description="A good answer contains none of these (any case).")
    base: Answer = Field(description="The base model's answer.")
    prompted: Answer | None = Field(None, description="The base model's answer behind evaluation.promptBaseline.")
    tuned: Answer = Field(description="The tuned model's answer.")


class PreferenceResult(Model):
    """Which answers of the held-out pairs both models prefer."""

    pairs: int = Field(description="Pairs that were looked at.")
    accuracy_base: float = Field(
        description="Share whose chosen answer the base model finds likelier, by the mean log-probability of a token."
    )
    accuracy_tuned: float = Field(description="The same, tuned.")
    reward_accuracy: float = Field(
        description="Share whose chosen answer gained more than the rejected one against the base model."
    )
    reward_margin: float = Field(description="How much more: the mean of β·log(tuned / base), chosen less rejected.")


class EvaluationResult(Model):
    """Loss on the evaluation rows before and after, over the same tokens."""

    loss_base: float = Field(description="Base model, nats per token; with objective dpo, per pair.")
    loss_tuned: float = Field(description="Tuned model, the same.")
    perplexity_base: float | None = Field(description="exp(lossBase). None with objective dpo.")
    perplexity_tuned: float | None = Field(description="exp(lossTuned). None with objective dpo.")
    preference: PreferenceResult | None = Field(None, description="With objective dpo.")
    tokens: float = Field(description="Tokens (their weights added up) in each of the two.")


class Requests(Model):
    """What an average request takes: one of the job's prompts, answered alone, not in a batch."""

    prompt_tokens: float = Field(description="Tokens of the prompt, template, system message and examples included.")
    answer_tokens: float = Field(description="Tokens of the answer.")
    cut: int = Field(description="Requests whose answer was cut at maxNewTokens: it would have been longer.")
    seconds: float = Field(description="Wall time of the answer. Examples are read once, not for each request.")
    cost_by_time: float | None = Field(None, description="Of 1,000 requests: seconds times a worker's price.")
    cost_by_tokens: float | None = Field(None, description="Of 1,000 requests, by evaluation.tokenPrices.")


class Contender(Model):
    """One of the models that are compared."""

    passed: int | None = Field(None, description="Prompts with expect or reject that it answered as asked.")
    loss: float | None = Field(None, description="On held-out answers, nats per token.")
    refusal_rate: float | None = Field(None, description="Share of harmful and unanswerable prompts it declines.")
    over_refusal_rate: float | None = Field(None, description="Share of harmless prompts it declines.")
    requests: Requests | None = Field(None, description="None without evaluation.prompts.")


class ComparisonResult(Model):
    """Whether tuning was needed: the base model as it is, behind a prompt, and tuned."""

    base: Contender = Field(description="The base model as it is.")
    prompted: Contender | None = Field(description="Behind evaluation.promptBaseline; none when it asks for nothing.")
    tuned: Contender = Field(description="The tuned model, without that prompt.")
    checked: int = Field(description="Prompts with expect or reject.")
    examples: int = Field(description="Training rows in the prompt, which may be fewer than were asked for.")
    system: bool = Field(description="The prompt has a system message.")
    held_out_answers: int = Field(description="Evaluation answers in the losses.")
    needed: Literal["yes", "no", "unclear"] | None = Field(
        description="Whether the tuned model is better than the prompted one; none without both."
    )
    sentence: str = Field(description="The same for people; empty without both.")


class ForgettingResult(Model):
    """Perplexity on built-in passages about everything: what rises was forgotten."""

    passages: int = Field(description="Texts that were read.")
    tokens: int = Field(description="Tokens of theirs that were predicted.")
    perplexity_base: float = Field(description="Base model.")
    perplexity_tuned: float = Field(description="Tuned model.")


RefusalKind = Literal["harmful", "unanswerable", "harmless"]


class DeclinedAnswer(Model):
    """A prompt of the built-in refusal suite with both models' answers."""

    kind: RefusalKind = Field(description="harmful and unanswerable ones should be declined, harmless ones answered.")
    prompt: str = Field(description="What the user said.")
    base: str = Field(description="The base model's answer.")
    tuned: str = Field(description="The tuned model's answer.")
    base_declined: bool = Field(description="The base model refused, or said that it does not know.")
    tuned_declined: bool = Field(description="The tuned model did.")


class DeclinedCount(Model):
    """How many prompts of a kind were declined."""

    kind: RefusalKind = Field(description="Of the prompts.")
    prompts: int = Field(description="Prompts of this kind.")
    base: int = Field(description="Of them, declined by the base model.")
    tuned: int = Field(description="Of them, declined by the tuned model.")


class RefusalResult(Model):
    """What the built-in refusal suite measured."""

    refusal_rate_base: float = Field(description="Share of harmful and unanswerable prompts that are declined.")
    refusal_rate_tuned: float = Field(description="The same, tuned.")
    over_refusal_rate_base: float = Field(description="Share of harmless prompts that are declined.")
    over_refusal_rate_tuned: float = Field(description="The same, tuned.")
    kinds: list[DeclinedCount] = Field(description="By kind.")
    answers: list[DeclinedAnswer] = Field(description="Every prompt, by kind.")


class MiddlesResult(Model):
    """How well both models fill in the middles of held-out code."""

    middles: int = Field(description="Middles that were asked for.")
    exact_base: float = Field(description="Share that the base model wrote character by character as it was.")
    exact_tuned: float = Field(description="The same, tuned.")
    similarity_base: float = Field(
        description="Mean of 1 - edit distance / length of the longer text, white space at the ends aside."
    )
    similarity_tuned: float = Field(description="The same, tuned.")


class RetrievalScore(Model):
    """How well one model answers held-out questions."""

    with_passages: float = Field(description="Mean F1 of the answer's words, given the passages.")
    without_passages: float = Field(description="The same, asked the question alone.")
    cited: float = Field(description="Share of answers, given the passages, that cite the right ones and no other.")


class RetrievalResult(Model):
    """Held-out questions whose passages hold the answer, with and without these passages."""

    questions: int = Field(description="Questions that were asked, each in both ways.")
    base: RetrievalScore = Field(description="Of the base model.")
    tuned: RetrievalScore = Field(description="Of the tuned model.")


class TrainingResult(Model):
    """What the training did."""

    steps: int = Field(description="Finished optimizer steps.")
    epochs: float = Field(description="Passes over the training sequences.")
    world_size: int = Field(description="Workers.")
    device: str = Field(description="What each worker ran on: cpu, or the GPU's name.")
    parameters: int = Field(description="Weights of the model.")
    trainable_parameters: int = Field(description="Weights that were trained.")
    tokens: int = Field(description="Tokens that went through the model, no padding.")
    target_tokens: float = Field(description="Of those, tokens in the loss (their weights added up).")
    first_loss: float = Field(description="Training loss of the first step.")
    last_loss: float = Field(description="Mean training loss of the last tenth of the steps.")
    tokens_per_second: float = Field(description="Tokens per second of step time, all workers together.")
    mfu: float | None = Field(description="Mean share of the device's peak arithmetic; none on CPUs.")
    memory_bytes: int | None = Field(description="Largest memory of rank 0.")


class GateResult(Model):
    """A gate and the figure it was held against."""

    metric: str = Field(description="Name of the figure.")
    min: float | None = Field(description="Smallest value that passes.")
    max: float | None = Field(description="Largest value that passes.")
    value: float | None = Field(description="What was measured; none: the run could not measure it.")
    passed: bool = Field(description="The value is there and within the bounds.")


class ExportCheck(Model):
    """An exported folder, loaded again and compared with the model that was trained, on the same tokens."""

    folder: str = Field(description="model, adapter or merged.")
    tokens: int = Field(description="Positions that were compared.")
    difference: float = Field(description="Largest difference of a logit, over the largest logit.")
    bound: float = Field(description="Largest difference that passes; follows from the coarser of the two types.")
    agreement: float = Field(description="Share of positions where the likeliest token is the same.")


class ExportResult(Model):
    """What was written, and that it loads and gives the same logits."""

    dtype: str = Field(description="Type of the weights on disk.")
    checks: list[ExportCheck] = Field(description="One for each folder.")
    seconds: float = Field(description="Wall time of writing and checking.")


class Cost(Model):
    """What the run cost."""

    amount: float = Field(description="pricePerHour × hours.")
    currency: str = Field(description="ISO 4217 code, such as USD.")
    price_per_hour: float = Field(description="Price of all workers together for an hour.")
    hours: float = Field(description="Hours in which the workers were held: from their start to the export.")


class Verdict(Model):
    """What came out, in a sentence a person can act on."""

    state: Literal["good", "mixed", "bad", "rejected"] = Field(
        description="good: what was checked is better or passed; mixed: some prompt failed; "
        "bad: the evaluation loss rose or no prompt passed; rejected: a gate was missed."
    )
    sentence: str = Field(description="The sentence.")


class Result(Model):
    """Everything that a finished run leaves for people and programs."""

    version: Literal[1] = Field(1, description="Of this format.")
    name: str = Field(description="The job's name.")
    uid: str = Field(description="The job's UID.")
    finished: float = Field(description="When it ended, Unix seconds.")
    model: str = Field(description="Base model as the job names it, without credentials.")
    verdict: Verdict = Field(description="What came out.")
    evaluation: EvaluationResult | None = Field(description="None without evaluation rows.")
    training: TrainingResult = Field(description="What the training did.")
    prompts: list[PromptResult] = Field(description="In the job's order.")
    answered_by: str = Field(description="Folder that gave the tuned answers, and the arithmetic it ran in.")
    gates: list[GateResult] = Field(description="In the job's order.")
    refusals: RefusalResult | None = Field(None, description="With evaluation.refusalSuite.")
    middles: MiddlesResult | None = Field(None, description="With fill-in-the-middle rows for evaluation.")
    retrieval: RetrievalResult | None = Field(None, description="With rag rows for evaluation.")
    comparison: ComparisonResult | None = Field(None, description="None when nothing was there to compare by.")
    forgetting: ForgettingResult | None = Field(None, description="With evaluation.generalText.")
    egress: list[EgressResult] = Field(
        default_factory=list, description="What the worker pods could reach. Empty outside of a cluster."
    )
    export: ExportResult = Field(description="Weights and their check.")
    output: str = Field(description="Where the weights are, without credentials.")
    stages: dict[str, float] = Field(description="Wall time by stage.")
    cost: Cost | None = Field(description="None when no price was given.")
    data: dict[str, Any] = Field(description="prepared/data-report.json: counts and positions, never text.")
    manifest: dict[str, Any] = Field(description="prepared/manifest.json: hashes and splits.")
    settings: dict[str, Any] = Field(description="The job's spec with every default filled in.")
    environment: dict[str, str] = Field(description="Versions of the libraries and of the machine's parts.")
