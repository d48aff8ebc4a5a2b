"""What the operator and the pods of a job say to each other.

The operator mounts `run.json` (`run.RunConfig`) at RUN_PATH. A stage that ends writes a StageReport as its container's
termination message. While training, the head pod answers `GET :PROGRESS_PORT/progress` with a ProgressReport; it goes
on answering after the driver has ended, for as long as the pod lives.

Clocks of nodes are not trusted: pods send ages and durations in seconds, never points in time.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import Field

from finetune_api.base import Count, Measure, Model, Seconds, Sentence, Sha256, ShortText, Uri
from finetune_api.status import Attempt, FailureReason, Plan, Result, Step

RUN_PATH: Final = "/etc/finetune/run.json"
CA_PATH: Final = "/etc/finetune/ca.crt"
STORAGE_SECRET_PATH: Final = "/etc/finetune/storage"  # one file for each key of the runtime's secret
SCRATCH_PATH: Final = "/scratch"
MODEL_PATH: Final = "/scratch/model"
MODEL_CLAIM_PATH: Final = "/model-claim"  # where pods see the volume of a model at pvc://
PROGRESS_PORT: Final = 8090
PROBE_VARIABLE: Final = "FINETUNE_PROBE"  # HOST:PORT in another namespace: workers ask it, which no policy should allow
RAY_TOKEN_PATH: Final = "/etc/finetune/ray/auth_token"  # where the pod that prepares finds its Ray cluster's token
RANK_MARK: Final = "[rank {}] "  # what a worker's lines begin with in its pod's log, since a pod may hold several
TERMINATION_MESSAGE_BYTES: Final = 4096  # the kubelet cuts what is longer


class StageFailure(Model):
    """Why a stage ended badly, in the trainer's own words."""

    reason: FailureReason = Field(description="Class of the failure.")
    message: Sentence = Field(description="What happened, where, and what to do.")
    rank: Annotated[int, Field(ge=0, le=65_535)] | None = Field(None, description="Worker rank it happened on.")
    node: ShortText | None = Field(None, description="Node it happened on.")


class StageReport(Model):
    """How a stage ended; at most TERMINATION_MESSAGE_BYTES as JSON."""

    failure: StageFailure | None = Field(None, description="Absent: it ended well.")
    plan: Plan | None = Field(None, description="Of prepare: what the run will need.")
    base_model_sha: ShortText | None = Field(None, description="Of prepare: resolved commit of the base model.")
    manifest_sha256: Sha256 | None = Field(None, description="Of prepare: SHA-256 of the manifest.")
    workers: Annotated[int, Field(ge=2, le=1024)] | None = Field(
        None, description="Of prepare, which has then done nothing else: the rows are for so many workers."
    )
    result: Result | None = Field(None, description="Of result: what came out.")


class ReportedCheckpoint(Model):
    """The newest complete checkpoint."""

    step: Step = Field(description="Optimizer steps it holds.")
    uri: Uri = Field(description="Its folder.")
    age: Seconds = Field(description="Seconds since it became complete.")


class SpentSeconds(Model):
    """Where the time of an attempt went so far; the parts do not overlap."""

    training: Seconds = Field(0, description="In steps.")
    checkpoint: Seconds = Field(0, description="Training stood still for a checkpoint.")
    finish: Seconds = Field(0, description="Export, final evaluation and report.")
    at_risk: Seconds = Field(0, description="Of training: since the newest checkpoint; lost if the attempt fails now.")


class ProgressReport(Model):
    """The answer to `GET /progress`."""

    attempt: Attempt = Field(description="The attempt that answers.")
    state: Literal["starting", "training", "finishing", "finished", "failed", "stopped"] = Field(
        description="stopped: on request, after a checkpoint. finished, failed and stopped are final."
    )
    age: Seconds = Field(description="Seconds since the trainer last got on: a step, a checkpoint, a state.")
    step: Step = Field(0, description="Optimizer steps done.")
    total_steps: Step = Field(0, description="Optimizer steps of the whole run; 0: not known yet.")
    epoch: Annotated[float, Field(ge=0, le=1_000_000)] | None = Field(None, description="Passes over the rows.")
    tokens: Count | None = Field(None, description="Tokens trained on so far, counted once.")
    tokens_per_second: Annotated[float, Field(ge=0, le=1e12)] | None = Field(None, description="Recent throughput.")
    loss: Measure | None = Field(None, description="Recent training loss, nats per token.")
    eval_loss: Measure | None = Field(None, description="Last evaluation loss, nats per token.")
    eta: Seconds | None = Field(None, description="Seconds until training should end, at the recent speed.")
    checkpoint: ReportedCheckpoint | None = Field(None, description="The newest complete checkpoint.")
    seconds: SpentSeconds = Field(default_factory=SpentSeconds, description="Where the time went.")
    failure: StageFailure | None = Field(None, description="With state failed: why.")
    result: Result | None = Field(None, description="With state finished, or a missed gate: what came out.")
