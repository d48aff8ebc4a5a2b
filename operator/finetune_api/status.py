"""FinetuneJob's status: what the operator has seen and done. Written by the operator alone.

Durations are seconds, times are RFC 3339 in UTC, money is in the runtime's currency.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import Field, StringConstraints

from finetune_api import patterns
from finetune_api.base import (
    Count,
    Measure,
    Model,
    Money,
    ResourceName,
    Seconds,
    Sentence,
    Sha256,
    ShortText,
    Timestamp,
    Uri,
)

Phase = Literal["Pending", "Preparing", "Queued", "Training", "Finishing", "Complete", "Failed", "Suspended"]
FailureReason = Literal[
    "Preempted",
    "OutOfGpuMemory",
    "OutOfHostMemory",
    "OutOfSharedMemory",
    "UserData",
    "UserCode",
    "Storage",
    "Image",
    "Unschedulable",
    "Numerics",
    "Hang",
    "Node",
    "Network",
    "Unknown",
    "DeadlineExceeded",
    "CostExceeded",
    "GateMissed",
]
Destination = Literal["internet", "metadata", "apiServer", "otherNamespace"]
DESTINATIONS: Final[dict[Destination, str]] = {  # for people
    "internet": "the internet",
    "metadata": "the cloud's metadata address",
    "apiServer": "the API server",
    "otherNamespace": "a pod of another namespace",
}
Step = Annotated[int, Field(ge=0, le=1_000_000_000)]
Attempt = Annotated[int, Field(ge=0, le=100_000)]
ReasonWord = Annotated[str, StringConstraints(min_length=1, max_length=1024, pattern=patterns.REASON)]


class Condition(Model):
    """metav1.Condition, with its bounds."""

    type: Annotated[
        str,
        StringConstraints(
            min_length=1,
            max_length=316,
            pattern=patterns.CONDITION_TYPE,
        ),
    ] = Field(
        description="Valid, Prepared, Running, Complete or Failed; the last two are terminal and never change back."
    )
    status: Literal["True", "False", "Unknown"] = Field(description="Whether it holds.")
    observed_generation: Count | None = Field(None, description="metadata.generation that it was found for.")
    last_transition_time: Timestamp = Field(description="When status last changed.")
    reason: ReasonWord = Field(description="Why, as one word for programs.")
    message: Annotated[str, StringConstraints(max_length=32_768)] = Field(description="Why, as a sentence for people.")


class Plan(Model):
    """What the run will need, worked out before a GPU is taken."""

    total_steps: Step | None = Field(None, description="Optimizer steps.")
    sequences: Count | None = Field(None, description="Packed training sequences in one epoch.")
    tokens: Count | None = Field(None, description="Training tokens in one epoch.")
    target_tokens: Count | None = Field(None, description="Of those, tokens that the model learns to say.")
    zero_stage: Annotated[int, Field(ge=0, le=3)] | None = Field(None, description="ZeRO stage that is used.")
    gpu_memory_bytes: Count | None = Field(None, description="Estimated peak memory of one GPU, in bytes.")
    seconds: Seconds | None = Field(None, description="Estimated training time, in seconds.")
    cost: Money | None = Field(None, description="Estimated cost, in the runtime's currency.")


class Progress(Model):
    """How far the training is. A new attempt continues from the last checkpoint, so step may go back there."""

    attempt: Attempt = Field(1, description="The attempt that reported it.")
    step: Step = Field(description="Optimizer steps done.")
    total_steps: Step = Field(description="Optimizer steps of the whole run.")
    epoch: Annotated[float, Field(ge=0, le=1_000_000)] | None = Field(
        None, description="Passes over the rows so far; 1.5 is the middle of the second."
    )
    percent: Annotated[int, Field(ge=0, le=100)] = Field(description="step of totalSteps, in percent, rounded down.")
    tokens: Count | None = Field(None, description="Tokens trained on so far, counted once.")
    tokens_per_second: Annotated[float, Field(ge=0, le=1e12)] | None = Field(
        None, description="Recent throughput of all workers, in tokens per second."
    )
    loss: Measure | None = Field(None, description="Recent training loss, in nats per token, to 4 decimals.")
    eval_loss: Measure | None = Field(None, description="Last evaluation loss, in nats per token, to 4 decimals.")
    eta_time: Timestamp | None = Field(None, description="When training should end, at the recent speed.")
    updated_time: Timestamp | None = Field(
        None, description="When the trainer last got on, by the API server's clock: how old the rest is."
    )


class Cost(Model):
    """Price of the accelerators: held time × GPUs × the runtime's pricePerHour."""

    currency: ShortText | None = Field(None, description="The runtime's currency.")
    spent: Money = Field(description="So far, over all attempts, to 2 decimals.")
    projected: Money | None = Field(None, description="At the end, at the recent speed, to 2 decimals.")


class LostSeconds(Model):
    """Time that GPUs were held and no new step came of it, by cause, in seconds."""

    startup: Seconds = Field(0, description="Pulling images, starting Ray, loading the model.")
    checkpoint: Seconds = Field(0, description="Training stood still for a checkpoint.")
    preemption: Seconds = Field(0, description="Steps done again after a preemption.")
    failure: Seconds = Field(0, description="Steps done again after a failure.")
    finish: Seconds = Field(0, description="Export, final evaluation and report.")


class Goodput(Model):
    """Where the accelerators' time went."""

    training_seconds: Seconds = Field(description="Time spent in steps that counted, in seconds.")
    lost_seconds: LostSeconds = Field(default_factory=LostSeconds, description="The rest, by cause, in seconds.")


