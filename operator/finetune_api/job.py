"""FinetuneJob's spec: what a user asks for. Every field has its unit and its bounds.

Rules that look at more than one field stand in `job_rules.py`, once, as CEL for the API server and as Python for
`finetune validate`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StringConstraints

from finetune_api import patterns
from finetune_api.base import (
    Duration,
    FolderUri,
    Fraction,
    LongText,
    Model,
    PositiveCount,
    ResourceName,
    ShortText,
    Uri,
)
from finetune_api.job_evaluation import Evaluation

Objective = Literal["sft", "pretrain", "dpo"]
Tuning = Literal["full", "lora"]
DataFormat = Literal["auto", "chat", "completion", "text", "code", "preference", "rag"]
Overlong = Literal["error", "truncate", "split", "drop"]
Schedule = Literal["cosine", "linear", "constant", "wsd"]
Precision = Literal["bf16", "fp16", "fp32"]


class RuntimeRef(Model):
    """Names the FinetuneRuntime, made by the admin, that the job runs on."""

    name: ResourceName = Field(description="Name of a FinetuneRuntime. Defaulted when the cluster has exactly one.")


class ModelSource(Model):
    """The base model."""

    source: Uri = Field(
        description="Where the base model is: hf://ORG/NAME@REVISION, s3://, gs://, abfs://, pvc://CLAIM/PATH, "
        "file:// or, for `finetune run`, a path relative to the job file. A Hugging Face folder with safetensors."
    )


class Lora(Model):
    """Low-rank adapters (https://arxiv.org/abs/2106.09685)."""

    rank: int = Field(16, ge=1, le=1024, description="Rank r of the two adapter matrices.")
    alpha: float = Field(32, gt=0, le=8192, description="Scale: the adapter's output is multiplied by alpha / rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout before the adapter, as a fraction.")
    target_modules: list[ShortText] = Field(
        ["all-linear"],
        min_length=1,
        max_length=64,
        description="Names of the linear layers that get an adapter; `all-linear` means each but the output head.",
    )


class Dpo(Model):
    """Preference tuning."""

    beta: float = Field(0.1, gt=0, le=10, description="How strongly the tuned model is held to the base model.")
    loss: Literal["sigmoid", "ipo", "length-normalised"] = Field(
        "sigmoid",
        description="sigmoid: DPO (https://arxiv.org/abs/2305.18290); ipo (https://arxiv.org/abs/2310.12036) and "
        "length-normalised, DPO over the mean of an answer's tokens instead of their sum, do not favour long answers.",
    )


class Method(Model):
    """How the model is tuned."""

    objective: Objective = Field("sft", description="sft: answers; pretrain: raw text; dpo: preferences.")
    tuning: Tuning = Field("lora", description="lora trains small adapters, full trains every weight.")
    lora: Lora = Field(default_factory=Lora, description="Used when tuning is lora.")
    dpo: Dpo = Field(default_factory=Dpo, description="Used when objective is dpo.")


ColumnField = Literal[
    "messages", "tools", "prompt", "completion", "text",
    "path", "language", "license", "repository",
    "question", "documents", "oracle", "distractors", "answer", "chosen", "rejected",
]  # fmt: skip


class CodeFilter(Model):
    """Which files of code are read. Files are told apart by their name's ending, rows by their `language`."""

    languages: list[ShortText] = Field(
        default_factory=list, max_length=64, description="Only these, such as python, go, typescript; empty: all known."
    )
    licenses: list[ShortText] = Field(
        default_factory=list,
        max_length=64,
        description="Only files under these SPDX identifiers, such as MIT: a row's `license`, else the file's "
        "SPDX-License-Identifier. Files that name none are left out. Empty: all files.",
    )


class DataSource(Model):
    """One file or folder of rows."""

    uri: Uri = Field(
        description="s3://, gs://, abfs://, file:// or, for `finetune run`, a path relative to the job file. A file or "
        "a folder of .jsonl, .parquet or .csv, plain or with .gz or .zst behind it; with format code also a folder of "
        "source files, which is one repository."
    )
    format: DataFormat = Field(
        "auto", description="How rows are read. auto: detected from each file's fields; code has to be named."
    )
    weight: float = Field(
        1.0, gt=0, le=100, description="Times each row is seen per epoch; 0.5 samples half, 2.5 repeats."
    )
    columns: dict[ColumnField, ShortText] = Field(
        default_factory=dict, max_length=16, description="Renames: our field's name to the file's column name."
    )
    code: CodeFilter = Field(default_factory=CodeFilter, description="Which files are read, for format code.")


class Fim(Model):
    """Fill in the middle for code (https://arxiv.org/abs/2207.14255)."""

    rate: Fraction = Field(0.5, description="Share of code documents that are turned into fill-in-the-middle rows.")
    spm_rate: Fraction = Field(0.5, description="Of those, the share written suffix-prefix-middle.")


class Rag(Model):
    """Answers from retrieved passages (RAFT, https://arxiv.org/abs/2403.10131)."""

    without_oracle: Fraction = Field(
        0.2, description="Share of rows with distractors that lose the passage which holds the answer."
    )
    unanswered: LongText | None = Field(
        None, description="What those rows answer, such as `I don't know`. Default: their own answer, from memory."
    )


class Refusals(Model):
    """Built-in refusal and uncertainty rows."""

    mix: float = Field(
        0.0, ge=0, le=0.5, description="Share of training rows that come from the built-in set, for objective sft."
    )


class Prepare(Model):
    """The machines that turn rows into token sequences. Their number changes nothing in what comes out."""

    workers: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="In a cluster: pods, each with the runtime's resources.prepareCpus; with more than one they form "
        "a Ray cluster of their own. Absent: one, or for more rows than the runtime's resources.prepareBytes one for "
        "each so many. On one machine: 1 (the default) is a process for each core; more is Ray Data over all cores, "
        "at least so many, or over the cluster that RAY_ADDRESS names, which has to see the work folder.",
    )


