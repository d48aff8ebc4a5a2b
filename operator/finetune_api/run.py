"""What the pods and `finetune run` hand to each stage: the run's own file, and the names inside its work folder."""

from __future__ import annotations

from typing import Final

from pydantic import Field

from finetune_api.base import Count, Model, Money, ShortText, Uri
from finetune_api.job import FinetuneJobSpec

RUN_FILE: Final = "run.json"
MODEL_FILE: Final = "model.json"  # which files of which revision the base model is
PREPARED: Final = "prepared"  # manifest.json, data-report.json, *.arrow
CHECKPOINTS: Final = "checkpoints"  # step-00000120/
EXPORT: Final = "export"  # model/, or adapter/ and merged/
METRICS_FILE: Final = "metrics.jsonl"  # one event a line
ERROR_LOG: Final = "error.log"  # tracebacks of an unexpected failure
RESULT_FILE: Final = "result.json"  # written last


def checkpoint_name(step: int) -> str:
    """Name of a checkpoint's folder; names are in the order of steps."""
    return f"step-{step:08d}"


class Device(Model):
    """One GPU of the workers, as far as it is known before any is taken; the plan uses it."""

    memory_bytes: Count | None = Field(None, description="Its memory, in bytes.")
    product: ShortText | None = Field(None, description="Its product name, such as NVIDIA-H200.")
    price_per_hour: Money | None = Field(None, description="Its price for an hour.")
    currency: ShortText = Field("USD", description="The price's currency.")


class RunConfig(Model):
    """One run of a job. Stages read it from `<work>/run.json`."""

    name: ShortText = Field(description="The job's name.")
    uid: ShortText = Field(description="The job's UID; Ray's run name, the same over attempts.")
    spec: FinetuneJobSpec = Field(description="The job's spec with every default filled in.")
    base_dir: str = Field(description="Folder that relative paths in the spec start from, and must not leave.")
    model_path: str = Field(description="Local folder with the base model, resolved from spec.model.source.")
    work: Uri = Field(description="Work folder of this run (local path here; object storage in a cluster).")
    device: Device | None = Field(None, description="The workers' GPU. Absent on CPUs and where it is not known.")
    prepare_bytes: Count | None = Field(
        None, description="More rows than this, in bytes, are not prepared but asked more workers for. Absent: never."
    )