class Failure(Model):
    """One failed attempt."""

    attempt: Attempt = Field(description="The attempt that failed.")
    reason: FailureReason = Field(description="Class of the failure.")
    message: Sentence = Field(description="What happened and what to do.")
    time: Timestamp | None = Field(None, description="When it was seen.")
    node: Annotated[str, StringConstraints(max_length=253)] | None = Field(None, description="Node it happened on.")
    rank: Annotated[int, Field(ge=0, le=65_535)] | None = Field(None, description="Worker rank it happened on.")
    exit_code: Annotated[int, Field(ge=0, le=255)] | None = Field(None, description="The container's exit code.")
    retryable: bool = Field(description="Whether another attempt may help.")


class CheckpointStatus(Model):
    """The newest complete checkpoint."""

    step: Step = Field(description="Optimizer steps it holds.")
    uri: Uri = Field(description="Its folder.")
    time: Timestamp = Field(description="When it became complete.")


class Attempts(Model):
    """What the operator must know to start the next attempt, or not to."""

    uid: ShortText | None = Field(None, description="UID of the current attempt's RayJob, once it was seen.")
    ended: Attempt = Field(0, description="The newest attempt that has ended; nothing of it may run any more.")
    counted_uid: ShortText | None = Field(
        None, description="UID of the prepare Job, or of its Ray cluster, that has done what it can, and is counted."
    )
    prepare_workers: Annotated[int, Field(ge=1, le=1024)] | None = Field(
        None, description="Workers that prepare asked for, where the job leaves their number open."
    )
    retries: Count = Field(0, description="Used of limits.retries.")
    preemptions: Count = Field(0, description="Used of limits.preemptions.")
    next_time: Timestamp | None = Field(None, description="The next attempt does not start before.")


class Accounted(Model):
    """How far cost and goodput are counted already, so that nothing is counted twice after a restart."""

    time: Timestamp = Field(description="Held time is counted up to here.")
    spent: Money = Field(0, description="cost.spent, not rounded.")
    attempt: Attempt = Field(0, description="The attempt whose seconds follow.")
    held: Seconds = Field(0, description="Seconds in which it held a node.")
    training: Seconds = Field(0, description="Of those, in steps.")
    checkpoint: Seconds = Field(0, description="Of those, standing still for checkpoints.")
    finish: Seconds = Field(0, description="Of those, in export and evaluation.")
    other: Seconds = Field(0, description="The rest.")


class GateResult(Model):
    """What a gate measured."""

    metric: ShortText = Field(description="The gate's metric.")
    value: Measure | None = Field(None, description="What was measured; absent when it could not be.")
    passed: bool = Field(description="Whether it lies within the gate's bounds.")


class EgressResult(Model):
    """An address that no training needs, and whether a worker reached it."""

    to: Destination = Field(description="What is there: internet, metadata, apiServer or otherNamespace.")
    address: ShortText = Field(description="What was asked, as HOST:PORT.")
    reached: bool = Field(description="Whether a TCP connection was made, from any worker pod of any attempt.")


class Result(Model):
    """What came out."""

    uri: Uri = Field(description="Folder with the weights. With a missed gate: where they are kept aside.")
    base_model_sha: Annotated[str, StringConstraints(min_length=7, max_length=64, pattern=patterns.COMMIT)] | None = (
        Field(None, description="Commit of the base model's revision, or SHA-256 over its files.")
    )
    manifest_sha256: Sha256 | None = Field(None, description="SHA-256 of the prepared data's manifest.")
    eval_loss_base: Measure | None = Field(None, description="Evaluation loss of the base model, in nats per token.")
    eval_loss_tuned: Measure | None = Field(None, description="The same of the tuned model, on the same tokens.")
    gates: list[GateResult] = Field(default_factory=list, max_length=32, description="The gates, in the spec's order.")
    report: Uri | None = Field(None, description="The report, report.html.")
    egress: list[EgressResult] = Field(
        default_factory=list, max_length=8, description="Which of four addresses the workers reached; empty: not asked."
    )


class FinetuneJobStatus(Model):
    """What became of the job so far."""

    phase: Phase | None = Field(None, description="Where the job is. Complete and Failed are final.")
    reason: ReasonWord | None = Field(None, description="Why it is there, as one word, such as ImagePullBackOff.")
    message: Sentence | None = Field(None, description="Why it is there, as a sentence that says what to do.")
    observed_generation: Count | None = Field(None, description="metadata.generation that this status is about.")
    conditions: list[Condition] = Field(
        default_factory=list,
        max_length=16,
        description="Conditions, one of each type.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
    )
    attempt: Attempt | None = Field(None, description="Number of the current or last attempt, from 1.")
    attempts: Attempts | None = Field(None, description="Book of the attempts.")
    start_time: Timestamp | None = Field(None, description="When the operator first acted on the job.")
    completion_time: Timestamp | None = Field(None, description="When the job became Complete or Failed.")
    runtime: ResourceName | None = Field(None, description="FinetuneRuntime in use.")
    plan: Plan | None = Field(None, description="What the run will need.")
    progress: Progress | None = Field(None, description="How far it is.")
    cost: Cost | None = Field(None, description="What it costs.")
    goodput: Goodput | None = Field(None, description="Where the accelerators' time went.")
    accounted: Accounted | None = Field(None, description="How far cost and goodput are counted.")
    failures: list[Failure] = Field(
        default_factory=list, max_length=10, description="The last failed attempts, oldest first."
    )
    checkpoint: CheckpointStatus | None = Field(None, description="The newest complete checkpoint.")
    result: Result | None = Field(None, description="What came out.")