class Data(Model):
    """The rows and how they become token sequences."""

    train: list[DataSource] = Field(min_length=1, max_length=256, description="Training rows.")
    evaluation: list[DataSource] = Field(
        default_factory=list, max_length=256, description="Evaluation rows. Empty: `evaluationFraction` is used."
    )
    evaluation_fraction: float = Field(
        0.0, ge=0, le=0.5, description="Share of training rows set aside for evaluation, chosen by content hash."
    )
    sequence_length: int = Field(2048, ge=16, le=4_194_304, description="Longest sequence, in tokens.")
    packing: bool = Field(True, description="Put several documents in one sequence; they never see each other.")
    overlong: Overlong = Field("error", description="What happens to a row longer than sequenceLength.")
    deduplicate: Literal["near", "exact", "none"] = Field(
        "near", description="Drop rows that repeat another: by content (exact), or also nearly so (MinHash, near)."
    )
    near_duplicate_threshold: float = Field(
        0.9, ge=0.5, le=1, description="Estimated Jaccard similarity of word 5-grams above which rows are duplicates."
    )
    loss: Literal["assistant", "last-turn", "all"] = Field(
        "assistant", description="What is learned of chats: each answer, at its `weight` (0 to 100), the last, or all."
    )
    fim: Fim = Field(default_factory=Fim, description="Fill in the middle, for format code.")
    rag: Rag = Field(default_factory=Rag, description="Retrieved passages, for format rag.")
    refusals: Refusals = Field(default_factory=Refusals, description="Built-in refusal rows.")
    prepare: Prepare = Field(default_factory=Prepare, description="The machines that prepare the rows.")


class Training(Model):
    """The optimisation. Steps are optimizer steps over the whole world."""

    epochs: float | None = Field(None, gt=0, le=1000, description="Passes over the rows. Default 1 without maxSteps.")
    max_steps: PositiveCount | None = Field(None, description="Optimizer steps. With epochs, whichever ends first.")
    tokens_per_batch: int | None = Field(
        None, ge=16, le=1_000_000_000, description="Global batch in tokens; rounded down to whole sequences."
    )
    sequences_per_batch: int | None = Field(
        None, ge=1, le=1_000_000, description="Global batch in sequences (packed rows). Default 16."
    )
    micro_batch: int = Field(1, ge=1, le=4096, description="Sequences per forward pass of one process.")
    learning_rate: float = Field(2e-4, gt=0, le=1, description="Peak learning rate of AdamW.")
    schedule: Schedule = Field("cosine", description="Shape after warm-up; wsd is warm-up, stable, decay.")
    warmup: float = Field(0.03, ge=0, le=1_000_000, description="Steps when 1 or more, else a fraction of all steps.")
    decay: Fraction = Field(0.2, description="Fraction of all steps that wsd spends decaying.")
    minimum_learning_rate: Fraction = Field(0.1, description="Where cosine, linear and wsd end, relative to the peak.")
    weight_decay: float = Field(0.0, ge=0, le=1, description="AdamW's decoupled weight decay; not on norms and biases.")
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's decay of the gradient's first moment.")
    beta2: float = Field(0.999, ge=0, lt=1, description="AdamW's decay of the gradient's second moment.")
    epsilon: float = Field(1e-8, gt=0, le=0.1, description="AdamW's epsilon.")
    clipping: float = Field(1.0, ge=0, le=1000, description="Largest global gradient norm; 0 turns it off.")
    seed: int = Field(0, ge=0, le=2**31 - 1, description="Seeds initialisation, data order and dropout.")
    precision: Precision = Field("bf16", description="Arithmetic of forward and backward; fp16 only on GPUs.")
    activation_checkpointing: bool = Field(False, description="Recompute activations: less memory, more time.")
    recompute_every: int = Field(
        1,
        ge=1,
        le=1000,
        description="Only each n-th block recomputes them: 2 saves half as much, at half the cost in time.",
    )
    evaluate_every_steps: PositiveCount | None = Field(
        None, description="Evaluate this often. Always at the start and at the end."
    )


class Offload(Model):
    """What DeepSpeed keeps in host memory."""

    optimizer: Literal["none", "cpu"] = Field("none", description="Optimizer states (ZeRO 1 to 3).")
    parameters: Literal["none", "cpu"] = Field("none", description="Parameters (ZeRO 3).")


def _not_a_boolean(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("must be auto, 0, 1, 2 or 3")  # a Literal takes True for 1; the API server does not
    return value


class DeepSpeed(Model):
    """DeepSpeed's engine."""

    zero_stage: Annotated[Literal["auto", 0, 1, 2, 3], BeforeValidator(_not_a_boolean)] = Field(
        "auto", description="ZeRO stage: 0 none, 1 optimizer states, 2 and gradients, 3 and parameters are sharded."
    )
    offload: Offload = Field(default_factory=Offload, description="Offload to host memory.")
    sequence_parallel: int = Field(1, ge=1, le=256, description="Processes that share one sequence (Ulysses).")
    config: dict[ShortText, Any] = Field(
        default_factory=dict,
        max_length=64,
        description="Raw DeepSpeed keys, merged last. Removed ones, and those that the job's fields set, are refused.",
    )


class Workers(Model):
    """The Ray workers that train."""

    count: int = Field(
        1, ge=1, le=4096, description="Worker pods. Each runs one process per GPU, or a single one on CPUs."
    )
    min: int | None = Field(None, ge=1, le=4096, description="Fewest workers to go on with (elastic).")
    gpus_each: int = Field(0, ge=0, le=16, description="GPUs of each worker pod; 0 trains on CPUs.")
    cpus_each: float = Field(1, gt=0, le=1024, description="CPU cores of each process.")


class Checkpoint(Model):
    """Checkpoints for resuming. One is always written at the end and on Ctrl-C, SIGTERM or a preemption notice."""

    every_steps: PositiveCount | None = Field(None, description="Write one this often, in steps.")
    every_minutes: float | None = Field(
        None, gt=0, le=10_080, description="Write one this often, in minutes. Default 10 without everySteps."
    )
    keep: int = Field(2, ge=1, le=1000, description="Complete checkpoints to keep.")


class Output(Model):
    """Where the weights go."""

    uri: FolderUri = Field(
        description="A folder: s3://, gs://, abfs://, file:// or, for `finetune run`, a relative path."
    )
    merge: bool = Field(True, description="With lora: also write the base model with the adapter merged in.")
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = Field("auto", description="Type on disk; auto: the base model's.")


class Tracking(Model):
    """Where the run's curves go besides its own report."""

    kind: Literal["none", "tensorboard", "mlflow", "wandb"] = Field("none", description="Which tool.")
    uri: Annotated[str, StringConstraints(max_length=512, pattern=patterns.ENDPOINT)] | None = Field(
        None,
        description="Server of MLflow or Weights & Biases. Absent: files in the run folder, and nothing leaves it. Its "
        "key comes from the environment or the runtime's secret: MLFLOW_TRACKING_TOKEN, WANDB_API_KEY.",
    )
    project: ShortText = Field("finetune", description="MLflow's experiment, Weights & Biases' project.")


class Limits(Model):
    """What the job may use at most."""

    retries: int = Field(3, ge=0, le=100, description="Attempts after a failure that is worth retrying.")
    preemptions: int = Field(20, ge=0, le=10_000, description="Attempts after a preemption.")
    hang_timeout: Duration = Field(
        "10m",
        description="A worker that gets on with nothing for so long, and for 20 usual steps, hangs: the attempt ends, "
        "and the worker and where it stood still are named. At least 5s; six times as long while the model is loaded "
        "or written.",
    )
    active_deadline: Duration | None = Field(None, description="Longest life of the job in a cluster, such as 12h.")
    max_cost: float | None = Field(
        None, gt=0, le=1e9, description="Most it may cost in a cluster, in the runtime's currency."
    )


class FinetuneJobSpec(Model):
    """What to finetune, on which rows, how, and where the weights go."""

    runtime_ref: RuntimeRef | None = Field(None, description="The runtime to run on, which the admin provides.")
    model: ModelSource = Field(description="The base model.")
    method: Method = Field(default_factory=Method, description="What is learned, and which weights are trained.")
    data: Data = Field(description="The rows, and how they become token sequences.")
    training: Training = Field(default_factory=Training, description="Length, batch, learning rate and precision.")
    deepspeed: DeepSpeed = Field(default_factory=DeepSpeed, description="How DeepSpeed shares the model among workers.")
    workers: Workers = Field(default_factory=Workers, description="How many workers, and what each of them has.")
    checkpoint: Checkpoint = Field(default_factory=Checkpoint, description="How often the state is kept for a restart.")
    output: Output = Field(description="Where weights and report go.")
    evaluation: Evaluation = Field(
        default_factory=Evaluation, description="What is measured at the end, and what it must reach."
    )
    tracking: Tracking = Field(
        default_factory=Tracking, description="TensorBoard, MLflow or Weights & Biases, offline unless told otherwise."
    )
    limits: Limits = Field(
        default_factory=Limits, description="The most attempts, time and money that the job may take."
    )
    suspend: bool = Field(False, description="Checkpoint, free the GPUs and wait.")
    ttl_after_finished: Duration | None = Field(None, description="Delete the job this long after its end.")


class ObjectMeta(Model):
    """The part of Kubernetes' metadata that is read offline; other fields are kept as they are."""

    model_config = Model.model_config | {"extra": "allow"}

    name: Annotated[str, StringConstraints(min_length=1, max_length=47, pattern=patterns.JOB_NAME)] = Field(
        description="Name of the job; at most 47 characters, since children carry it (KubeRay's limit)."
    )
    namespace: ResourceName | None = Field(None, description="Namespace.")


class FinetuneJob(Model):
    """Finetunes a language model: what model, on which rows, how, and where the weights go."""

    api_version: Literal["finetune.dev/v1alpha1"] = Field(description="finetune.dev/v1alpha1")
    kind: Literal["FinetuneJob"] = Field(description="FinetuneJob")
    metadata: ObjectMeta = Field(description="Name and namespace.")
    spec: FinetuneJobSpec = Field(description="What to do.")
    status: dict[str, Any] | None = Field(None, description="Set by the operator; ignored offline.")
